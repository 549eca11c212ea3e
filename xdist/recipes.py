"""Recipes: from a YAML file and the command line to checked settings, with errors that name the file and the key.

python jobs/distill.py recipes/demo.yaml --train.lr 3e-4 --data.languages es,fr --data.corpora.terms.weight 5
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from xdist import overrides
from xdist.config import Recipe, absolute, closest
from xdist.errors import Refused


def parse(
    argv: Sequence[str], description: str, flags: dict[str, str] | None = None, before: dict[str, str] | None = None
) -> tuple[Recipe, argparse.Namespace]:
    """Command line `RECIPE [--section.key VALUE …]` to a checked recipe. `flags` adds switches, `before` arguments that come
    first: name → help.

    Raises Refused when the recipe is missing, not YAML, or wrong; argparse itself ends the program for unknown options.
    """
    parser = argparse.ArgumentParser(
        description=description.strip(),
        epilog=overrides.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, help_text in (before or {}).items():
        parser.add_argument(name, help=help_text)
    parser.add_argument("recipe", help="YAML recipe, for example recipes/demo.yaml")
    for name, help_text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=help_text)
    cli: CliSettingsSource[Any] = CliSettingsSource(Recipe, root_parser=parser, cli_hide_none_type=True, cli_avoid_json=True)
    others, named = overrides.taken(argv)
    args = parser.parse_args(others)
    try:
        given = cli(parsed_args=args)()
    except (SettingsError, ValueError) as error:
        raise Refused(
            f'command line: {error.__cause__ or error}; write lists as a,b or \'["a", "b"]\' and mappings as \'{{"key": 1}}\''
        ) from None
    return load(args.recipe, given, named), args


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key written twice is an error instead of a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises YAMLError for a key that occurs twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str], what: str, examples: str) -> dict[str, Any]:
    """A YAML file's mapping. Raises Refused, with `what` the file is to be and the folder that holds examples."""
    try:
        settings = yaml.load(_text(str(path)), _StrictLoader)
    except FileNotFoundError:
        raise Refused(f"{what} {path} does not exist; {examples} holds examples") from None
    except OSError as error:
        raise Refused(f"{what} {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date of a thirteenth month is a ValueError, and so is text that is no UTF-8
        raise Refused(f"{what} {path} is not valid YAML: {error}") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise Refused(f"{what} {path}: expected keys with values, as in {examples}, found {type(settings).__name__}")
    return settings


def _text(path: str) -> str:
    if "://" not in path:
        return Path(path).read_text(encoding="utf-8")
    from xdist import files  # only here: --help is to load nothing heavy

    return files.read(path).decode()


def load(path: str | os.PathLike[str], given: dict[str, Any] | None = None, named: dict[str, Any] | None = None) -> Recipe:
    """A recipe file, with overrides as a nested dictionary, and then values of named entries by dotted key."""
    settings = _merged(read_yaml(path, "recipe", "recipes/"), given or {})
    if named:
        settings = _merged({"train": {"loss": Recipe().train.loss}, "data": {"corpora": []}, "evaluate": {"tasks": []}}, settings)
    for key, value in (named or {}).items():
        overrides.put(settings, key, value, "command line")
    own: dict[str, Any] = {"run": {"recipe_folder": os.path.dirname(absolute(str(path)))}}
    if server := os.environ.get("MLFLOW_TRACKING_URI"):  # resolved here: workers may not have it
        own["track"] = {"uri": server}
    recipe = check(_merged(own, settings), str(path))
    return _anchored(_placed(recipe.model_dump(), "{recipe}", recipe.run.recipe_folder))


def _placed(value: Any, old: str, new: str) -> Any:
    """`value` with `new` for `old` in every text inside it."""
    if isinstance(value, dict):
        return {key: _placed(entry, old, new) for key, entry in value.items()}
    if isinstance(value, list):
        return [_placed(entry, old, new) for entry in value]
    return value.replace(old, new) if isinstance(value, str) and old else value


def _anchored(settings: dict[str, Any]) -> Recipe:
    """Relative folders made absolute: workers run in folders of their own, and on other machines."""
    for section, key in (("run", "storage"), ("data", "root")):
        settings[section][key] = absolute(settings[section][key])
    for section, key in (("teacher", "model"), ("student", "base")):
        means_teacher = section == "student" and settings[section][key] == "teacher"  # and no folder that happens to have that name
        if os.path.isdir(settings[section][key]) and not means_teacher:
            settings[section][key] = os.path.abspath(settings[section][key])
    return Recipe(**settings)


def check(settings: dict[str, Any], origin: str) -> Recipe:
    """Nested dictionary to a checked recipe; errors name `origin` and the key."""
    for key in settings:
        if key not in Recipe.model_fields:  # asked here: pydantic-settings takes names such as _env_file for its own
            raise Refused(f"{origin}: {key}: unknown key; {closest(str(key), list(Recipe.model_fields))}")
    try:
        recipe = Recipe(**settings)
    except ValidationError as error:
        raise Refused("\n".join(explained(error, origin, [key for key, _ in flatten(Recipe().model_dump())], settings))) from None
    for key, value in flatten(recipe.model_dump()):
        if isinstance(value, str) and re.search(r"://[^/@]*:[^/@]+@", value):
            raise Refused(
                f"{origin}: {key} holds a password, and recipes are kept and logged; give it by environment variables "
                "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY …)"
            )
    return recipe


def applied(recipe: Recipe, changes: dict[str, Any], origin: str = "trial") -> Recipe:
    """The recipe with dotted keys changed (named entries of lists by their name), checked as a whole. Raises Refused for a key that is
    not there."""
    settings = recipe.model_dump()
    for key, value in changes.items():
        overrides.put(settings, key, value, origin)
    return check(settings, origin)


def flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionary to (dotted key, value); named list entries (corpora, tasks) take their name as the key."""
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{dotted}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
            for entry in value:
                yield from flatten({k: v for k, v in entry.items() if k != "name"}, f"{dotted}.{entry['name']}.")
        else:
            yield dotted, value


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old → new` for each key whose value differs, apart from where things lie, run and are tracked."""
    free = ("cluster.", "track.", "run.storage", "run.recipe_folder", "data.root")
    placed = (_placed(settings, settings["run"].get("recipe_folder", ""), "{recipe}") for settings in (_completed(old), new))
    before, after = (dict(flatten(settings)) for settings in placed)
    keys = sorted(key for key in before.keys() | after.keys() if not key.startswith(free))
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version, with the defaults of what it did not know; as they are where they no longer hold."""
    try:
        return Recipe(**settings).model_dump(mode="json")
    except ValidationError:
        return settings


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "loss"
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def explained(error: ValidationError, origin: str, known: list[str], settings: dict[str, Any] | None = None) -> Iterator[str]:
    """One line for each mistake: `origin`, the key and what is wrong with it. `known` are the keys that there are; `settings`, those
    that were checked, tell the names of entries."""
    for problem in error.errors():
        key = _key(problem["loc"], settings)
        message = re.sub(r"^(Value error|Assertion failed), ", "", problem["msg"])
        if problem["type"] == "extra_forbidden":
            entry, model = key.rpartition(".")[0], overrides.ENTRIES.get(".".join(map(str, problem["loc"][:2])))
            message = f"unknown key; {closest(key, [f'{entry}.{name}' for name in model.model_fields] if model else known)}"
        elif isinstance(problem["input"], bool) and problem["type"] == "string_type":
            message += f"; YAML reads {'yes, on' if problem['input'] else 'no, off'} as a truth value: put it in quotes"
        yield f"{origin}: {key}: {message}" if key else f"{origin}: {message}"


def _key(place: Sequence[str | int], settings: Any) -> str:
    """A place in settings as a dotted key, with named entries of lists by their name."""
    parts = []
    for part in place:
        try:
            settings = settings[part]
        except (KeyError, IndexError, TypeError):
            settings = None
        named = isinstance(part, int) and isinstance(settings, dict) and "name" in settings
        parts.append(str(settings["name"] if named else part))
    return ".".join(parts)
