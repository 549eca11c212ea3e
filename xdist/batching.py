"""Which sequences meet in which batch: pure functions, the same on every worker and after every restart.

The order of training is a function of (seed, epoch, step) alone. An epoch shuffles the shards and cuts them into
windows; a window's sequences are sampled, shuffled, sorted by length within stretches of a few hundred thousand tokens,
and cut into micro-batches of equal token counts. The number of steps of a window follows from the shards' token counts
in the manifest, so a schedule is known, and a resume finds its place, without reading a shard.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

SORTED_STRETCH = 64  # micro-batches sorted by length together: hardly any padding, and still a mixed order


@dataclass(frozen=True)
class Position:
    """Where training stands: the next step to take. `batch` counts the window's steps that are done."""

    epoch: int = 0
    window: int = 0
    batch: int = 0
    step: int = 0


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on the key alone."""
    return np.random.Generator(np.random.Philox(key=xxhash.xxh3_64_intdigest("/".join(map(str, key)).encode())))


def token_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Indices in batches of similar length, longest first; sequences × longest ≤ budget (one sequence at least)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def windows(shards: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """The epoch's shards in random order, `size` at a time."""
    order = generator(seed, epoch, "shards").permutation(shards).tolist()
    return [order[start : start + size] for start in range(0, shards, size)]


def language_weights(counts: Mapping[str, float], temperature: float, source: str, source_weight: float) -> dict[str, float]:
    """How often a sequence of each language is seen per epoch: shares of translations ∝ count ** (1 / temperature).

    The number of translations seen per epoch stays what it is; source sentences are seen `source_weight` times.
    """
    sizes = {lang: count for lang, count in counts.items() if lang != source and count > 0}
    raised = {lang: count ** (1 / temperature) for lang, count in sizes.items()}
    scale = sum(sizes.values()) / max(sum(raised.values()), 1e-9)
    return {source: source_weight} | {lang: scale * raised[lang] / sizes[lang] for lang in sizes}


def window_steps(tokens: float, batch_tokens: int) -> int:
    """Steps of a window with this many tokens expected to be drawn: at least one, none where there is nothing to draw."""
    return max(1, round(tokens / batch_tokens)) if tokens else 0


def draw(weights: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """Indices of the sequences that a window shows, in random order: index i stands there weights[i] times on average,
    ⌊weights[i]⌋ times at least. Where any weight is above 0, at least one index is drawn."""
    rng = generator(seed, epoch, window, "draw")
    whole = np.floor(weights)
    times = whole.astype(np.int64) + (rng.random(len(weights)) < weights - whole)
    if not times.any() and weights.any():
        times[np.argmax(weights)] = 1
    drawn = np.repeat(np.arange(len(weights)), times)
    return rng.permutation(drawn)


def cut(
    drawn: np.ndarray, lengths: np.ndarray, steps: int, micro_batches: int, seed: int, epoch: int, window: int
) -> list[list[np.ndarray]]:
    """Drawn indices as `steps` lists of `micro_batches` arrays of about equal token counts and similar lengths.

    Every drawn index stands in exactly one micro-batch (more than one only where there are fewer than micro-batches).
    """
    total = steps * micro_batches
    if not total:
        return []
    drawn = np.resize(drawn, max(len(drawn), total))
    ends = np.linspace(0, total, max(1, round(total / SORTED_STRETCH)) + 1).round().astype(int)
    bounds = _equal_cuts(lengths[drawn], total)
    batches: list[np.ndarray] = []
    for first, last in itertools.pairwise(ends):
        stretch = drawn[bounds[first] : bounds[last]]
        stretch = stretch[np.argsort(lengths[stretch], kind="stable")]
        inner = _equal_cuts(lengths[stretch], int(last - first))
        batches += [stretch[a:b] for a, b in itertools.pairwise(inner)]
    order = generator(seed, epoch, window, "batches").permutation(total)
    shuffled = [batches[index] for index in order]
    return [shuffled[step * micro_batches : (step + 1) * micro_batches] for step in range(steps)]


def _equal_cuts(lengths: np.ndarray, parts: int) -> np.ndarray:
    """Bounds, shape (parts + 1,), that cut a list of at least `parts` entries into non-empty parts of about equal sums."""
    ends, place = np.cumsum(lengths), np.arange(parts + 1)
    bounds = np.searchsorted(ends, np.linspace(0, ends[-1], parts + 1), side="left")
    bounds = np.maximum.accumulate(bounds - place) + place
    bounds = np.minimum(bounds, len(lengths) - parts + place)
    bounds[0], bounds[-1] = 0, len(lengths)
    return bounds


def rounded(size: int) -> int:
    """The next multiple of a sixteenth of the power of two above `size`: up to 16 as it is, then at most an eighth more."""
    grain = max(1, (1 << (size - 1).bit_length()) // 16)
    return -(-size // grain) * grain


def few_shapes(lengths: Sequence[int], longest: int) -> tuple[int, int]:
    """A batch's (rows, columns), both rounded up; `longest` is the most tokens that a row can have. So a training meets few
    shapes: for each new one a CPU's matrix library compiles kernels, which costs a quarter of a step's time, and keeps them."""
    return rounded(len(lengths)), min(rounded(max(1, *lengths)), longest)


def padded(rows: Sequence[np.ndarray], pad: int, least: tuple[int, int] = (0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Token id arrays as one int64 array and its attention mask: (n, length of the longest row), or `least` where that is
    more. Rows of one padding token fill it up."""
    count, length = max(len(rows), least[0]), max(1, least[1], *map(len, rows))
    ids = np.full((count, length), pad, dtype=np.int64)
    mask = np.zeros((count, length), dtype=np.int64)
    mask[len(rows) :, 0] = 1
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return ids, mask
