"""Launch: `train` on Ray Train's workers, one or many, until the run's training has ended, whatever dies meanwhile.

Writes <run>/checkpoints/ (newest and best).
"""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from xdist import cluster, files, progress, shards
from xdist.config import Recipe
from xdist.errors import Collapsed, Refused
from xdist.progress import say
from xdist.train import Meter, Place, fit

RETRIES = 3  # starts of the workers, one after the other, that come to no new checkpoint
NOTES, KEPT_NOTES = "checkpoint_manager_snapshot.json", "notes.json"  # Ray Train's, and our copy: it does not write its own atomically
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
            _mend_notes(f"{recipe.folder}/checkpoints")
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


def _mend_notes(folder: str) -> None:
    """Make right what a kill left: Ray Train goes by the notes that it makes of whole checkpoints. Where it was killed while it wrote
    them, our copy has those before; checkpoints that they do not name were being uploaded, and are removed."""
    notes, kept = f"{folder}/{NOTES}", f"{folder}/{KEPT_NOTES}"
    try:
        state = files.read_json(notes)
    except (FileNotFoundError, Refused):
        files.remove(notes)
        state = files.read_json(kept) if files.exists(kept) else {}
        if state:
            files.write_json(notes, state)
    if state:
        files.write_json(kept, state)  # Ray Train may have noted more before it was killed
    elif files.folders(folder):
        say("train     no whole checkpoint was noted; training begins at its first step")
    noted = [entry["checkpoint_dir_name"] for key in ("checkpoint_results", "pending_training_results") for entry in state.get(key, [])]
    for name in files.folders(folder):
        if name.startswith("checkpoint_") and name not in noted:
            files.remove(f"{folder}/{name}")


def _trainer(recipe: Recipe, given: dict[str, Any], cpus: int, gpus: float) -> Any:
    """Ray Train's trainer of the run; where the run has a checkpoint, it goes on from there."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class KeepNotes(UserCallback):
        """Copies Ray Train's notes whenever it has written them."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if checkpoint:
                files.write(f"{recipe.folder}/checkpoints/{KEPT_NOTES}", files.read(f"{recipe.folder}/checkpoints/{NOTES}"))

    worker: Any = _worker
    scaling: Any = ScalingConfig  # the types that Ray gives it are those of its older version
    least, most = recipe.cluster.workers
    storage, path = files.resolve(recipe.folder)
    callbacks: Any = [KeepNotes()]
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
            storage_path=path,
            storage_filesystem=storage,
            callbacks=callbacks,
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
    started again; among several, the failure must reach the others, unless all see the same: that the student collapsed."""
    import ray.train

    try:
        _train_here(config)
    except Refused as error:
        if ray.train.get_context().get_world_size() > 1 and not isinstance(error, Collapsed):
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
        meter = Meter(config["board"], track.Metrics(config["tracking_uri"], config["run_id"], recipe.folder), world)

    def report(score: float, accuracy: dict[str, float], step_: int, save: Callable[[str], None]) -> None:
        """Every rank reports as often as every other; rank 0 brings the checkpoint, which is uploaded while training goes on."""
        if rank != 0:
            ray.train.report({"selection": score})
            return
        meter.keep()  # a run that goes on from this checkpoint has the numbers before it
        save(folder := tempfile.mkdtemp())  # Ray Train removes it when it is uploaded
        ray.train.report(
            {"selection": score, "step": step_},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    known: set[str] = set()

    def warned() -> bool:
        """Whether a machine of ours was told that it will be taken away, and was not before."""
        announced = ray.train.get_preemption_info()
        fresh = set(announced.preempted_node_ids) - known if announced else set()
        known.update(fresh)
        return bool(fresh)

    resumed = ray.train.get_checkpoint()
    fit(recipe, report, meter, resumed.as_directory() if resumed else None, Place(rank, world, _parallel, _summed, warned))


def _summed(numbers: list[float]) -> list[float]:
    import ray.train.torch
    import torch

    if not torch.distributed.is_initialized():
        return numbers
    together = torch.tensor(numbers, dtype=torch.float32, device=ray.train.torch.get_device())
    torch.distributed.all_reduce(together)
    return together.tolist()


def _parallel(student: Any) -> Any:
    import ray.train.torch

    return ray.train.torch.prepare_model(student, move_to_device=False)
