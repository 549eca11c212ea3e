"""Train: the student learns to meet the teacher's vectors, with Ray Train, on one worker or many.

Reads <run>/shards/ and <run>/initial/, writes <run>/checkpoints/ (newest and best) and at the end <run>/student/. The
order of batches is a pure function of (seed, epoch, step): a run killed at any moment goes on with the batch that came
next, and ends in the same model.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from xdist import cluster, files, progress, selection, shards
from xdist.batching import Position
from xdist.config import LOSSES, Recipe, Train
from xdist.errors import Collapsed, Refused
from xdist.progress import say

WORST = -1.0  # score of a checkpoint at which nothing was evaluated
RETRIES = 3  # starts of the workers, one after the other, that come to no new checkpoint
RESIZE_EVERY = 60.0  # seconds between looks for more workers


def train(recipe: Recipe, run_id: str, tracking_uri: str) -> str:
    """Train, or go on training. Gives the folder of the best checkpoint. Needs a connected Ray.

    Workers that die are started again from the newest checkpoint, as long as each few starts get further than those before. Raises
    Collapsed when the student maps everything to nearly one point.
    """
    import ray

    cpus, gpus = cluster.resources(recipe.cluster)
    total, (least, most) = shards.order(recipe).total_steps(), recipe.cluster.workers
    workers = f"{most}" if least == most else f"{least} to {most}"
    say(f"train     {total:,} steps of {recipe.train.batch_tokens:,} tokens on {workers} worker(s)")
    cluster.await_room(recipe.cluster, least, cpus, gpus, "train")
    _remove_unnoted(f"{recipe.folder}/checkpoints")
    starts: list[int] = []

    def show(_: int, __: float, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "world" in line:
                starts.append(line["step"])
            if "world" not in line or line["step"] or len(starts) > 1 or least < most:
                say(_line(line, total))

    with cluster.watched(show) as board:
        given = {"settings": recipe.model_dump(mode="json"), "board": board, "run_id": run_id, "tracking_uri": tracking_uri}
        while True:
            try:
                result = _fit(_trainer(recipe, given | {"threads": 0 if gpus else cpus}, cpus, gpus))
                break
            except ray.train.TrainingFailedError as error:
                reason = _reason(error)
                if isinstance(reason, Refused) or not starts or starts[-1] == starts[0]:
                    raise reason from None
                del starts[:-1]
    if result.return_value:
        kind, message = json.loads(result.return_value)
        raise Collapsed(message) if kind == "Collapsed" else Refused(message)
    best = max(result.best_checkpoints, key=lambda found: found[1]["selection"])[0]
    return f"{recipe.folder}/checkpoints/{os.path.basename(best.path)}"


def _remove_unnoted(folder: str) -> None:
    """Remove checkpoints that were being uploaded when a run was killed: Ray Train goes by the notes that it makes of whole ones."""
    notes = f"{folder}/checkpoint_manager_snapshot.json"
    state = files.read_json(notes) if files.exists(notes) else {}
    noted = [entry["checkpoint_dir_name"] for key in ("checkpoint_results", "pending_training_results") for entry in state.get(key, [])]
    for name in files.folders(folder):
        if name.startswith("checkpoint_") and name not in noted:
            files.remove(f"{folder}/{name}")


def _trainer(recipe: Recipe, given: dict[str, Any], cpus: int, gpus: float) -> Any:
    """Ray Train's trainer of the run; where the run has a checkpoint, it goes on from there."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    worker: Any = _worker
    scaling: Any = ScalingConfig  # the types that Ray gives it are those of its older version
    least, most = recipe.cluster.workers
    return TorchTrainer(
        worker,
        train_loop_config=given,
        scaling_config=scaling(
            num_workers=most if least == most else (least, most),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
            elastic_resize_monitor_interval_s=RESIZE_EVERY,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=recipe.folder,
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="selection", checkpoint_score_order="max"),
            failure_config=FailureConfig(max_failures=RETRIES),
        ),
    )


def _fit(trainer: Any) -> Any:
    """Ray Train answers Ctrl-C by ending the process without a word, and keeps doing so afterwards; here it is the usual
    KeyboardInterrupt."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _reason(error: Any) -> BaseException:
    """What a worker refused, if that is why training failed; otherwise the error itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, Refused):
            return failure
    return error


def _line(line: dict[str, Any], total: int) -> str:
    if "world" in line:
        return f"  from step {line['step']:,} on {line['world']} worker(s)"
    if "selection" in line:
        accuracy = "  ".join(f"{name} {value:.3f}" for name, value in line["accuracy"].items())
        return f"  held out at step {line['step']:,}: selection {line['selection']:.3f}   accuracy: {accuracy}"
    left = progress.duration((total - line["step"]) / max(line["steps_per_second"], 1e-9))
    terms = "  ".join(f"{name} {value:.4f}" for name, value in line["terms"].items())
    return (
        f"  step {line['step']:>6,} of {total:,}  {line['step'] / total:4.0%}  loss {line['loss']:.4f}  {terms}  "
        f"{line['sequences_per_second']:,.0f} texts/s  {line['tokens_per_second']:,.0f} tokens/s  {left} left"
    )


