"""The low-resource study: how well does each encoder do with n labelled sentences of the language, and what does distillation save?

What is compared, on which samples, and what the fits say; `fits` does them. For each task and language, heads are fitted on frozen
vectors of nested, class-stratified samples, several seeds each; where asked, encoders are also fine-tuned with their heads on the
same samples.

`teacher` is the English teacher fed the language itself, `before` the student before distillation, `tfidf` a classifier on character
n-grams without any encoder, `task` the student of a teacher that was fine-tuned on the task in English, `<method>-tuned` an encoder
fine-tuned on the samples.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from xdist import curve, files, metrics, recipes, tasks
from xdist.config import Recipe, Section, Task, closest
from xdist.errors import Refused
from xdist.evaluate import BASELINE

Row = dict[str, Any]
METHODS = {"student": "after", "before": "before", "teacher": "teacher", BASELINE: BASELINE}  # name here → model of an evaluation
TASK = "task"
TUNED = "-tuned"  # after a method's name: its encoder is fine-tuned too
WHOLE = "all"

Sizes = list[Annotated[int, Field(ge=1)] | Literal["all"]]


class Tuning(Section):
    """Full fine-tuning: a method's encoder and head are trained together on each sample, at several learning rates."""

    methods: list[str] = Field(default=["student", "before"], min_length=1)
    """student, before, teacher, or one of `checkpoints`."""
    sizes: Sizes | None = Field(default=None, min_length=1)
    """As `sizes` of the study, whose they are when not given. Each fit is a training, so that fewer may do."""
    seeds: int | None = Field(default=None, ge=1)
    """Samples of each size; the study's `seeds` when not given. They are the same samples as the heads', as far as there are some."""
    lr: list[Annotated[float, Field(gt=0)]] = Field(default=[2e-5, 5e-5, 1e-4], min_length=1)
    """Peak learning rates of the encoder's layers: the best on the dev set, over all seeds of a size, counts. A task without a dev
    set takes the middle one."""
    epochs: int = Field(default=10, ge=1)
    """Passes over a sample."""
    batch_size: int = Field(default=16, ge=2)
    """Sentences of one step."""


class Study(Section):
    """What is compared, on which tasks, with how many labels."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the study; the file's own by default. Its folder is <storage>/<run.name>-<name>."""
    tasks: list[str] | None = None
    """Classification tasks of the recipe; all of them when not given."""
    languages: list[str] | None = None
    """Target languages; data.languages when not given."""
    sizes: Sizes = Field(default=[8, 16, 32, 64, 128, 256, 512, "all"], min_length=1)
    """Labelled sentences in the target language; a sample contains the smaller ones. Larger ones than a task has are left out."""
    seeds: int = Field(default=5, ge=1)
    """Samples of each size."""
    methods: list[Literal["student", "before", "teacher", "tfidf"]] = Field(default=["student", "before", "teacher", "tfidf"])
    """What the head is fitted on."""
    checkpoints: dict[str, str] = Field(default={})
    """Further encoders to compare, by a name of yours: folder or hub id."""
    task_runs: dict[str, str] = Field(default={})
    """For a task, the run in the same storage whose teacher was fine-tuned on it (finetune.task): its student is compared on that
    task, without labels by its own teacher's head."""
    c: list[Annotated[float, Field(gt=0)]] = Field(default=[1, 10, 100], min_length=1)
    """Values of the head's inverse regularisation strength (scikit-learn's C): the best on the dev set, over all seeds of a size,
    counts. A task without a dev set takes the middle one."""
    finetune: Tuning | None = None
    """Full fine-tuning beside the heads; none when not given."""

    @model_validator(mode="after")
    def _cross_check(self) -> "Study":
        for name in self.checkpoints:
            taken = name in (*METHODS, *METHODS.values(), TASK) or name.startswith(f"{TASK}-") or TUNED in name
            if taken or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"checkpoints: {name!r} is taken or no plain word; choose another name")
        for key, values in (("c", self.c), ("finetune.lr", self.finetune.lr if self.finetune else [])):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: a value is listed twice")
        encoders = [*(name for name in METHODS if name != BASELINE), *self.checkpoints]
        for name in self.finetune.methods if self.finetune else []:
            if name not in encoders:
                raise ValueError(f"finetune.methods: {name!r} is no encoder of this study; {closest(name, encoders)}")
        if not self.methods and not self.checkpoints:
            raise ValueError("methods: there is nothing to compare")
        return self

    @property
    def compared(self) -> list[str]:
        """All methods: those of heads, then those that are fine-tuned."""
        tuned = dict.fromkeys(self.finetune.methods) if self.finetune else []
        heads = [*dict.fromkeys(self.methods), *([TASK] if self.task_runs else []), *self.checkpoints]
        return heads + [name + TUNED for name in tuned]

    def sizes_of(self, method: str) -> Sizes:
        """The sizes of a method's samples."""
        return (self.finetune.sizes if self.finetune and method.endswith(TUNED) else None) or self.sizes

    def seeds_of(self, method: str) -> int:
        """How many samples of each size a method has."""
        return (self.finetune.seeds if self.finetune and method.endswith(TUNED) else None) or self.seeds

    def settings_of(self, method: str) -> tuple[str, list[float]]:
        """What is searched for each size of a method, and its values."""
        return ("lr", self.finetune.lr) if self.finetune and method.endswith(TUNED) else ("c", self.c)


