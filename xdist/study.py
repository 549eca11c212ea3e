"""The low-resource study: how well does each encoder do with n labelled sentences of the language, and what does distillation save?

For each task and language, heads are fitted on frozen vectors of nested, class-stratified samples, several seeds each, many fits to
a process. Reads a finished run (its students, its tasks) and writes, in <storage>/<run>-<study>/,

    vectors/<model>.npy texts.json          every text of every task, encoded once
    heads/<task>.npz                        the head that is fitted on the teacher's vectors of the source language
    units/<task>-<language>-<method>.json   the fits of one unit of work; its existence is the marker that resume goes by

`teacher` is the English teacher fed the language itself, `before` the student before distillation, `tfidf` a classifier on character
n-grams without any encoder, `task` the student of a teacher that was fine-tuned on the task in English.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from xdist import cluster, curve, evaluate, files, metrics, recipes, selection, tasks
from xdist.config import Recipe, Section, Task, closest
from xdist.errors import Refused
from xdist.evaluate import BASELINE
from xdist.progress import Progress, say

Row = dict[str, Any]
METHODS = {"student": "after", "before": "before", "teacher": "teacher", BASELINE: BASELINE}  # name here → model of an evaluation
TASK = "task"
WHOLE = "all"


class Study(Section):
    """What is compared, on which tasks, with how many labels."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the study; the file's own by default. Its folder is <storage>/<run.name>-<name>."""
    tasks: list[str] | None = None
    """Classification tasks of the recipe; all of them when not given."""
    languages: list[str] | None = None
    """Target languages; data.languages when not given."""
    sizes: list[Annotated[int, Field(ge=1)] | Literal["all"]] = Field(default=[8, 16, 32, 64, 128, 256, 512, "all"], min_length=1)
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

    @model_validator(mode="after")
    def _cross_check(self) -> "Study":
        for name in self.checkpoints:
            if name in (*METHODS, TASK) or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"checkpoints: {name!r} is taken or no plain word; choose another name")
        if len(set(self.c)) < len(self.c):
            raise ValueError("c: a value is listed twice")
        if not self.methods and not self.checkpoints:
            raise ValueError("methods: there is nothing to compare")
        return self

    @property
    def compared(self) -> list[str]:
        """All methods, further checkpoints last."""
        return [*dict.fromkeys(self.methods), *([TASK] if self.task_runs else []), *self.checkpoints]


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
        raise Refused("\n".join(recipes.explained(error, path, list(Study.model_fields)))) from None
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


def run(recipe: Recipe, study: Study, folder: str) -> list[Row]:
    """What is left of a study; gives every fit: {task, language, method, size, seed, c, accuracy, macro_f1, dev, chosen}. Size 0 is
    zero-shot: the head fitted on the teacher's vectors of the source language, which is also shown on that language itself.
    Needs a connected Ray and a finished run."""
    wanted = units(recipe, study)
    for task, lang in dict.fromkeys((unit["task"], unit["language"]) for unit in wanted):
        found = [size for size, _ in _sizes(recipe, study, {"task": task, "language": lang})]
        if not found:
            raise Refused(f"study {study.name}: {task} has fewer rows in {lang} than the smallest of `sizes`; add a smaller one, or all")
        left_out = [size for size in study.sizes if size != WHOLE and int(size) not in found]
        if left_out:
            say(f"study     {task}, {lang}: no samples of {', '.join(map(str, left_out))}, since there are fewer rows")
    models = dict.fromkeys(["teacher", *(METHODS.get(name, name) for name in study.compared if name not in (BASELINE, TASK))])
    items = [{"model": model, "checkpoint": study.checkpoints.get(model, "")} for model in models]
    students = {name: f"{recipe.run.storage}/{run_name}/student" for name, run_name in study.task_runs.items()}
    items += [
        {"model": f"{TASK}-{name}", "folder": student} for name, student in students.items() if any(unit["task"] == name for unit in wanted)
    ]
    evaluate.encode(recipe, _texts(recipe, wanted), items, f"{folder}/vectors")
    arguments: dict[str, Any] = {"settings": recipe.model_dump(mode="json"), "study": study.model_dump(mode="json"), "folder": folder}
    heads = [
        {"task": name, "language": recipe.data.source_language, "method": "teacher"} for name in dict.fromkeys(u["task"] for u in wanted)
    ]
    for stage, todo, counted in (("zero-shot", heads, "tasks"), ("fit", wanted, "heads")):
        waiting = [unit for unit in todo if not files.exists(_uri(folder, unit))]
        if waiting:
            with Progress(stage, counted, sum(_fits(recipe, study, unit) for unit in waiting)) as progress:
                for _ in cluster.stream(waiting, Fitter, progress, actors=cluster.cores(), cpus=1, **arguments):
                    pass
    return [row for unit in [*heads, *wanted] for row in files.read_json(_uri(folder, unit))]


def _fits(recipe: Recipe, study: Study, unit: Row) -> int:
    """How many heads a unit's work is."""
    if unit["language"] == recipe.data.source_language:
        return 1
    return sum(_samples(study, size, whole) for size, whole in _sizes(recipe, study, unit)) * len(study.c)


def _samples(study: Study, size: int, whole: bool) -> int:
    return 1 if whole else study.seeds


def _uri(folder: str, unit: Row) -> str:
    return f"{folder}/units/{unit['task']}-{unit['language']}-{unit['method']}.json"


def _task(recipe: Recipe, name: str) -> Task:
    return next(task for task in recipe.evaluate.tasks if task.name == name)