def _worker(config: dict[str, Any]) -> str | None:
    """What each training worker runs. A lone worker hands back what the user can mend, instead of failing and being
    started again; among several, the failure must reach the others."""
    import ray.train

    try:
        _train_here(config)
    except Refused as error:
        if ray.train.get_context().get_world_size() > 1:
            raise
        return json.dumps([type(error).__name__, str(error)])
    return None


def _train_here(config: dict[str, Any]) -> None:
    import ray.train
    import torch

    from xdist import track

    recipe = Recipe(**config["settings"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    meter = Meter(None, None)
    if rank == 0:
        meter = Meter(cluster.RemoteBoard(config["board"]), track.Metrics(config["tracking_uri"], config["run_id"], recipe.folder), world)

    def report(score: float, accuracy: dict[str, float], step_: int, save: Callable[[str], None]) -> None:
        """Every rank reports as often as every other; rank 0 brings the checkpoint, which is uploaded while training goes on."""
        if rank != 0:
            ray.train.report({"selection": score})
            return
        save(folder := tempfile.mkdtemp())  # Ray Train removes it when it is uploaded
        ray.train.report(
            {"selection": score, "step": step_},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    warned = False

    def warning() -> bool:
        """Whether a machine of ours was told that it will be taken away, and was not before."""
        nonlocal warned
        fresh = not warned and ray.train.get_preemption_info() is not None
        warned = warned or fresh
        return fresh

    resumed = ray.train.get_checkpoint()
    fit(recipe, report, meter, resumed.as_directory() if resumed else None, rank, world, warning)


def fit(
    recipe: Recipe,
    report: Callable[[float, dict[str, float], int, Callable[[str], None]], None],
    meter: "Meter",
    resumed: contextlib.AbstractContextManager[str] | None = None,
    rank: int = 0,
    world: int = 1,
    warning: Callable[[], bool] = lambda: False,
) -> None:
    """Train from the checkpoint in the folder that `resumed` gives, or from the start, to the end, in this process. At each
    checkpoint and evaluation `report` is called with the score (WORST where nothing was evaluated), the accuracies, the step, and
    a function that saves a checkpoint into a folder. `warning` is asked every `log_every` steps whether it is time for one more."""
    import torch

    from xdist import checkpoint, encoder

    torch.manual_seed(recipe.run.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = files.download(f"{recipe.folder}/initial", scratch)
        student = encoder.load(folder, recipe.train.precision, recipe.train.attention, recipe.teacher.trust_remote_code)
    freeze_unused(student)
    optimizer = make_optimizer(student, recipe, world)
    start = Position()
    if resumed:
        with resumed as folder:
            start = checkpoint.load(folder, student, optimizer)
    model = _parallel(student) if world > 1 else student
    order = shards.order(recipe)
    total = order.total_steps()
    judge = selection.Judge(recipe) if rank == 0 else None
    head = _head(recipe, student.device)

    remaining = itertools.islice(order.batches(start, rank, world), total - start.step)  # none where only the export is left
    with contextlib.closing(meter):
        meter.began(start.step)
        for position, micro_batches in remaining:
            learning_rate = schedule(position.step - 1, total, recipe.train.warmup_steps)
            last = position.step == total
            torch.manual_seed(recipe.run.seed + position.step)  # dropout, if there is any, is a function of the step as well
            watched = last or position.step % recipe.train.log_every == 0
            measured = step(model, student, optimizer, micro_batches, recipe.train, learning_rate, world, watched, head)
            meter.add(micro_batches)
            if watched:
                meter.log(position.step, measured, recipe.train.lr * learning_rate)
                refuse_collapse(measured, position.step, recipe.train)
            evaluating = last or position.step % recipe.train.evaluate_every == 0
            if evaluating or position.step % recipe.train.checkpoint_every == 0 or (watched and warning()):
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


def _parallel(student: Any) -> Any:
    import ray.train.torch

    return ray.train.torch.prepare_model(student, move_to_device=False)


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
    counts the same, however many workers share them out."""
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
            totals = {name: totals.get(name, 0.0) + float(found[name]) / len(micro_batches) for name in found}
    norm = optimizer.step(rate)
    if measure:
        totals["gradient_norm"] = float(norm)
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

    def log(self, step_: int, measured: dict[str, float], learning_rate: float) -> None:
        """Send the mean rates since the last call and the measures of this step."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rates = {
            "sequences_per_second": self.world * self.sequences / seconds,
            "tokens_per_second": self.world * self.tokens / seconds,
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
