"""Evaluation tasks: plain TSV files, read whole. A bad row is refused here: an evaluation set must be complete."""

import math
from collections.abc import Iterator

from xdist import formats
from xdist.config import Recipe, Task
from xdist.errors import Refused

Rows = dict[str, list[str]]


def path_of(recipe: Recipe, task: Task, split: str, lang: str) -> str | None:
    """File of one split and language, absolute; None where the task has no such split."""
    path = {"train": task.train, "dev": task.dev, "test": task.test}[split]
    return recipe.located(path.replace("{lang}", task.codes.get(lang, lang))) if path else None


def read(recipe: Recipe, task: Task, split: str, lang: str) -> Rows:
    """Columns text, text2, label, score and id, as far as the task has them, of one split in one language.

    Raises Refused for a missing file or column, a row that cannot be read, and a split without rows.
    """
    code = task.codes.get(lang, lang)
    wanted = {"text": task.text}
    wanted |= {"classification": {"label": task.label}, "sts": {"text2": task.text2, "score": task.score}, "retrieval": {}}[task.kind]
    wanted |= {"id": task.id} if task.id else {}
    wanted |= {"split": task.split} if task.split else {}
    columns = {role: column.replace("{lang}", code) for role, column in wanted.items()}
    rows: Rows = {role: [] for role in columns}
    path = path_of(recipe, task, split, lang) or ""
    for name in formats.expand(path, "tsv"):
        for chunk in formats.read(name, "tsv", list(dict.fromkeys(columns.values()))):
            if chunk.bad:
                raise Refused(f"{name}: line {chunk.bad[0].line} cannot be read ({chunk.bad[0].reason}); mend the evaluation file")
            values = {role: chunk.columns[column].to_pylist() for role, column in columns.items()}
            kept = [place for place in range(len(chunk.lines)) if not task.split or values["split"][place] == split]
            for place in kept:
                _check(name, int(chunk.lines[place]), {role: column[place] for role, column in values.items()})
            for role, column in values.items():
                rows[role] += [column[place] for place in kept]
    if not rows["text"]:
        raise Refused(f"evaluate.tasks.{task.name}: no {split} row for language {lang} in {path}")
    return rows


def _check(path: str, line: int, row: dict[str, str]) -> None:
    empty = next((role for role, value in row.items() if not value.strip()), None)
    if empty:
        raise Refused(f"{path}: line {line} has an empty {empty}; mend the evaluation file")
    try:
        fine = math.isfinite(float(row.get("score", "0")))
    except ValueError:
        fine = False
    if not fine:
        raise Refused(f"{path}: line {line}: score {row['score']!r} is not a number; mend the evaluation file")


def check(recipe: Recipe) -> None:
    """Read every split of every task once, so that a mistake in one is refused before work begins and not after it."""
    for task in recipe.evaluate.tasks:
        dev = [("dev", lang) for lang in recipe.task_languages(task) if task.dev]
        for split, lang in [*dev, *measured(recipe, task)]:
            read(recipe, task, split, lang)


def measured(recipe: Recipe, task: Task) -> list[tuple[str, str]]:
    """(split, language) of all rows that an evaluation reads: labelled rows of other languages only where few-shot heads
    are fitted on them."""
    langs = recipe.task_languages(task)
    wanted = [("test", lang) for lang in langs]
    if task.kind == "classification":
        wanted += [("train", lang) for lang in dict.fromkeys([recipe.data.source_language, *(langs if task.shots else [])])]
    return wanted


def held_out(recipe: Recipe) -> Iterator[tuple[Task, Rows]]:
    """Dev and test rows of every task and language: what must not be trained on."""
    for task in recipe.evaluate.tasks:
        for split in ("dev", "test"):
            for lang in recipe.task_languages(task):
                if path_of(recipe, task, split, lang):
                    yield task, read(recipe, task, split, lang)


def parallel(recipe: Recipe, task: Task, split: str) -> dict[str, list[str]]:
    """Texts by language, row i of every language being translations of each other: joined by id, or by row."""
    found = {lang: read(recipe, task, split, lang) for lang in recipe.task_languages(task)}
    if not task.id:
        sizes = {lang: len(rows["text"]) for lang, rows in found.items()}
        if len(set(sizes.values())) > 1:
            raise Refused(f"evaluate.tasks.{task.name}: languages differ in rows ({sizes}); set `id`, the column to join on")
        return {lang: rows["text"] for lang, rows in found.items()}
    texts = {lang: dict(zip(rows["id"], rows["text"], strict=True)) for lang, rows in found.items()}
    for lang, rows in found.items():
        if len(texts[lang]) < len(rows["id"]):
            raise Refused(f"evaluate.tasks.{task.name}: an id occurs twice in language {lang}; `id` must name one row ({task.id})")
    common = [key for key in texts[recipe.data.source_language] if all(key in by_id for by_id in texts.values())]
    if not common:
        raise Refused(f"evaluate.tasks.{task.name}: no {task.id} occurs in every language; check `id`")
    return {lang: [by_id[key] for key in common] for lang, by_id in texts.items()}
