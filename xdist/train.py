"""Train: the loop in which the student learns to meet the teacher's vectors, and its step. What starts it on workers is `launch`;
a trial of a search calls it in its own process.

Reads <run>/shards/ and <run>/initial/; its checkpoints go where its caller puts them, and one becomes <run>/student/. The order of
batches is a pure function of (seed, epoch, step): a training killed at any moment goes on with the batch that came next, and ends
in the same model.
"""

import contextlib
import functools
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xdist import cluster, files, selection, shards
from xdist.batching import Position
from xdist.config import LOSSES, Recipe, Train
from xdist.errors import Collapsed

WORST = -1.0  # score of a checkpoint at which nothing was evaluated


@dataclass(frozen=True)
class Place:
    """This process among those that train together; by default there is no other."""

    rank: int = 0
    world: int = 1
    parallel: Callable[[Any], Any] = lambda student: student
    """Wraps the student so that gradients are averaged over all processes."""
    summed: Callable[[list[float]], list[float]] = lambda numbers: numbers
    """Sums numbers over all processes."""
    warned: Callable[[], bool] = lambda: False
    """Asked every `train.log_every` steps: whether it is time for a checkpoint, since a machine will be taken away."""


def fit(
    recipe: Recipe,
    report: Callable[[float, dict[str, float], int, Callable[[str], None]], None],
    meter: "Meter",
    resumed: contextlib.AbstractContextManager[str] | None = None,
    place: Place = Place(),
) -> None:
    """Train from the checkpoint in the folder that `resumed` gives, or from the start, to the end, in this process. At each
    checkpoint and evaluation `report` is called with the score (WORST where nothing was evaluated), the accuracies, the step, and
    a function that saves a checkpoint into a folder."""
    import torch

    from xdist import checkpoint, encoder

    torch.manual_seed(recipe.run.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = files.download(f"{recipe.folder}/initial", scratch)
        student = encoder.load(folder, recipe.train.precision, recipe.train.attention, recipe.teacher.trust_remote_code)
    freeze_unused(student)
    optimizer = make_optimizer(student, recipe, place.world)
    start = Position()
    if resumed:
        with resumed as folder:
            start = checkpoint.load(folder, student, optimizer)
    model = place.parallel(student) if place.world > 1 else student
    order = shards.order(recipe)
    total = order.total_steps()
    judge = selection.Judge(recipe) if place.rank == 0 else None
    head = _head(recipe, student.device)

    remaining = itertools.islice(order.batches(start, place.rank, place.world), total - start.step)  # none where only the export is left
    with contextlib.closing(meter):
        meter.began(start.step)
        for position, micro_batches in remaining:
            learning_rate = schedule(position.step - 1, total, recipe.train.warmup_steps)
            last = position.step == total
            torch.manual_seed(recipe.run.seed + position.step)  # dropout, if there is any, is a function of the step as well
            watched = last or position.step % recipe.train.log_every == 0
            measured = step(model, student, optimizer, micro_batches, recipe.train, learning_rate, place.world, watched, head)
            meter.add(micro_batches)
            if watched:  # the same in every process, so that all of them end where one does
                *values, sequences, tokens = place.summed([*measured.values(), meter.sequences, meter.tokens])
                measured = dict(zip(measured, values, strict=True))
                meter.log(position.step, measured, recipe.train.lr * learning_rate, sequences, tokens)
                refuse_collapse(measured, position.step, recipe.train)
            evaluating = last or position.step % recipe.train.evaluate_every == 0
            if evaluating or position.step % recipe.train.checkpoint_every == 0 or (watched and place.warned()):
                score, accuracy = WORST, {}
                if judge and evaluating:
                    verdict = judge.judge(student)
                    score, accuracy = float(position.step) if verdict.score is None else verdict.score, verdict.accuracy
                    meter.evaluated(position.step, accuracy, score)
                save = functools.partial(checkpoint.save, model=student, optimizer=optimizer, position=position)
                report(score, accuracy, position.step, save)
                meter.pause()


def _head(recipe: Recipe, device: str) -> Any:
    """(weights, bias) of the head on the fine-tuned teacher's vectors, where the loss asks for it."""
    import torch

    if not recipe.train.loss.get("soft_labels"):
        return None
    found = selection.read_head(f"{recipe.folder}/selection/{recipe.finetune.task}.npz")
    return torch.from_numpy(found.weights).to(device), torch.from_numpy(found.bias).to(device)


def step(
    model: Any,
    student: Any,
    optimizer: Any,
    micro_batches: list[shards.Batch],
    settings: Train,
    rate: float,
    world: int,
    measure: bool,
    head: Any = None,
) -> dict[str, float]:
    """One optimiser step over this rank's micro-batches: move, forward, loss, backward, clip, step. Each of the step's micro-batches
    counts the same, however many workers share them out. Gives this rank's part of the step's mean measures."""
    import torch

    from xdist import collapse, loss

    totals: dict[str, float] = {}
    student.train()
    for number, batch in enumerate(micro_batches):
        ids, mask, t = (torch.from_numpy(array).to(student.device) for array in batch)
        waiting = world > 1 and number + 1 < len(micro_batches)
        with model.no_sync() if waiting else contextlib.nullcontext():
            s = model(ids, mask)[: len(t)]
            value, terms = loss.total(s, t, settings.loss, settings.loss_temperature, settings.matryoshka, head)
            (value * world / settings.micro_batches).backward()  # workers' gradients are averaged
        if measure:
            found = {"loss": value.detach(), **terms, **collapse.measure(s.detach(), t)}
            totals = {name: totals.get(name, 0.0) + float(found[name]) / settings.micro_batches for name in found}
    norm = optimizer.step(rate)
    if measure:
        totals["gradient_norm"] = float(norm) / world
    return totals


def schedule(done: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate for the step after `done` steps: linear warm-up, then linear decay to zero."""
    warmup = min(warmup, total // 2)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return (total - done) / max(1, total - warmup)


def make_optimizer(student: Any, recipe: Recipe, world: int = 1) -> Any:
    """The optimiser of both body and token table; the table has a rate of its own where its rows are new."""
    from xdist.optimizer import Optimizer

    return Optimizer(student, recipe.train, recipe.student.vocabulary in ("extend", "train"), world)


def freeze_unused(student: Any) -> None:
    """The body's own pooler gets no gradient (vectors are pooled from tokens): DDP must not wait for it."""
    pooler = getattr(student.model[0].auto_model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)


def refuse_collapse(measured: dict[str, float], done: int, settings: Train) -> None:
    """Stop a student that maps everything to nearly one point, once it has had time to spread. Raises Collapsed."""
    cosine, rank = measured["student_cosine"], measured["student_rank"]
    if done <= 2 * settings.warmup_steps + settings.log_every and not math.isnan(rank):
        return
    if math.isnan(rank) or (cosine > 0.95 and cosine > measured["teacher_cosine"] + 0.1) or rank < 0.05 * measured["teacher_rank"]:
        raise Collapsed(
            f"the student collapsed at step {done}: mean cosine between its vectors {cosine:.3f} "
            f"(teacher {measured['teacher_cosine']:.3f}), effective rank {rank:.1f} (teacher {measured['teacher_rank']:.1f}). "
            f"Lower train.lr (now {settings.lr}), raise train.warmup_steps, or give train.loss.similarity a weight"
        )


class Meter:
    """Rates and metrics, to the driver's terminal (`board`) and to MLflow (`metrics`), where they are given. Evaluation and
    checkpoints do not count as training time."""

    def __init__(self, board: cluster.RemoteBoard | None, metrics: Any, world: int = 1):
        self.board, self.metrics, self.world = board, metrics, world
        self.pause()

    def began(self, step_: int) -> None:
        """Say where training starts, and on how many workers."""
        if self.board:
            self.board.post({"step": step_, "world": self.world})
        self.pause()

    def pause(self) -> None:
        """Begin to measure anew."""
        self.started, self.sequences, self.tokens, self.steps = time.monotonic(), 0, 0, 0

    def add(self, micro_batches: list[shards.Batch]) -> None:
        """Count one step's texts and tokens."""
        self.sequences += sum(len(batch.vectors) for batch in micro_batches)
        self.tokens += sum(int(batch.mask[: len(batch.vectors)].sum()) for batch in micro_batches)
        self.steps += 1

    def log(self, step_: int, measured: dict[str, float], learning_rate: float, sequences: float, tokens: float) -> None:
        """Send the measures of this step, and the mean rates since the last call, in which all workers counted so much."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rates = {
            "sequences_per_second": sequences / seconds,
            "tokens_per_second": tokens / seconds,
            "steps_per_second": self.steps / seconds,
        }
        terms = {name: measured[name] for name in measured if name in LOSSES}
        if self.board:
            self.board.post({"step": step_, "loss": measured["loss"], "terms": terms, **rates})
        if self.metrics:
            self.metrics.log({f"train/{name}": value for name, value in ({**measured, **rates, "lr": learning_rate}).items()}, step_)
        self.pause()

    def evaluated(self, step_: int, accuracy: dict[str, float], score: float) -> None:
        """Send what was found on held-out text."""
        if self.board:
            self.board.post({"step": step_, "selection": score, "accuracy": accuracy})
        if self.metrics:
            self.metrics.log({f"held_out/{name}": value for name, value in accuracy.items()} | {"held_out/selection": score}, step_)

    def keep(self) -> None:
        """Keep what is not sent yet where a process that goes on after this one finds it."""
        if self.metrics:
            self.metrics.keep()

    def close(self) -> None:
        """Send what is left."""
        if self.metrics:
            self.metrics.flush()


def export(recipe: Recipe, checkpoint_folder: str) -> str:
    """Write <run>/student/ from a checkpoint's weights; the sentence-transformers folder that users load."""
    from xdist import checkpoint, encoder

    uri = f"{recipe.folder}/student"
    with tempfile.TemporaryDirectory() as scratch:
        initial = files.download(f"{recipe.folder}/initial", os.path.join(scratch, "initial"))
        student = encoder.load(initial, "float32", recipe.train.attention, recipe.teacher.trust_remote_code)
        checkpoint.load_weights(files.download(checkpoint_folder, os.path.join(scratch, "checkpoint")), student)
        whole = os.path.join(scratch, "whole")
        student.model.save(whole, create_model_card=False)
        files.upload(whole, uri, last="modules.json")
    return uri
