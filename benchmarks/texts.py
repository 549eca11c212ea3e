"""Text to measure on: the demo's own sentences, joined where they are short, and generated corpora of any size."""

import csv
import gzip
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machine import ROOT

DEMO = ROOT / "recipes" / "demo"
LANGUAGES = ("en", "es", "fr", "de")
MEAN_TOKENS = 35.0


def rows(name: str, split: str | None = None) -> list[dict[str, str]]:
    """Rows of one of the demo's TSV files, or of one split of it."""
    with open(DEMO / f"{name}.tsv", encoding="utf-8", newline="") as stream:
        found = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row for row in found if split is None or row["split"] == split]


def joined(lengths: Sequence[int], mean: float = MEAN_TOKENS, specials: int = 2) -> list[list[int]]:
    """Indices of neighbouring sentences, in order, that make one text each: two where the texts so far have fewer than `mean`
    tokens on average, one otherwise. `lengths` count `specials` tokens of a text that a joined one has once."""
    groups: list[list[int]] = []
    total = place = 0
    while place < len(lengths):
        count = 2 if total < mean * len(groups) else 1
        group = list(range(place, min(place + count, len(lengths))))
        total += sum(lengths[index] for index in group) - specials * (len(group) - 1)
        groups.append(group)
        place += count
    return groups


def clinical(lengths_of: Callable[[list[str]], list[int]], count: int) -> list[str]:
    """English sentences of the demo, as many as `count` at most, joined to MEAN_TOKENS on average."""
    sentences = [row["en"] for row in rows("sentences")]
    groups = joined(lengths_of(sentences))[:count]
    return [" ".join(sentences[index] for index in group) for group in groups]


def many(count: int) -> list[str]:
    """Distinct English texts: a sentence of the demo and an everyday word or sentence each, about 34 tokens of MiniLM on average."""
    first, second = ([row["en"] for row in rows(name)] for name in ("sentences", "everyday"))
    return list(dict.fromkeys(f"{first[n % len(first)]} {second[n % len(second)]}" for n in range(count)))


def generated(folder: Path, pairs: int, files: int = 4) -> None:
    """Random sentences of 5 to 25 syllable words and their mirror images, as TSV.gz."""
    rng = random.Random(0)
    words = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(20_000)]
    mirrored = {word: word[::-1] for word in words}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        with gzip.open(folder / f"part{number}.tsv.gz", "wt", compresslevel=1, encoding="utf-8") as stream:
            stream.write("source\ttarget\n")
            for _ in range(pairs // files):
                picked = rng.choices(words, k=rng.randint(5, 25))
                stream.write(f"{' '.join(picked)}\t{' '.join(mirrored[word] for word in picked)}\n")
