"""Evaluate: the teacher, the student before training and the student after, in every language, with confidence intervals.

Reads the tasks' files, writes <run>/evaluation.json: one row per task, language, model and measure. Texts are encoded on
the cluster (GPUs where there are any); the measures are taken here.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from xdist import cluster, files, metrics, tasks
from xdist.config import Recipe, Task
from xdist.metrics import Score
from xdist.progress import Progress, say

if TYPE_CHECKING:
    from xdist.encoder import Encoder

MODELS = ("teacher", "before", "after")
BASELINE = "tfidf"  # of characters: what few-shot heads on an encoder's vectors have to beat
FEW_SHOT_SEEDS = 5

Vectors = dict[str, np.ndarray]  # text → vector
Row = dict[str, Any]


def evaluate(recipe: Recipe, anew: bool = False) -> list[Row]:
    """Rows {task, kind, language, model, metric, value, low, high, n}; those found before, unless they are wanted anew.
    Needs a connected Ray and a trained student."""
    uri = f"{recipe.folder}/evaluation.json"
    if files.exists(uri) and not anew:
        return list(files.read_json(uri))
    if not recipe.evaluate.tasks:
        files.write_json(uri, [])
        return []
    texts, folder = _texts(recipe), f"{recipe.folder}/evaluation"
    if anew:
        files.remove(folder)
    encode(recipe, texts, [{"model": model} for model in MODELS], folder)
    vectors = {model: dict(zip(texts, read_vectors(folder, model), strict=True)) for model in MODELS}
    rows: list[Row] = []
    with Progress("measure", "scores") as progress:
        for task in recipe.evaluate.tasks:
            for row in _task_rows(recipe, task, vectors):
                rows.append(row)
                progress.update(len(rows))
    files.write_json(uri, rows)
    files.remove(folder)
    return rows


def encode(recipe: Recipe, texts: list[str], models: list[Row], folder: str) -> None:
    """Write <folder>/<model>.npy, vectors (texts, dimension), for each {model, …} whose vectors of these texts are not there.
    Models are teacher, before and after; others come with a checkpoint (folder or hub id) or a folder of the storage."""
    marker = f"{folder}/texts.json"
    if files.exists(marker) and files.read_json(marker) != texts:
        files.remove(folder)
    files.write_json(marker, texts)
    waiting = [model for model in models if not files.exists(f"{folder}/{model['model']}.npy")]
    if not waiting:
        return
    cpus, gpus = cluster.resources(recipe.cluster)
    arguments: dict[str, Any] = {"settings": recipe.model_dump(mode="json"), "folder": folder, "threads": 0 if gpus else cpus}
    cluster.await_room(recipe.cluster, 1, cpus, gpus, "encode")
    with Progress("encode", "texts", len(texts) * len(waiting)) as progress:
        for _ in cluster.stream(waiting, ModelEncoder, progress, actors=len(waiting) if gpus else 1, cpus=cpus, gpus=gpus, **arguments):
            pass


def _texts(recipe: Recipe) -> list[str]:
    """All texts that are measured, each once, in a fixed order: of another language's labelled rows, those that a sample has."""
    found: dict[str, None] = {}
    for task in recipe.evaluate.tasks:
        for split, lang in tasks.measured(recipe, task):
            rows = tasks.read(recipe, task, split, lang)
            texts = rows["text"] + rows.get("text2", [])
            if split == "train" and lang != recipe.data.source_language:
                texts = [texts[row] for samples in _samples(recipe, task, rows["label"]).values() for row in np.unique(samples)]
            found.update(dict.fromkeys(texts))
    return list(found)


def _samples(recipe: Recipe, task: Task, labels: list[str]) -> dict[int, list[np.ndarray]]:
    """By size, the rows of each of the few-shot samples."""
    seeds = range(FEW_SHOT_SEEDS)
    sizes = [size for size in task.shots if size <= len(labels)]
    return {size: [metrics.few_shot(labels, size, np.random.default_rng([recipe.run.seed, seed])) for seed in seeds] for size in sizes}


class ModelEncoder:
    """Encodes all texts with one model after the other; an actor, so that libraries are loaded once."""

    def __init__(self, settings: dict[str, Any], folder: str, threads: int):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.recipe, self.folder = Recipe(**settings), folder
        self.texts = files.read_json(f"{folder}/texts.json")

    def __call__(self, item: Row, board: cluster.RemoteBoard) -> Row:
        """Write one model's vectors."""
        found, longest = load(self.recipe, item)
        vectors = found.encode(self.texts, None, lambda done: board.count(item["model"], done), longest)
        buffer = io.BytesIO()
        np.save(buffer, vectors)
        files.write(f"{self.folder}/{item['model']}.npy", buffer.getvalue())
        return {"model": item["model"]}


def load(recipe: Recipe, item: Row) -> "tuple[Encoder, int]":
    """One of the models of `encode`, and its longest input in tokens."""
    from xdist import encoder, finetune, weights

    model, prompt, longest = item["model"], "", recipe.student.max_length
    with tempfile.TemporaryDirectory() as scratch:
        if model in ("before", "after"):
            folder = files.download(f"{recipe.folder}/{'initial' if model == 'before' else 'student'}", scratch)
        elif model == "teacher":
            folder, prompt, longest = finetune.teacher_folder(recipe), recipe.teacher.prompt, recipe.teacher.max_length
        elif "folder" in item:
            folder = files.local(item["folder"])
        else:
            folder = weights.other(recipe, item["checkpoint"])
        found = encoder.load(folder, recipe.train.precision, recipe.train.attention, recipe.teacher.trust_remote_code, prompt)
    return found, longest


def read_vectors(folder: str, model: str) -> np.ndarray:
    """What `encode` wrote for one model."""
    return np.asarray(np.load(io.BytesIO(files.read(f"{folder}/{model}.npy")), allow_pickle=False))


