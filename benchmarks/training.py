"""Training: xdist's steps beside SentenceTransformerTrainer with MSELoss, on the same student, pairs and teacher's vectors, by
speed and by what the students can do after as many texts and after as many seconds; and the price of a large vocabulary.

    python -m benchmarks.training RECIPE     the bare loop of a prepared run in a process of its own: tokens/s
"""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import floor, peer, ready, texts, vocabulary
from benchmarks.measure import Measure, Options, in_turns
from benchmarks.peer import Clock
from xdist import encoder, metrics, recipes, shards, train
from xdist.batching import Position
from xdist.config import Recipe


def measures(options: Options) -> Iterator[Measure]:
    """Texts per second, retrieval in per cent, seconds, and milliseconds of a step."""
    recipe = ready.recipe(options, "training", train={"steps": options.size(60, 3), "log_every": options.size(10, 1)})
    prepared, fingerprint = ready.make(recipe)
    initial = f"{recipe.folder}/initial"
    if importlib.util.find_spec("accelerate") is None:
        yield Measure("training", "texts/s", [ours(recipe)[1].rates()[0] for _ in range(options.repeats)], note=peer.MISSING)
    else:
        pairs = peer.write_pairs(recipe, prepared, fingerprint)
        steps = options.size(5, 2)
        sides = {
            "ours": lambda: ours(recipe)[1].rates()[0],
            "float32": lambda: peer.train(initial, pairs, steps, "float32").rate,
            "bf16": lambda: peer.train(initial, pairs, steps, "bf16").rate,
            "floor": lambda: floor_rate(recipe),
        }
        rates = in_turns(sides, options.repeats)
        for precision in ("float32", "bf16"):
            against = f"SentenceTransformerTrainer, MSELoss, {precision}"
            yield Measure(f"training, {precision} peer", "texts/s", rates["ours"], rates[precision], against)
        yield Measure("training, floor", "texts/s", rates["ours"], rates["floor"], "matrix products alone, three times those of encoding")
        yield from _quality(options, recipe, pairs, max(("float32", "bf16"), key=lambda precision: max(rates[precision])))
    yield vocabulary.step_times(options, recipe)


def ours(recipe: Recipe) -> tuple[Any, Clock]:
    """The student of a run's folder after all its steps, in the order and with the step of `xdist.train`, and its clock."""
    import torch

    torch.manual_seed(recipe.run.seed)
    student = encoder.load(f"{recipe.folder}/initial", recipe.train.precision, recipe.train.attention)
    train.freeze_unused(student)
    optimizer = train.make_optimizer(student, recipe)
    order = shards.order(recipe)
    total, clock = order.total_steps(), Clock()
    for position, batches in itertools.islice(order.batches(Position()), total):
        rate = train.schedule(position.step - 1, total, recipe.train.warmup_steps)
        train.step(student, student, optimizer, batches, recipe.train, rate, 1, position.step % recipe.train.log_every == 0)
        clock.add(sum(len(batch.vectors) for batch in batches), sum(int(batch.mask[: len(batch.vectors)].sum()) for batch in batches))
    return student.model, clock


def floor_rate(recipe: Recipe) -> float:
    """Texts per second if there were nothing but the matrix products of forward and backward."""
    student = encoder.load(f"{recipe.folder}/initial", recipe.train.precision, recipe.train.attention)
    batches = (batch for _, step in itertools.islice(shards.order(recipe).batches(Position()), recipe.train.steps) for batch in step)
    lengths = np.concatenate([batch.mask[: len(batch.vectors)].sum(1) for batch in batches])
    rate = floor.matmul_rate(student.body.config, student.dtype, student.device)
    return len(lengths) * rate / (3 * floor.operations(student.body.config, lengths.tolist()))


def _quality(options: Options, recipe: Recipe, pairs: str, precision: str) -> Iterator[Measure]:
    """The peer's better setting for some thousand texts; ours for as many texts, and for as many seconds."""
    rows = texts.rows("sentences", "test")[: options.size(10_000, 20)]
    before = encoder.sentence_transformer(f"{recipe.folder}/initial", "eager")
    peers = peer.train(f"{recipe.folder}/initial", pairs, options.size(32, 2), precision, out := f"{recipe.folder}/peer")
    theirs = retrieval(encoder.sentence_transformer(out, "eager"), rows)
    about = f"{peers.texts:,} texts; before training {retrieval(before, rows):.1f}"
    _, pace = ours(recipe)
    same_texts, texts_clock = ours(_with_steps(recipe, peers.texts / pace.sequences))
    same_seconds, seconds_clock = ours(_with_steps(recipe, peers.seconds / pace.seconds))
    against = f"SentenceTransformerTrainer, MSELoss, {precision}"
    about_ours = f"{about}; ours {texts_clock.sequences:,} texts"
    yield Measure("training, retrieval after equal texts", "%", [retrieval(same_texts, rows)], [theirs], against, note=about_ours)
    yield Measure("training, seconds of equal texts", "s", [texts_clock.seconds], [peers.seconds], against, less=True)
    about_ours = f"{peers.seconds:.0f} s, {about}; ours {seconds_clock.seconds:.0f} s, {seconds_clock.sequences:,} texts"
    yield Measure("training, retrieval after equal seconds", "%", [retrieval(same_seconds, rows)], [theirs], against, note=about_ours)


def _with_steps(recipe: Recipe, times: float) -> Recipe:
    steps = max(1, round(times * (recipe.train.steps or 1)))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def retrieval(model: Any, rows: list[dict[str, str]]) -> float:
    """Per cent of sentences whose nearest neighbour is their translation, from English and to English, over all languages."""
    vectors = {lang: model.encode([row[lang] for row in rows], normalize_embeddings=True) for lang in texts.LANGUAGES}
    english, *others = vectors.values()
    return 100 * float(np.mean([metrics.retrieved(english, other) for other in others]))


if __name__ == "__main__":
    settings = recipes.load(sys.argv[1])
    print(ours(settings)[1].rates(settings.train.log_every)[1])
