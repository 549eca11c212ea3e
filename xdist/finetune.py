"""Fine-tune the teacher on a labelled task in the source language: its task knowledge is then in the vectors that it teaches.

The second stage of Piperno et al. 2025 (10.1016/j.knosys.2025.113079). Writes <storage>/teachers/<digest>/, a sentence-transformers
folder, and is done when that is there. The order of sentences is a function of the seed, so a run that was killed here begins this
stage anew and, on a CPU, ends in the same teacher.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from xdist import batching, cluster, encoder, files, metrics, tasks, weights
from xdist.config import Finetune, Recipe
from xdist.encoder import Encoder
from xdist.progress import Progress

TEMPERATURE = 0.1  # of the contrastive loss
HEAD_RATE = 10  # the head's learning rate over the layers'


def teacher_folder(recipe: Recipe) -> str:
    """A local folder with the teacher that teaches: the recipe's, or the fine-tuned one, which is there by then."""
    return files.local(place(recipe)) if recipe.finetune.task else weights.located(recipe.teacher)


def place(recipe: Recipe) -> str:
    """Where the fine-tuned teacher is kept: once for all runs and trials that ask for the same one."""
    rows = _rows(recipe)
    settings = [recipe.teacher.model_dump(), recipe.finetune.model_dump(), recipe.run.seed]
    asked = [*settings, recipe.train.clip, recipe.train.precision, recipe.train.attention, rows["text"], rows["label"]]
    return f"{recipe.run.storage}/teachers/{xxhash.xxh3_64_hexdigest(json.dumps(asked).encode())}"


def _rows(recipe: Recipe) -> tasks.Rows:
    task = next(task for task in recipe.evaluate.tasks if task.name == recipe.finetune.task)
    return tasks.read(recipe, task, "train", recipe.data.source_language)


def load(recipe: Recipe, folder: str = "") -> Encoder:
    """The teacher that teaches, or another one that lies in `folder`, as an encoder."""
    folder = folder or teacher_folder(recipe)
    return encoder.load(folder, recipe.train.precision, recipe.train.attention, recipe.teacher.trust_remote_code, recipe.teacher.prompt)


def finetune(recipe: Recipe) -> None:
    """Make the fine-tuned teacher, where the recipe asks for one and it is not there. Needs a connected Ray."""
    if not recipe.finetune.task or files.exists(f"{place(recipe)}/modules.json"):
        return
    cpus, gpus = cluster.resources(recipe.cluster)
    cluster.await_room(recipe.cluster, 1, cpus, gpus, "finetune")
    arguments: dict[str, Any] = {"settings": recipe.model_dump(mode="json"), "threads": 0 if gpus else cpus}
    with Progress("finetune", "sentences", len(_rows(recipe)["text"]) * recipe.finetune.epochs) as progress:
        for _ in cluster.stream([{}], _make, progress, cpus=cpus, gpus=gpus, **arguments):
            pass


def _make(item: cluster.Item, board: cluster.RemoteBoard, settings: dict[str, Any], threads: int) -> cluster.Item:
    """Fine-tune the recipe's teacher and keep it, in a process of the cluster."""
    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(**settings)
    teacher = load(recipe, weights.located(recipe.teacher))
    rows, longest = _rows(recipe), recipe.teacher.max_length
    start = metrics.fit_chosen_head(teacher.encode(rows["text"], max_length=longest), rows["label"])
    seen = functools.partial(board.count, "sentences")
    learn(teacher, rows["text"], rows["label"], start, recipe.finetune, recipe.run.seed, recipe.train.clip, longest, seen)
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.join(scratch, "teacher")
        teacher.model.save(folder, create_model_card=False)
        files.upload(folder, place(recipe), last="modules.json")
    return item


def learn(
    found: Encoder,
    texts: list[str],
    labels: list[str],
    start: metrics.Head,
    settings: Finetune,
    seed: int,
    clip: float,
    longest: int,
    seen: Callable[[int], None] = lambda _: None,
) -> metrics.Head:
    """Fine-tune an encoder in place; gives its head, which the contrastive method leaves as it was. `start` is a logistic regression
    on the vectors as they are, so that the first steps do not throw away what the encoder knows (linear probing, then fine-tuning:
    2202.10054). `seen` hears of how many texts."""
    truth = torch.tensor([start.classes.index(label) for label in labels], device=found.device)
    matrix, bias = (torch.tensor(part, device=found.device, requires_grad=True) for part in (start.weights, start.bias))
    ids = [np.asarray(row) for row in found.tokenize(texts, longest)]
    body = [parameter for parameter in found.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": body}, {"params": [matrix, bias], "lr": settings.lr * HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    steps = _batches(len(ids), settings.batch_size, settings.epochs, seed)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    torch.manual_seed(seed)
    found.train()
    done = 0
    for picked in steps:
        shape = batching.few_shapes([len(ids[row]) for row in picked], longest)
        padded = batching.padded([ids[row] for row in picked], found.model.tokenizer.pad_token_id or 0, shape)
        vectors = found(*(torch.from_numpy(array).to(found.device) for array in padded))[: len(picked)]
        wanted = truth[torch.from_numpy(picked).to(found.device)]
        loss = cross_entropy(linear(vectors, matrix, bias), wanted) if settings.method == "head" else contrastive(vectors, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(body, clip)
        optimizer.step()
        decay.step()
        seen(done := done + len(picked))
    found.eval()
    return metrics.Head(matrix.detach().cpu().numpy(), bias.detach().cpu().numpy(), start.classes)


def _batches(count: int, size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each step: every row once an epoch, in random order."""
    orders = [batching.generator(seed, "finetune", epoch).permutation(count) for epoch in range(epochs)]
    return [part for order in orders for part in np.array_split(order, max(1, round(count / size)))]


def contrastive(vectors: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss (2004.11362, "out"): sentences of one class against all others in the batch. Sentences whose class
    occurs once in the batch have nothing to be near to, and do not count."""
    logits = (vectors @ vectors.T / TEMPERATURE).masked_fill(torch.eye(len(vectors), dtype=torch.bool, device=vectors.device), -torch.inf)
    same = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    counted = same.any(1)
    likelihood = torch.log_softmax(logits, 1).masked_fill(~same, 0).sum(1)[counted] / same.sum(1)[counted]
    return -likelihood.mean() if counted.any() else vectors.sum() * 0
