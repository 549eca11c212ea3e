"""Vocabularies for students: trim one to the corpus, extend the teacher's to new languages, or train a new one.

A tokenizer is handled as its `tokenizers` JSON, so WordPiece, Unigram and BPE checkpoints are served alike. Each function
gives the new tokenizer and, for each new token id, the rows of the old embedding table that it starts from.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from xdist.errors import Refused

Alignment = dict[int, dict[int, float]]


@dataclass
class Vocabulary:
    """A tokenizer and, where it keeps a token of the old one, that token's old id (-1 for a new token)."""

    tokenizer: Tokenizer
    old_ids: np.ndarray


def trim(tokenizer: Tokenizer, texts: Iterable[str]) -> Vocabulary:
    """Keep the tokens that `texts` use, all special tokens and all single characters; any text that only needs kept
    tokens is cut exactly as before (tested), so a model with the same rows gives the same vectors.

    BPE keeps the merges that lead to a kept token, and their parts.
    """
    state = json.loads(_bare(tokenizer).to_str())
    model = state["model"]
    pieces = _pieces(model)
    used = {token["id"] for token in state["added_tokens"]}
    for start in _chunks(texts, 10_000):
        used |= {id_ for encoding in _bare(tokenizer).encode_batch(start) for id_ in encoding.ids}
    used |= {id_ for piece, id_ in pieces.items() if _is_character(piece, model)}
    kept = _with_merge_parts(model, {piece for piece, id_ in pieces.items() if id_ in used})
    old_ids = sorted({pieces[piece] for piece in kept} | {token["id"] for token in state["added_tokens"]})
    return Vocabulary(_renumbered(state, pieces, {old: new for new, old in enumerate(old_ids)}), np.array(old_ids))


def extend(tokenizer: Tokenizer, others: dict[str, Sequence[str]], size: int) -> Vocabulary:
    """A WordPiece teacher's whole vocabulary plus pieces trained on each other language, about `size` tokens in all.

    The teacher's pieces stay, so the student's English starts (nearly) as the teacher; the room that is left is shared
    among the languages equally.
    """
    state = json.loads(_bare(tokenizer).to_str())
    model = state["model"]
    if model["type"] != "WordPiece":
        raise Refused(f"student.vocabulary: extend needs a WordPiece teacher, this one has {model['type']}; use train")
    pieces = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    old = len(pieces)
    if size <= old:
        raise Refused(f"student.vocabulary_size: {size} leaves no room beside the teacher's {old} tokens; for extend it counts both")
    for number, lang in enumerate(sorted(others)):
        most = old + (size - old) * (number + 1) // len(others)
        learner = Tokenizer(models.WordPiece(unk_token=model["unk_token"]))
        learner.normalizer, learner.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        prefix = model["continuing_subword_prefix"]
        trainer = trainers.WordPieceTrainer(
            vocab_size=2 * size, min_frequency=2, show_progress=False, special_tokens=[], continuing_subword_prefix=prefix
        )
        learner.train_from_iterator(others[lang], trainer)
        for piece, _ in sorted(learner.get_vocab().items(), key=lambda entry: entry[1]):
            if piece not in pieces and len(pieces) < most:
                pieces[piece] = len(pieces)
    model["vocab"] = pieces
    old_ids = np.concatenate([np.arange(old), np.full(len(pieces) - old, -1)])
    return Vocabulary(Tokenizer.from_str(json.dumps(state)), old_ids)


def train(texts: Iterable[str], size: int, specials: dict[str, str]) -> Vocabulary:
    """A new Unigram vocabulary (NFKC, lower case) with the teacher's special tokens: {"cls": "[CLS]", …}."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)])
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(dict.fromkeys(specials.values())), unk_token=specials["unk"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    first, last = specials["cls"], specials["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(first, tokenizer.token_to_id(first)), (last, tokenizer.token_to_id(last))],
    )
    return Vocabulary(tokenizer, np.full(tokenizer.get_vocab_size(), -1))


def initial_rows(vocabulary: Vocabulary, old: Tokenizer, table: np.ndarray, aligned: "Aligned | None" = None) -> np.ndarray:
    """The new embedding table (new size, dimension), float32, from the teacher's (old size, dimension).

    A kept token has its old row. A new token has the mean of the rows of the teacher's subwords of its spelling, mixed
    with the mean of the English tokens that stand in its place in translations, weighted by how often they do
    (trans-tokenization, Remy et al. 2024, 2408.04303).
    """
    old, rows = _bare(old), np.empty((len(vocabulary.old_ids), table.shape[1]), dtype=np.float32)
    kept = vocabulary.old_ids >= 0
    rows[kept] = table[vocabulary.old_ids[kept]]
    names = {id_: piece for piece, id_ in vocabulary.tokenizer.get_vocab().items()}
    mean = table.mean(0)
    for id_ in np.flatnonzero(~kept):
        spelled = _spelled(names[id_], old)
        rows[id_] = table[spelled].mean(0) if spelled else mean
    if aligned is not None:
        fresh = np.flatnonzero(~kept)
        weight = aligned.weight[fresh, None]
        rows[fresh] = (rows[fresh] + aligned.sums[fresh]) / (1 + weight)
    return rows


@dataclass
class Aligned:
    """For each new token, the sum of the teacher rows it aligns to, weighted by expected counts, and the weights' sum."""

    sums: np.ndarray
    weight: np.ndarray


