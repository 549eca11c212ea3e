"""Which pairs are kept: the filters of prepare in their order, and the keys that keep evaluation text out of training.

Pure apart from `write_keys` and `read_keys`, which put the evaluation sets' keys where every task of prepare finds them:

    <folder>/parts/evaluation_texts.npy     match keys, sorted
    <folder>/parts/evaluation_ids.json      ids by evaluation task
"""

import functools
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xdist import files, tasks, text
from xdist.config import Corpus, Data, Recipe
from xdist.errors import Refused

LEAST_SENTENCE = 30  # characters; a shorter sentence inside an evaluation text may occur anywhere
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？।])\s*")
LEAST_IDENTIFIABLE = 20  # characters; the language of a shorter text cannot be told

Failed = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Keys:
    """What evaluation sets hold: match keys of their texts (sorted, uint64), and their ids by task."""

    texts: np.ndarray
    ids: dict[str, list[str]]


def evaluation_keys(recipe: Recipe) -> Keys:
    """Keys of all dev and test rows of the recipe's tasks; none where evaluate.decontaminate is off."""
    keys: list[np.ndarray] = [np.empty(0, np.uint64)]
    ids: dict[str, set[str]] = {}
    for task, rows in tasks.held_out(recipe) if recipe.evaluate.decontaminate else ():
        texts = [found for role in ("text", "text2") for found in rows.get(role, ())]
        keys.append(text.match_keys(text.clean(pa.array([*texts, *_sentences(texts)], pa.string()))))
        ids.setdefault(task.name, set()).update(rows.get("id", ()))
    return Keys(np.unique(np.concatenate(keys)), {name: sorted(found) for name, found in ids.items()})


def _sentences(texts: list[str]) -> Iterator[str]:
    """Sentences of texts that hold several: a case report's sentences are found in a corpus of sentences. Short ones are
    nobody's text in particular ("She was discharged.") and stay out."""
    for found in texts:
        pieces = _SENTENCE_END.split(found)
        if len(pieces) > 1:
            yield from (piece for piece in pieces if len(piece) >= LEAST_SENTENCE)


def write_keys(folder: str, keys: Keys) -> None:
    """Keep the keys in a run's folder."""
    buffer = io.BytesIO()
    np.save(buffer, keys.texts)
    files.write(f"{folder}/parts/evaluation_texts.npy", buffer.getvalue())
    files.write_json(f"{folder}/parts/evaluation_ids.json", keys.ids)


def read_keys(folder: str) -> Keys:
    """What `write_keys` wrote in a run's folder."""
    texts = np.load(io.BytesIO(files.read(f"{folder}/parts/evaluation_texts.npy")), allow_pickle=False)
    return Keys(texts, files.read_json(f"{folder}/parts/evaluation_ids.json"))


def reasons(source: pa.Array, target: pa.Array, ids: pa.Array | None, lang: str, corpus: Corpus, data: Data, keys: Keys) -> pa.Array:
    """Why each pair of cleaned texts is dropped (the first reason that applies), null where it is kept."""
    codes = np.zeros(len(source), np.int8)
    names: list[str | None] = [None]
    for reason, failed in _filters(source, target, ids, lang, corpus, data, keys):
        names.append(reason)
        left = np.flatnonzero(codes == 0)
        codes[left[failed(left)]] = len(names) - 1
    return pa.array(names, pa.string()).take(pa.array(codes))


def _filters(
    source: pa.Array, target: pa.Array, ids: pa.Array | None, lang: str, corpus: Corpus, data: Data, keys: Keys
) -> Iterator[tuple[str, Failed]]:
    """(reason, which of the given row indices fail), in the order in which a row's one reason is decided."""
    lengths = [pc.utf8_length(side).to_numpy() for side in (source, target)]
    shorter, longer = np.minimum(*lengths), np.maximum(*lengths)
    yield "empty", lambda rows: shorter[rows] == 0
    yield "identical", lambda rows: pc.equal(source, target).to_numpy(zero_copy_only=False)[rows]
    yield "too_short", lambda rows: shorter[rows] < data.min_chars
    yield "too_long", lambda rows: longer[rows] > data.max_chars
    yield "length_ratio", lambda rows: (longer[rows] + 8) > data.max_length_ratio * (shorter[rows] + 8)
    if ids is not None and corpus.shares_ids_with:
        held_out = pa.array(sorted({name for task in corpus.shares_ids_with for name in keys.ids.get(task, [])}), pa.string())
        yield "evaluation_id", lambda rows: pc.is_in(ids, value_set=held_out).to_numpy(zero_copy_only=False)[rows]
    if len(keys.texts):
        for side in (source, target):
            yield "evaluation_text", functools.partial(_held_out, side, keys.texts)
    if data.detect_language:
        for side, expected in ((source, data.source_language), (target, lang)):
            yield "wrong_language", functools.partial(_foreign, side, expected, data)


def _held_out(side: pa.Array, ordered: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which of these rows have a match key that occurs in a sorted, non-empty array."""
    found = text.match_keys(side.take(pa.array(rows)))
    return ordered[np.searchsorted(ordered, found).clip(max=len(ordered) - 1)] == found


def _foreign(side: pa.Array, expected: str, data: Data, rows: np.ndarray) -> np.ndarray:
    """Which of these rows are in another language of the recipe. Short texts are let through: they cannot be told apart."""
    foreign = np.zeros(len(rows), dtype=bool)
    texts = side.take(pa.array(rows))
    long = np.flatnonzero(pc.utf8_length(texts).to_numpy() >= LEAST_IDENTIFIABLE)
    found = detector(data).detect_languages_in_parallel_of(texts.take(pa.array(long)).to_pylist())
    names = [language.iso_code_639_1.name.lower() if language else "" for language in found]
    foreign[long] = [name not in ("", expected.split("-")[0].lower()) for name in names]
    return foreign


def detector(data: Data) -> Any:
    """The language detector for the recipe's languages. Raises Refused without lingua, or for a language it does not know."""
    return _detector((data.source_language, *data.languages))


@functools.lru_cache(maxsize=1)
def _detector(languages: tuple[str, ...]) -> Any:
    try:
        from lingua import IsoCode639_1, LanguageDetectorBuilder
    except ImportError:
        raise Refused("data.detect_language needs lingua; install it with: pip install 'xdist-ray[langid]'") from None
    codes = []
    for language in languages:
        code = getattr(IsoCode639_1, language.split("-")[0].upper(), None)
        if code is None:
            raise Refused(f"data.detect_language: lingua does not know the language {language!r}; turn it off")
        codes.append(code)
    return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()
