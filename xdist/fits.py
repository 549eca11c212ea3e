"""The fits of a low-resource study: heads on frozen vectors, many to a process, and full fine-tuning of encoder and head.

Reads a finished run (its students, its tasks) and writes, in <storage>/<run>-<study>/,

    vectors/<model>.npy texts.json          every text of every task, encoded once
    heads/<task>.npz                        the head that is fitted on the teacher's vectors of the source language
    units/<task>-<language>-<method>.json   the fits of one unit of work; its existence is the marker that resume goes by
    units/….-tuned-<size>.json              the same of fine-tuning, where each size is a unit
"""

from typing import Any

import numpy as np

from xdist import cluster, evaluate, files, metrics, selection, tasks
from xdist.config import Finetune, Recipe, Task
from xdist.errors import Refused
from xdist.evaluate import BASELINE
from xdist.progress import Progress, say
from xdist.study import METHODS, TASK, TUNED, WHOLE, Row, Study, samples_of, sizes, task_of, units, uri


def run(recipe: Recipe, study: Study, folder: str) -> list[Row]:
    """What is left of a study; gives every fit: {task, language, method, size, seed, c or lr, accuracy, macro_f1, dev, chosen}. Size 0
    is zero-shot: the head fitted on the teacher's vectors of the source language, which is also shown on that language itself.
    Needs a connected Ray and a finished run."""
    wanted = units(recipe, study)
    left_out: dict[str, None] = {}
    for unit in wanted:
        found, task, lang = [size for size, _ in sizes(recipe, study, unit)], unit["task"], unit["language"]
        key = "finetune.sizes" if unit["method"].endswith(TUNED) and study.finetune and study.finetune.sizes else "sizes"
        if not found:
            raise Refused(f"study {study.name}: {task} has fewer rows in {lang} than the smallest of `{key}`; add a smaller one, or all")
        missing = [str(size) for size in study.sizes_of(unit["method"]) if size != WHOLE and int(size) not in found]
        if missing:
            left_out[f"study     {task}, {lang}: no samples of {', '.join(missing)} ({key}), since there are fewer rows"] = None
    for line in left_out:
        say(line)
    encoded = [name for name in study.compared if name not in (BASELINE, TASK) and not name.endswith(TUNED)]
    models = dict.fromkeys(["teacher", *(METHODS.get(name, name) for name in encoded)])
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
    on_frozen = [unit for unit in wanted if not unit["method"].endswith(TUNED)]
    tuned = [unit | {"size": size} for unit in wanted if unit not in on_frozen for size, _ in sizes(recipe, study, unit)]
    cpus, gpus = cluster.resources(recipe.cluster)
    training: dict[str, Any] = {"cpus": cpus, "gpus": gpus, "threads": 0 if gpus else cpus}
    for stage, todo, counted, work, options in (
        ("zero-shot", heads, "tasks", Fitter, {"actors": cluster.cores(), "cpus": 1}),
        ("fit", on_frozen, "heads", Fitter, {"actors": cluster.cores(), "cpus": 1}),
        ("finetune", sorted(tuned, key=lambda unit: str(unit["method"])), "fits", Tuner, training),  # an encoder is loaded once
    ):
        waiting = [unit for unit in todo if not files.exists(uri(folder, unit))]
        if waiting and work is Tuner:
            cluster.await_room(recipe.cluster, 1, cpus, gpus, stage)
            options = options | {"actors": cluster.teacher_actors(recipe.cluster)}
        if waiting:
            with Progress(stage, counted, sum(_fits(recipe, study, unit) for unit in waiting)) as progress:
                for _ in cluster.stream(waiting, work, progress, **options, **arguments):
                    pass
    return [row for unit in [*heads, *on_frozen, *tuned] for row in files.read_json(uri(folder, unit))]


def _fits(recipe: Recipe, study: Study, unit: Row) -> int:
    """How many fits a unit's work is."""
    if unit["language"] == recipe.data.source_language:
        return 1
    method = unit["method"]
    samples = [1 if whole else study.seeds_of(method) for size, whole in sizes(recipe, study, unit) if unit.get("size", size) == size]
    return sum(samples) * len(study.settings_of(method)[1])


