"""Selection: which checkpoint is best, by retrieval on held-out text and zero-shot probes on dev sets, never by the training
loss.

People read accuracies; the choice is made by likelihood. Between checkpoints of equal quality an accuracy on a few hundred
sentences jumps by a point and more, and by such luck a student from the middle of training beat the final one.

Reads <run>/holdout/ and the tasks' dev files, writes <run>/selection/ (heads fitted on the teacher's vectors).
"""

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xdist import files, metrics, shards, tasks
from xdist.config import Recipe
from xdist.metrics import Head

if TYPE_CHECKING:
    from xdist.encoder import Encoder

MOST_SENTENCES = 1000  # held-out sentences that are retrieved among each other
TEMPERATURE = 0.05  # of the softmax over cosines; the same whatever a training's own is, so that scores compare


def prepare(recipe: Recipe, teacher: "Encoder") -> None:
    """Fit a head on the teacher's source-language training vectors for each classification task with a dev set, and for the one
    that the teacher was fine-tuned on."""
    for task in recipe.evaluate.tasks:
        uri = f"{recipe.folder}/selection/{task.name}.npz"
        wanted = task.kind == "classification" and (task.dev or task.name == recipe.finetune.task)
        if wanted and not files.exists(uri):
            rows = tasks.read(recipe, task, "train", recipe.data.source_language)
            head = metrics.fit_chosen_head(teacher.encode(rows["text"], max_length=recipe.teacher.max_length), rows["label"])
            write_head(uri, head)


def write_head(uri: str, head: Head) -> None:
    """Keep a head as a file."""
    buffer = io.BytesIO()
    np.savez(buffer, weights=head.weights, bias=head.bias, classes=np.frombuffer(json.dumps(head.classes).encode(), np.uint8))
    files.write(uri, buffer.getvalue())


def read_head(uri: str) -> Head:
    """What `write_head` kept."""
    found = np.load(io.BytesIO(files.read(uri)), allow_pickle=False)
    return Head(found["weights"], found["bias"], json.loads(found["classes"].tobytes()))


@dataclass(frozen=True)
class Verdict:
    """`accuracy` by name, in [0, 1]: retrieval (mean of both directions) and zero-shot classification. `score`: the mean
    over the same names of the likelihood of what is right, None where there is nothing to judge by."""

    accuracy: dict[str, float]
    score: float | None


class Judge:
    """Scores a student; reads its texts once."""

    def __init__(self, recipe: Recipe):
        self.source = recipe.data.source_language
        self.parallel: dict[str, dict[str, list[str]]] = {}
        self.labelled: dict[str, tuple[Head, list[str], np.ndarray]] = {}
        groups = shards.holdout(recipe.folder)
        for lang in recipe.data.languages:
            pairs = [(g["source"], g["texts"][g["languages"].index(lang)]) for g in groups if lang in g["languages"]][:MOST_SENTENCES]
            if len(pairs) > 1:
                self.parallel[f"retrieval/{lang}"] = {self.source: [s for s, _ in pairs], lang: [t for _, t in pairs]}
        for task in recipe.evaluate.tasks:
            if task.dev and task.kind == "retrieval":
                texts = tasks.parallel(recipe, task, "dev")
                for lang in [lang for lang in texts if lang != self.source]:
                    self.parallel[f"{task.name}/{lang}"] = {self.source: texts[self.source], lang: texts[lang]}
            elif task.dev and task.kind == "classification":
                head = read_head(f"{recipe.folder}/selection/{task.name}.npz")
                for lang in [lang for lang in recipe.task_languages(task) if lang != self.source]:
                    rows = tasks.read(recipe, task, "dev", lang)
                    truth = np.array([head.classes.index(label) if label in head.classes else -1 for label in rows["label"]])
                    self.labelled[f"{task.name}/{lang}"] = (head, rows["text"], truth)

    @property
    def names(self) -> list[str]:
        """What accuracies it gives."""
        return [*self.parallel, *self.labelled]

    def judge(self, student: "Encoder") -> Verdict:
        """Encode every text once and compare."""
        accuracy: dict[str, float] = {}
        likelihoods: list[float] = []
        texts = [text for sides in self.parallel.values() for side in sides.values() for text in side]
        texts = list(dict.fromkeys(texts + [text for _, rows, _ in self.labelled.values() for text in rows]))
        place, vectors = {text: number for number, text in enumerate(texts)}, student.encode(texts)
        for name, sides in self.parallel.items():
            a, b = (vectors[[place[text] for text in side]] for side in sides.values())
            accuracy[name] = float(np.mean(metrics.retrieved(a, b)))
            own = [metrics.own_probability(*both, TEMPERATURE) for both in ((a, b), (b, a))]
            likelihoods.append(metrics.likelihood(np.concatenate(own), len(a)))
        for name, (head, rows, truth) in self.labelled.items():
            probabilities = head.probabilities(vectors[[place[text] for text in rows]])
            accuracy[name] = float((probabilities.argmax(axis=1) == truth).mean())
            right = np.where(truth >= 0, probabilities[np.arange(len(truth)), truth], 0.0)
            likelihoods.append(metrics.likelihood(right, len(head.classes)))
        return Verdict(accuracy, float(np.mean(likelihoods)) if likelihoods else None)
