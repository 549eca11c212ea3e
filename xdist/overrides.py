"""Overrides: values of a recipe by dotted key, in which a loss, a corpus or a task is reached by its name (data.corpora.terms.weight).
They come from the command line, whose parser cannot know such options, or from a search space.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from xdist.config import LOSSES, Corpus, Section, Task
from xdist.errors import Refused

ENTRIES: dict[str, type[Section]] = {"data.corpora": Corpus, "evaluate.tasks": Task}
OPTIONS = ("--train.loss.", *(f"--{section}." for section in ENTRIES))


def help_text() -> str:
    """Every option of this kind, as argparse would list it."""
    fields = [("train.loss.NAME", f"Weight of this loss term: {', '.join(LOSSES)}.")]
    for section, model in ENTRIES.items():
        fields += [(f"{section}.NAME.{key}", field.description or "") for key, field in model.model_fields.items() if key != "name"]
    indent = " " * 24
    lines = [
        f"  --{key}\n{textwrap.fill(' '.join(text.split()), 79, initial_indent=indent, subsequent_indent=indent)}" for key, text in fields
    ]
    return "\n".join(["a loss, corpus or task by its name:", *lines])


def taken(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The other arguments, and values by dotted key. Raises Refused for an option without a value."""
    others: list[str] = []
    found: dict[str, Any] = {}
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith(OPTIONS):
            key, equals, value = argument.removeprefix("--").partition("=")
            value = value if equals else next(arguments, "")
            if not value or (value.startswith("--") and not equals):
                raise Refused(f"command line: {key} needs a value; None takes one away, and --{key}=VALUE may begin with --")
            found[key] = _read(key, value)
        else:
            others.append(argument)
    return others, found


def _read(key: str, value: str) -> Any:
    """As for other options: None, lists as a,b or ["a", "b"], all else as it stands, which the recipe's own types read."""
    if value == "None":
        return None
    if value.startswith("["):
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise Refused(f'command line: {key}: {value!r} is no list; write a,b or \'["a", "b"]\'') from None
    return value.split(",") if _is_list(key) else value


def _is_list(key: str) -> bool:
    model = next((model for section, model in ENTRIES.items() if key.startswith(f"{section}.")), None)
    field = model.model_fields.get(key.rpartition(".")[2]) if model else None
    return field is not None and str(field.annotation).startswith("list[")


def put(settings: dict[str, Any], key: str, value: Any, origin: str, whole: str = "") -> None:
    """Set one dotted key of nested settings. Raises Refused for a name that no entry has."""
    first, _, rest = key.partition(".")
    inside, whole = settings.get(first), whole or key
    if not rest:
        settings[first] = value
    elif isinstance(inside, dict):
        put(inside, rest, value, origin, whole)
    elif isinstance(inside, list) and all(isinstance(entry, dict) and "name" in entry for entry in inside):
        entry = _entry({str(entry["name"]): entry for entry in inside}, rest, f"{origin}: {whole}")
        put(entry, rest.removeprefix(f"{entry['name']}."), value, origin, whole)
    elif first in settings:
        raise Refused(f"{origin}: {whole}: {first} has no keys of its own")
    else:
        settings[first] = {rest: value}  # left to the recipe's own check, which knows what was probably meant


def _entry(entries: dict[str, dict[str, Any]], rest: str, origin: str) -> dict[str, Any]:
    """The entry whose name `rest` begins with: the longest, where one name begins with another."""
    if rest in entries:
        raise Refused(f"{origin}: name one of its keys")
    found = [name for name in entries if rest.startswith(f"{name}.")]
    if not found:
        raise Refused(f"{origin}: no such entry; there are {', '.join(entries) or 'none'}")
    return entries[max(found, key=len)]
