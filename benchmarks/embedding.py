"""Embedding: xdist's encoder beside SentenceTransformer.encode on the same texts of 35 tokens on average, beside the floor that
this machine's matrix products set, and on a corpus in which every sentence comes three times."""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import floor, ready, texts
from benchmarks.measure import Measure, Options, in_turns, rate, seconds
from xdist import encoder, text, weights
from xdist.encoder import Encoder
from xdist.store import Fingerprint, VectorStore

BATCH_SIZES = (8, 16, 32, 64, 128, 256)
BACKENDS = {"onnx": ("onnxruntime", "optimum"), "openvino": ("openvino", "optimum")}  # and the packages that each needs
LANGUAGES = 3  # in which a sentence of the repeating corpus has a translation


def measures(options: Options) -> Iterator[Measure]:
    """Texts per second."""
    teacher = ready.recipe(options, "embedding").teacher
    folder = weights.located(teacher)
    ours = encoder.load(folder)
    found = texts.clinical(lambda some: [len(row) for row in ours.tokenize(some)], options.size(10_000, 64))
    lengths = [len(row) for row in ours.tokenize(found)]
    plain, best = _peer(folder), _peer(folder, ours.device, bf16=True)
    size = _best_size(best, found[: options.size(512, 16)])
    backends = {name: _backend(folder, name) for name in BACKENDS}
    sides: dict[str, Callable[[], float]] = {
        "ours": rate(len(found), partial(ours.encode, found)),
        "plain": rate(len(found), partial(plain.encode, found)),
        "best": rate(len(found), partial(best.encode, found, batch_size=size)),
        "floor": partial(_floor_rate, ours, lengths),
    }
    sides |= {name: rate(len(found), partial(model.encode, found)) for name, model in backends.items() if not isinstance(model, str)}
    in_turns(sides, 1)  # first calls compile kernels and fill caches
    rates = in_turns(sides, options.repeats)
    about = f"{len(found):,} texts of {np.mean(lengths):.1f} tokens on average; {str(ours.dtype).removeprefix('torch.')}, {ours.kernels}"
    wanted, given = plain.encode(found, normalize_embeddings=True), ours.encode(found)
    about += f"; least cosine to float32 {(wanted * given).sum(1).min():.5f}"
    yield Measure("embedding", "texts/s", rates["ours"], rates["plain"], "SentenceTransformer.encode, default", note=about)
    yield Measure("embedding, bf16 peer", "texts/s", rates["ours"], rates["best"], f"SentenceTransformer.encode, bf16, batches of {size}")
    for name, model in backends.items():
        against = f"SentenceTransformer.encode, {name}"
        missing = isinstance(model, str)
        yield Measure(f"embedding, {name}", "texts/s", rates["ours"], rates.get(name, ()), against, note=model if missing else "")
    yield Measure("embedding, floor", "texts/s", rates["ours"], rates["floor"], "matrix products alone, at their measured rate")
    yield _repeating(options, ours, weights.fingerprint(teacher, folder, ours.dimension), plain, found[: options.size(600, 16)])


def _peer(folder: str, device: str | None = None, bf16: bool = False, **more: Any) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    given: Any = more | ({"model_kwargs": {"dtype": torch.bfloat16}} if bf16 else {})
    return SentenceTransformer(folder, device=device, local_files_only=True, **given)


def _best_size(model: Any, some: Sequence[str]) -> int:
    """The batch size at which the peer is fastest."""
    for size in BATCH_SIZES:
        model.encode(some, batch_size=size)
    return min(BATCH_SIZES, key=lambda size: seconds(lambda: model.encode(some, batch_size=size)))


def _backend(folder: str, name: str) -> Any:
    """The peer's model on another engine, or in words why there is none."""
    absent = [package for package in BACKENDS[name] if importlib.util.find_spec(package) is None]
    if absent:
        return f"not measured: {' and '.join(absent)} not installed"
    try:
        return _peer(folder, backend=name)
    except Exception as error:  # export and engine fail in ways of their own
        return f"not measured: {type(error).__name__}: {str(error).split(' (')[0][:120]}"


def _floor_rate(ours: Encoder, lengths: Sequence[int]) -> float:
    """Texts per second if there were nothing but the matrix products of their real tokens."""
    speed = floor.matmul_rate(ours.body.config, ours.dtype, ours.device)
    return len(lengths) * speed / floor.operations(ours.body.config, lengths)


def _repeating(options: Options, ours: Encoder, fingerprint: Fingerprint, plain: Any, sentences: list[str]) -> Measure:
    """A corpus of pairs, whose English sentences come once with each language: the store embeds each once, the peer every row."""
    corpus = sentences * LANGUAGES
    sides = {
        "ours": rate(len(corpus), partial(stored, ours, fingerprint, corpus, str(options.folder))),
        "peer": rate(len(corpus), partial(plain.encode, corpus)),
    }
    rates = in_turns(sides, options.repeats)
    about = f"{len(corpus):,} rows, {len(sentences):,} distinct sentences; the store is written and read"
    return Measure("embedding, repeating", "rows/s", rates["ours"], rates["peer"], "SentenceTransformer.encode, default", note=about)


def stored(ours: Encoder, fingerprint: Fingerprint, corpus: Sequence[str], folder: str) -> np.ndarray:
    """Vectors of all rows, float16 (n, dimension), by way of an empty store: hashed, embedded where missing, written, read."""
    with tempfile.TemporaryDirectory(dir=folder) as storage:
        store, hashes = VectorStore(storage, fingerprint), text.text_hashes(corpus)
        known, first = np.unique(hashes, return_index=True)
        missing = store.missing(1, 0, known)
        store.write(1, 0, known[missing], ours.encode([corpus[first[index]] for index in missing]))
        return store.vectors(1, 0, hashes)