def _texts(recipe: Recipe, wanted: list[Row]) -> list[str]:
    """All texts that are encoded, each once."""
    found: dict[str, None] = {}
    source = recipe.data.source_language
    for name, lang in dict.fromkeys((unit["task"], unit["language"]) for unit in wanted):
        task = _task(recipe, name)
        dev = [("dev", lang)] if task.dev else []
        for split, spoken in (("train", source), ("test", source), ("train", lang), *dev, ("test", lang)):
            found.update(dict.fromkeys(tasks.read(recipe, task, split, spoken)["text"]))
    return list(found)


def _sizes(recipe: Recipe, study: Study, unit: Row) -> list[tuple[int, bool]]:
    """(rows, whether these are all) of the samples that a unit's training rows suffice for."""
    count = len(tasks.read(recipe, _task(recipe, unit["task"]), "train", unit["language"])["text"])
    found = {count if size == WHOLE else int(size) for size in study.sizes if size == WHOLE or int(size) <= count}
    return [(size, size == count) for size in sorted(found)]


class Fitter:
    """Fits all heads of a unit; an actor, so that vectors are read once."""

    def __init__(self, settings: dict[str, Any], study: dict[str, Any], folder: str):
        from threadpoolctl import threadpool_limits

        threadpool_limits(1)  # units share the cores
        self.recipe, self.study, self.folder = Recipe(**settings), Study(**study), folder
        self.place = {text: row for row, text in enumerate(files.read_json(f"{folder}/vectors/texts.json"))}
        self.vectors: dict[str, np.ndarray] = {}

    def __call__(self, unit: Row, board: cluster.RemoteBoard) -> Row:
        """Write <folder>/units/….json, and for the source language <folder>/heads/<task>.npz."""
        task = _task(self.recipe, unit["task"])
        test = tasks.read(self.recipe, task, "test", unit["language"])
        if unit["language"] == self.recipe.data.source_language:
            rows = [self._zero_shot_head(unit, task, test)]
            board.count(str(unit), 1)
        else:
            rows = self._few_shot(unit, task, test, board)
        files.write_json(_uri(self.folder, unit), rows)
        return unit

    def _zero_shot_head(self, unit: Row, task: Task, test: tasks.Rows) -> Row:
        train = tasks.read(self.recipe, task, "train", unit["language"])
        head = metrics.fit_chosen_head(self._stack("teacher", train["text"]), train["label"])
        selection.write_head(f"{self.folder}/heads/{task.name}.npz", head)
        return (
            unit | {"size": 0, "seed": 0, "c": 0.0, "chosen": True} | _measured(head, self._stack("teacher", test["text"]), test["label"])
        )

    def _few_shot(self, unit: Row, task: Task, test: tasks.Rows, board: cluster.RemoteBoard) -> list[Row]:
        study, method = self.study, str(unit["method"])
        train = tasks.read(self.recipe, task, "train", unit["language"])
        dev = tasks.read(self.recipe, task, "dev", unit["language"]) if task.dev else {"text": [], "label": []}
        if method == BASELINE:
            x, held = metrics.character_tfidf(train["text"], test["text"] + dev["text"])
        else:
            name = f"{TASK}-{task.name}" if method == TASK else METHODS.get(method) or method
            x, held = self._stack(name, train["text"]), self._stack(name, test["text"] + dev["text"])
        y, z = held[: len(test["text"])], held[len(test["text"]) :]
        rows: list[Row] = []
        if method not in (BASELINE, *study.checkpoints):  # its vectors lie in the space of a teacher
            own = f"{self.recipe.run.storage}/{study.task_runs.get(task.name)}/selection"
            head = selection.read_head(f"{own if method == TASK else self.folder + '/heads'}/{task.name}.npz")
            rows.append(unit | {"size": 0, "seed": 0, "c": 0.0, "chosen": True} | _measured(head, y, test["label"]))
        done = 0
        for size, whole in _sizes(self.recipe, study, unit):
            here: list[Row] = []
            for seed in range(_samples(study, size, whole)):
                picked = metrics.few_shot(train["label"], size, np.random.default_rng([self.recipe.run.seed, seed]))
                for c in study.c:
                    head = metrics.fit_head(x[picked], [train["label"][row] for row in picked], c)
                    found = _measured(head, y, test["label"]) | ({"dev": _measured(head, z, dev["label"])["accuracy"]} if task.dev else {})
                    here.append(unit | {"size": size, "seed": seed, "c": c} | found)
                    done += 1
                    board.count(str(unit), done)
            rows += _chosen(here, study.c)
        return rows

    def _stack(self, model: str, texts: list[str]) -> np.ndarray:
        if model not in self.vectors:
            self.vectors[model] = evaluate.read_vectors(f"{self.folder}/vectors", model)
        return self.vectors[model][[self.place[text] for text in texts]]


def _measured(head: metrics.Head, vectors: Any, labels: list[str]) -> dict[str, float]:
    names = list(dict.fromkeys(head.classes + labels))
    truth, predicted = np.array([names.index(label) for label in labels]), head.predict(vectors)
    return {"accuracy": float((truth == predicted).mean()), "macro_f1": metrics.macro_f1(truth, predicted, len(names))}


def _chosen(rows: list[Row], values: list[float]) -> list[Row]:
    """One size's fits, each marked whether its C is the chosen one: the best mean on the dev set, else the middle value."""
    best = sorted(values)[len(values) // 2]
    if rows and "dev" in rows[0]:
        best = max(values, key=lambda c: float(np.mean([row["dev"] for row in rows if row["c"] == c])))
    return [row | {"chosen": row["c"] == best} for row in rows]


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
    return {"size": rows[0]["size"], "mean": mean, "low": low, "high": high, "c": rows[0]["c"], "samples": len(rows)}