def _texts(recipe: Recipe, wanted: list[Row]) -> list[str]:
    """All texts that are encoded, each once."""
    found: dict[str, None] = {}
    source = recipe.data.source_language
    for name, lang in dict.fromkeys((unit["task"], unit["language"]) for unit in wanted):
        task = task_of(recipe, name)
        dev = [("dev", lang)] if task.dev else []
        for split, spoken in (("train", source), ("test", source), ("train", lang), *dev, ("test", lang)):
            found.update(dict.fromkeys(tasks.read(recipe, task, split, spoken)["text"]))
    return list(found)


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
        task = task_of(self.recipe, unit["task"])
        if unit["language"] == self.recipe.data.source_language:
            rows = [self._zero_shot_head(unit, task)]
            board.count(str(unit), 1)
        else:
            rows = self._few_shot(unit, task, board)
        files.write_json(uri(self.folder, unit), rows)
        return unit

    def _zero_shot_head(self, unit: Row, task: Task) -> Row:
        train, test = (tasks.read(self.recipe, task, split, unit["language"]) for split in ("train", "test"))
        head = metrics.fit_chosen_head(self._stack("teacher", train["text"]), train["label"])
        selection.write_head(f"{self.folder}/heads/{task.name}.npz", head)
        return (
            unit | {"size": 0, "seed": 0, "c": 0.0, "chosen": True} | _measured(head, self._stack("teacher", test["text"]), test["label"])
        )

    def _few_shot(self, unit: Row, task: Task, board: cluster.RemoteBoard) -> list[Row]:
        study, method = self.study, str(unit["method"])
        train, test, dev = _splits(self.recipe, task, unit["language"])
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
        for size, samples in samples_of(self.recipe, study, unit):
            here: list[Row] = []
            for seed, picked in enumerate(samples):
                for c in study.c:
                    head = metrics.fit_head(x[picked], [train["label"][row] for row in picked], c)
                    here.append(unit | {"size": size, "seed": seed, "c": c} | _scored(head, y, test, z, dev))
                    done += 1
                    board.count(str(unit), done)
            rows += chosen(here, "c", study.c)
        return rows

    def _stack(self, model: str, texts: list[str]) -> np.ndarray:
        if model not in self.vectors:
            self.vectors[model] = evaluate.read_vectors(f"{self.folder}/vectors", model)
        return self.vectors[model][[self.place[text] for text in texts]]


class Tuner:
    """Fine-tunes a method's encoder with a head on all samples of one size; an actor, so that an encoder is loaded once for many."""

    def __init__(self, settings: dict[str, Any], study: dict[str, Any], folder: str, threads: int):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.recipe, self.study, self.folder = Recipe(**settings), Study(**study), folder
        self.method = ""

    def __call__(self, unit: Row, board: cluster.RemoteBoard) -> Row:
        """Write <folder>/units/….json."""
        from xdist import finetune

        recipe, tuning = self.recipe, self.study.finetune
        assert tuning
        self._load(unit["method"].removesuffix(TUNED))
        task = task_of(recipe, unit["task"])
        train, test, dev = _splits(recipe, task, unit["language"])
        held = list(dict.fromkeys(test["text"] + dev["text"]))
        place = {text: row for row, text in enumerate(held)}
        rows: list[Row] = []
        ((_, samples),) = samples_of(recipe, self.study, unit)
        for seed, picked in enumerate(samples):
            texts, labels = ([train[column][row] for row in picked] for column in ("text", "label"))
            for lr in tuning.lr:
                self.encoder.load_state_dict(self.weights)
                start = metrics.fit_head(self.encoder.encode(texts, max_length=self.longest), labels, _middle(self.study.c))
                settings = Finetune(lr=lr, epochs=tuning.epochs, batch_size=tuning.batch_size)
                head = finetune.learn(self.encoder, texts, labels, start, settings, recipe.run.seed + seed, recipe.train.clip, self.longest)
                vectors = self.encoder.encode(held, max_length=self.longest)
                y, z = (vectors[[place[text] for text in part["text"]]] for part in (test, dev))
                rows.append(unit | {"seed": seed, "lr": lr} | _scored(head, y, test, z, dev))
                board.count(str(unit), len(rows))
        files.write_json(uri(self.folder, unit), chosen(rows, "lr", tuning.lr))
        return unit

    def _load(self, method: str) -> None:
        """Have the method's encoder and its weights as they were."""
        if method != self.method:
            item = {"model": METHODS.get(method, method), "checkpoint": self.study.checkpoints.get(method, "")}
            self.encoder, self.longest = evaluate.load(self.recipe, item)
            self.weights = {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}
            self.method = method


def _splits(recipe: Recipe, task: Task, lang: str) -> tuple[tasks.Rows, tasks.Rows, tasks.Rows]:
    """A task's training, test and dev rows; of the last there may be none."""
    train, test = (tasks.read(recipe, task, split, lang) for split in ("train", "test"))
    return train, test, tasks.read(recipe, task, "dev", lang) if task.dev else {"text": [], "label": []}


def _scored(head: metrics.Head, y: Any, test: tasks.Rows, z: Any, dev: tasks.Rows) -> dict[str, float]:
    """A head's scores on the test set's vectors, and its accuracy on the dev set's."""
    return _measured(head, y, test["label"]) | ({"dev": _measured(head, z, dev["label"])["accuracy"]} if dev["label"] else {})


def _measured(head: metrics.Head, vectors: Any, labels: list[str]) -> dict[str, float]:
    names = list(dict.fromkeys(head.classes + labels))
    truth, predicted = np.array([names.index(label) for label in labels]), head.predict(vectors)
    return {"accuracy": float((truth == predicted).mean()), "macro_f1": metrics.macro_f1(truth, predicted, len(names))}


def chosen(rows: list[Row], name: str, values: list[float]) -> list[Row]:
    """One size's fits, each marked whether its value of the searched setting is the chosen one: the best mean on the dev set, else
    the middle value."""
    best = _middle(values)
    if rows and "dev" in rows[0]:
        best = max(values, key=lambda value: float(np.mean([row["dev"] for row in rows if row[name] == value])))
    return [row | {"chosen": row[name] == best} for row in rows]


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