def load(path: str, settings: dict[str, Any], recipe: Recipe) -> Study:
    """A study from its file's content (`study:` section and name), checked against the recipe. Raises Refused."""
    extra = settings.keys() - {"name", "study"}
    if extra:
        raise Refused(f"{path}: {min(extra)}: a file with `study` has no search; keep the two in files of their own")
    if not isinstance(settings["study"] or {}, dict):
        raise Refused(f"{path}: study: expected keys with values, as in tune_spaces/low_resource.yaml")
    try:
        study = Study(**({"name": settings.get("name", Path(path).stem)} | (settings["study"] or {})))
    except ValidationError as error:
        known = [*Study.model_fields, *(f"finetune.{key}" for key in Tuning.model_fields)]
        raise Refused("\n".join(recipes.explained(error, path, known))) from None
    known = [task.name for task in recipe.evaluate.tasks if task.kind == "classification"]
    for name in study.tasks or []:
        if name not in known:
            raise Refused(f"{path}: tasks: no classification task {name!r} in the recipe; {closest(name, known)}")
    for lang in study.languages or []:
        if lang not in recipe.data.languages:
            raise Refused(f"{path}: languages: {lang!r} is none of data.languages ({', '.join(recipe.data.languages)})")
    for name, run_name in study.task_runs.items():
        folder = f"{recipe.run.storage}/{run_name}"
        if name not in known or not files.exists(f"{folder}/student/modules.json"):
            raise Refused(f"{path}: task_runs: {name}: {run_name} is no finished run of a task of the recipe in {recipe.run.storage}")
        tuned = (yaml.safe_load(files.read(f"{folder}/recipe.yaml")).get("finetune") or {}).get("task")
        if tuned != name:
            raise Refused(
                f"{path}: task_runs: {name}: run {run_name} fine-tuned its teacher on {tuned or 'nothing'}; set finetune.task there"
            )
    if not units(recipe, study):
        raise Refused(f"{path}: no classification task has rows in these languages; declare one in evaluate.tasks")
    return study


def units(recipe: Recipe, study: Study) -> list[Row]:
    """Units of work {task, language, method}."""
    return [
        {"task": task.name, "language": lang, "method": method}
        for task in recipe.evaluate.tasks
        if task.kind == "classification" and (study.tasks is None or task.name in study.tasks)
        for lang in recipe.task_languages(task)
        if lang != recipe.data.source_language and (study.languages is None or lang in study.languages)
        for method in study.compared
        if method != TASK or task.name in study.task_runs
    ]


