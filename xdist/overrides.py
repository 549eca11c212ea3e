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
    fields = [("train.loss.NAME", f"Weight of a loss term ({', '.join(LOSSES)}); 0 leaves it out.")]
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
                raise Refused(f"command line: {key} needs a value (one that begins with -- is written --{key}=VALUE)")
            found[key] = _read(key, value)
        else:
            others.append(argument)
    return others, found


def _read(key: str, value: str) -> Any:
    """None, lists as a,b or ["a", "b"] and mappings as {"a": "b"} where the key takes such; all else stays text, as which the recipe's
    own types read it. A value inside a mapping (where.split) may be a list in brackets."""
    if value == "None":
        return None
    kind = _kind(key)
    structured = "{" if kind.startswith("dict[") else "[" if not kind or kind.startswith("list[") else None
    if value[0] == structured:
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise Refused(f'command line: {key}: {value!r} is not valid YAML; lists are a,b or \'["a", "b"]\'') from None
    return [part.strip() for part in value.split(",")] if kind.startswith("list[") else value


def _kind(key: str) -> str:
    """The type of a corpus' or task's key, in words; none for a key inside one of its mappings."""
    model = next((model for section, model in ENTRIES.items() if key.startswith(f"{section}.")), None)
    above, _, last = key.rpartition(".")
    if model is None or above.endswith((".where", ".codes")) or last not in model.model_fields:
        return ""
    return str(model.model_fields[last].annotation)


def put(settings: dict[str, Any], key: str, value: Any, origin: str, whole: str = "") -> None:
    """Set one dotted key of nested settings. Raises Refused for a name that no entry has."""
    first, _, rest = key.partition(".")
    inside, whole = settings.get(first), whole or key
    if not rest:
        settings[first] = value
    elif isinstance(inside, dict):
        settings[first] = dict(inside)  # YAML's aliases are one object in many places
        put(settings[first], rest, value, origin, whole)
    elif isinstance(inside, list):
        settings[first] = [dict(entry) if isinstance(entry, dict) else entry for entry in inside]
        named = {str(entry["name"]): entry for entry in settings[first] if isinstance(entry, dict) and "name" in entry}
        entry = _entry(named, rest, f"{origin}: {whole}")
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
