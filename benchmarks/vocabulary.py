"""What a large vocabulary costs: the same steps with a table of 250,000 rows and with one of 30,000."""

from typing import Any

import torch

from benchmarks import floor
from benchmarks.measure import Measure, Options, in_turns, seconds
from xdist import encoder, shards, train
from xdist.batching import Position
from xdist.config import Recipe

LARGE, SMALL = 250_000, 30_000
STEPS = 5  # of one look, so that a look is long against a clock's tick


def step_times(options: Options, recipe: Recipe) -> Measure:
    """Milliseconds of a step, with real lengths and as many distinct tokens in both; the large table's are spread over all of it."""
    steps = [step for _, step in zip(range(options.size(2 * STEPS, 2)), _steps(recipe), strict=False)]
    sides = {rows: _stepper(recipe, rows, steps) for rows in (LARGE, SMALL)}
    for side in sides.values():
        side()
    found = in_turns({str(rows): side for rows, side in sides.items()}, options.repeats)
    return Measure(f"step with {LARGE:,} rows", "ms", found[str(LARGE)], found[str(SMALL)], f"{SMALL:,} rows", less=True)


def _steps(recipe: Recipe) -> Any:
    for _, step in shards.order(recipe).batches(Position()):
        yield step


def _stepper(recipe: Recipe, rows: int, steps: list[list[shards.Batch]]) -> Any:
    """A function that takes all steps and gives the milliseconds of one."""
    student = encoder.load(f"{recipe.folder}/initial", recipe.train.precision, recipe.train.attention)
    table = student.body.get_input_embeddings()
    spread = max(1, rows // table.num_embeddings)
    large = torch.nn.Embedding(rows, table.embedding_dim).to(student.device)
    student.body.set_input_embeddings(large)
    train.freeze_unused(student)
    optimizer = train.make_optimizer(student, recipe)
    moved = [[batch._replace(ids=(batch.ids * spread) % rows) for batch in step] for step in steps]

    def run() -> float:
        def all_steps() -> None:
            for step in moved:
                train.step(student, student, optimizer, step, recipe.train, 1e-6, 1, False)
            floor.settle()

        return 1000 * seconds(all_steps) / len(moved)

    return run