def uri(folder: str, unit: Row) -> str:
    """Where a unit's fits are written."""
    return f"{folder}/units/{'-'.join(str(unit[key]) for key in ('task', 'language', 'method', 'size') if key in unit)}.json"


def task_of(recipe: Recipe, name: str) -> Task:
    """A task of the recipe by its name."""
    return next(task for task in recipe.evaluate.tasks if task.name == name)


def sizes(recipe: Recipe, study: Study, unit: Row) -> list[tuple[int, bool]]:
    """(rows, whether these are all) of the samples that a unit's training rows suffice for."""
    count = len(tasks.read(recipe, task_of(recipe, unit["task"]), "train", unit["language"])["text"])
    found = {count if size == WHOLE else int(size) for size in study.sizes_of(unit["method"]) if size == WHOLE or int(size) <= count}
    return [(size, size == count) for size in sorted(found)]


def samples_of(recipe: Recipe, study: Study, unit: Row) -> list[tuple[int, list[np.ndarray]]]:
    """(rows, row numbers of each sample) of a unit's sizes, or of its one size. All rows are one sample."""
    labels = tasks.read(recipe, task_of(recipe, unit["task"]), "train", unit["language"])["label"]
    seeds = range(study.seeds_of(unit["method"]))
    return [
        (size, [metrics.few_shot(labels, size, np.random.default_rng([recipe.run.seed, seed])) for seed in (seeds[:1] if whole else seeds)])
        for size, whole in sizes(recipe, study, unit)
        if unit.get("size", size) == size
    ]


def summary(recipe: Recipe, rows: list[Row], measure: str = "accuracy") -> list[Row]:
    """For each task, language and method: the zero-shot score, means with intervals at each size, the fitted curve, and the labels
    that it takes to reach the student's zero-shot score and the teacher's score on the source language."""
    source = recipe.data.source_language
    english = {row["task"]: row[measure] for row in rows if row["language"] == source}
    out = []
    for task, lang in dict.fromkeys((row["task"], row["language"]) for row in rows if row["language"] != source):
        here = [row for row in rows if (row["task"], row["language"]) == (task, lang)]
        zero = {row["method"]: row[measure] for row in here if row["size"] == 0}
        goals = {"teacher_on_source": english[task]} | ({"student_zero_shot": zero["student"]} if "student" in zero else {})
        for method in dict.fromkeys(row["method"] for row in here):
            mine = [row for row in here if row["method"] == method and row["size"] and row["chosen"]]
            points = [_point([row for row in mine if row["size"] == size], measure) for size in sorted({row["size"] for row in mine})]
            fitted = curve.fit(_curves(mine, measure))
            entry: Row = {"task": task, "language": lang, "method": method, "zero_shot": zero.get(method), "points": points, "goals": goals}
            entry["measured"] = {name: next((p["size"] for p in points if p["mean"] >= goal), None) for name, goal in goals.items()}
            if fitted:
                entry["fit"] = {"intercept": fitted.intercept, "slope": fitted.slope, "slope_interval": fitted.slope_interval}
                entry["labels"] = {name: fitted.labels(goal, recipe.run.seed) for name, goal in goals.items()}
            out.append(entry)
    return out


def _curves(rows: list[Row], measure: str) -> dict[int, list[tuple[float, float]]]:
    """(size, score) by seed. The sample of all rows is the same for every seed, and belongs to each."""
    seeds = {row["seed"] for row in rows}
    alone = {size for size in {row["size"] for row in rows} if sum(row["size"] == size for row in rows) < len(seeds)}
    return {seed: [(row["size"], row[measure]) for row in rows if row["seed"] == seed or row["size"] in alone] for seed in seeds}


def _point(rows: list[Row], measure: str) -> Row:
    mean, low, high = curve.mean_interval([row[measure] for row in rows])
    searched = {name: rows[0][name] for name in ("c", "lr") if name in rows[0]}
    return {"size": rows[0]["size"], "mean": mean, "low": low, "high": high, "samples": len(rows), "searched": searched}