def align(pairs: Iterable[tuple[Sequence[str], Sequence[str]]], old: Tokenizer, new: Tokenizer, table: np.ndarray) -> Aligned:
    """Word alignment by IBM model 1 in both directions, over (sources, translations) of one language at a time.

    The expected count of a link is the geometric mean of both directions' posteriors (Liang et al. 2006), so that only
    links that both believe in count.
    """
    result = Aligned(np.zeros((new.get_vocab_size(), table.shape[1]), np.float32), np.zeros(new.get_vocab_size(), np.float32))
    old, new = _bare(old), _bare(new)
    for sources, translations in pairs:
        links = expected_links(_ids(old, sources), _ids(new, translations))
        for (target, source), count in zip(links.pairs, links.counts, strict=True):
            result.weight[target] += count
            result.sums[target] += count * table[source]
    return result


@dataclass
class Links:
    """Pairs (target token, source token), shape (n, 2), with expected counts, shape (n,)."""

    pairs: np.ndarray
    counts: np.ndarray


def expected_links(sources: list[list[int]], targets: list[list[int]], iterations: int = 4, longest: int = 60, least: float = 0.05) -> Links:
    """IBM model 1 (Brown et al. 1993) on token ids, by EM over the whole list at once. Sentences over `longest` tokens
    are left out, and links below `least` expected counts."""
    links: list[np.ndarray] = []
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if 0 < len(source) <= longest and 0 < len(target) <= longest:
            grid = np.empty((len(target), len(source) + 1, 4), np.int32)
            grid[..., 0], grid[..., 1] = np.asarray(target)[:, None], np.asarray([-1, *source])[None, :]  # -1: aligned to nothing
            grid[..., 2], grid[..., 3] = np.arange(len(target))[:, None], np.arange(len(source) + 1)[None, :]
            links.append(np.concatenate([grid.reshape(-1, 4), np.full((grid[..., 0].size, 1), number, np.int32)], 1))
    if not links:
        return Links(np.empty((0, 2), np.int64), np.empty(0))
    flat = np.concatenate(links)
    span = longest + 1
    by_target = np.unique(flat[:, 4].astype(np.int64) * span + flat[:, 2], return_inverse=True)[1]
    by_source = np.unique(flat[:, 4].astype(np.int64) * span + flat[:, 3], return_inverse=True)[1]
    pairs, kind = np.unique(flat[:, :2].astype(np.int64), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    forward = backward = np.ones(len(pairs))
    for _ in range(iterations):
        down, up = _posterior(forward[kind], by_target), _posterior(backward[kind], by_source)
        forward = _conditional(np.bincount(kind, down, len(pairs)), pairs[:, 1])
        backward = _conditional(np.bincount(kind, up, len(pairs)), pairs[:, 0])
    counts = np.bincount(kind, np.sqrt(down * up), len(pairs))
    real = (pairs[:, 1] >= 0) & (counts >= least)
    return Links(pairs[real], counts[real])


def _posterior(probability: np.ndarray, slot: np.ndarray) -> np.ndarray:
    return probability / np.bincount(slot, probability)[slot]


def _conditional(counts: np.ndarray, given: np.ndarray) -> np.ndarray:
    given = given - given.min()
    return counts / np.maximum(np.bincount(given, counts)[given], 1e-12)


# --- tokenizer JSON ---


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """A copy without truncation and padding."""
    bare = copy.deepcopy(tokenizer)
    bare.no_truncation()
    bare.no_padding()
    return bare


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _chunks(texts: Iterable[str], size: int) -> Iterable[list[str]]:
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: id_ for id_, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _is_character(piece: str, model: dict[str, Any]) -> bool:
    """Single characters (and bytes) stay, so that words outside the corpus can still be spelled."""
    prefix = model.get("continuing_subword_prefix") or ""
    bare = piece.removeprefix(prefix) if prefix else piece
    return len(bare.removeprefix("▁")) <= 1 or (piece.startswith("<0x") and piece.endswith(">"))


def _with_merge_parts(model: dict[str, Any], kept: set[str]) -> set[str]:
    if model["type"] != "BPE":
        return kept
    for left, right in reversed([_merge(merge) for merge in model["merges"]]):
        if left + right in kept:
            kept |= {left, right}
    return kept


def _merge(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumbered(state: dict[str, Any], pieces: dict[str, int], new_ids: dict[int, int]) -> Tokenizer:
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for id_, entry in enumerate(model["vocab"]) if id_ in new_ids]
        model["unk_id"] = new_ids.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new_ids[id_] for piece, id_ in pieces.items() if id_ in new_ids}
    if model["type"] == "BPE":
        merges = [_merge(merge) for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in merges if a in model["vocab"] and b in model["vocab"] and a + b in model["vocab"]]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    _renumber_processor(state.get("post_processor"), new_ids)
    return Tokenizer.from_str(json.dumps(state))


def _renumber_processor(processor: dict[str, Any] | None, new_ids: dict[int, int]) -> None:
    if processor is None:
        return
    for part in processor.get("processors", []):
        _renumber_processor(part, new_ids)
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [new_ids[id_] for id_ in special["ids"]]
    for side in ("sep", "cls"):
        if isinstance(processor.get(side), list):
            processor[side][1] = new_ids[processor[side][1]]


def _spelled(piece: str, old: Tokenizer) -> list[int]:
    """Ids of the teacher's subwords of a piece's spelling; a continuing piece is spelled as the inside of a word."""
    unknown = old.token_to_id("[UNK]") if old.token_to_id("[UNK]") is not None else old.token_to_id("<unk>")
    inside = piece.startswith("##")
    bare = piece.removeprefix("##").replace("▁", " ").strip()
    if not inside:
        return [id_ for id_ in old.encode(bare, add_special_tokens=False).ids if id_ != unknown]
    ids: list[int] = []
    while bare:
        length = next((n for n in range(len(bare), 0, -1) if old.token_to_id(f"##{bare[:n]}") is not None), 0)
        if length:
            ids.append(old.token_to_id(f"##{bare[:length]}"))
        bare = bare[max(1, length) :]
    return ids