def _task_rows(recipe: Recipe, task: Task, vectors: dict[str, Vectors]) -> Iterator[Row]:
    measure = {"retrieval": _retrieval, "classification": _classification, "sts": _sts}[task.kind]
    for model, lang, metric, score in measure(recipe, task, vectors):
        yield {"task": task.name, "kind": task.kind, "language": lang, "model": model, "metric": metric, **asdict(score)}


Found = Iterator[tuple[str, str, str, Score]]


def _stack(texts: list[str], vectors: Vectors) -> np.ndarray:
    return np.stack([vectors[text] for text in texts])


def _rows(texts: list[str], vectors: Vectors, rows: np.ndarray) -> np.ndarray:
    return _stack([texts[row] for row in rows], vectors)


def _mean(recipe: Recipe, outcomes: np.ndarray) -> Score:
    return metrics.bootstrap(lambda rows: float(outcomes[rows].mean()), len(outcomes), recipe.evaluate.bootstrap, recipe.run.seed)


def _retrieval(recipe: Recipe, task: Task, vectors: dict[str, Vectors]) -> Found:
    """Both directions by nearest cosine, and the error by margin (xsim), source language against each other one."""
    texts, source = tasks.parallel(recipe, task, "test"), recipe.data.source_language
    for model, known in vectors.items():
        a = _stack(texts[source], known)
        for lang in [lang for lang in texts if lang != source]:
            b = _stack(texts[lang], known)
            for direction, found in zip((f"{source}_to_xx", f"xx_to_{source}"), metrics.retrieved(a, b), strict=True):
                yield model, lang, f"accuracy_{direction}", _mean(recipe, found)
            yield model, lang, "xsim_error", _mean(recipe, ~metrics.margin_retrieved(a, b))


def _classification(recipe: Recipe, task: Task, vectors: dict[str, Vectors]) -> Found:
    """Zero-shot: a head fitted on the teacher's source-language vectors, on each model's vectors of each language.
    Few-shot: heads fitted on a model's own vectors of a few labelled rows of the language, mean over five samples; and the
    same on character TF-IDF."""
    source = recipe.data.source_language
    rows = tasks.read(recipe, task, "train", source)
    head = metrics.fit_chosen_head(_stack(rows["text"], vectors["teacher"]), rows["label"])
    for lang in recipe.task_languages(task):
        test = tasks.read(recipe, task, "test", lang)
        for model, known in vectors.items():
            predicted = head.predict(_stack(test["text"], known))
            yield from ((model, lang, f"zero_shot_{name}", score) for name, score in _scored(recipe, head, test["label"], predicted))
        if task.shots:
            train = tasks.read(recipe, task, "train", lang)
            if max(task.shots) > len(train["text"]):
                say(f"  {task.name}: only {len(train['text'])} training rows for {lang}, larger few-shot samples are left out")
            sides: dict[str, tuple[Callable[[np.ndarray], Any], Any]] = {
                model: (partial(_rows, train["text"], known), _stack(test["text"], known)) for model, known in vectors.items()
            }
            matrix, tested = metrics.character_tfidf(train["text"], test["text"])
            sides[BASELINE] = matrix.__getitem__, tested
            samples = _samples(recipe, task, train["label"])
            for model, (rows_of, y) in sides.items():
                found = _few_shot(recipe, samples, train["label"], rows_of, y, test["label"])
                yield from ((model, lang, name, score) for name, score in found)


def _scored(recipe: Recipe, head: metrics.Head, labels: list[str], predicted: np.ndarray) -> Iterator[tuple[str, Score]]:
    names = list(dict.fromkeys(head.classes + labels))
    truth = np.array([names.index(label) for label in labels])
    yield "accuracy", _mean(recipe, truth == predicted)
    f1 = metrics.bootstrap(
        lambda rows: metrics.macro_f1(truth[rows], predicted[rows], len(names)), len(truth), recipe.evaluate.bootstrap, recipe.run.seed
    )
    yield "macro_f1", f1


def _few_shot(
    recipe: Recipe, samples: dict[int, list[np.ndarray]], labels: list[str], rows_of: Callable[[np.ndarray], Any], y: Any, truth: list[str]
) -> Iterator[tuple[str, Score]]:
    """`rows_of` gives the vectors of training rows."""
    for size, of_size in samples.items():
        outcomes = []
        for picked in of_size:
            with threadpool_limits(1):  # as in metrics.fit_chosen_head
                head = metrics.fit_head(rows_of(picked), [labels[row] for row in picked])
            outcomes.append(np.array([head.classes[guess] for guess in head.predict(y)]) == np.array(truth))
        yield f"few_shot_{size}_accuracy", _mean(recipe, np.mean(outcomes, axis=0))


def _sts(recipe: Recipe, task: Task, vectors: dict[str, Vectors]) -> Found:
    """Spearman's correlation of the cosine with people's scores; 0 where either is constant."""
    from scipy.stats import rankdata

    for lang in recipe.task_languages(task):
        rows = tasks.read(recipe, task, "test", lang)
        wanted = np.array([float(score) for score in rows["score"]])
        for model, known in vectors.items():
            cosines = (_stack(rows["text"], known) * _stack(rows["text2"], known)).sum(1)

            def correlation(picked: np.ndarray, cosines: np.ndarray = cosines, wanted: np.ndarray = wanted) -> float:
                ranks = np.stack([rankdata(cosines[picked]), rankdata(wanted[picked])])
                return float(np.corrcoef(ranks)[0, 1]) if ranks.std(axis=1).all() else 0.0

            yield model, lang, "spearman", metrics.bootstrap(correlation, len(wanted), recipe.evaluate.bootstrap, recipe.run.seed)
