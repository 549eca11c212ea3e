"""Vocabularies for students: trim one to the corpus, extend the teacher's to new languages, or train a new one.

A tokenizer is handled as its `tokenizers` JSON, so WordPiece, Unigram and BPE checkpoints are served alike. Each function
gives the new tokenizer and, for each new token id, the rows of the old embedding table that it starts from.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from xdist.errors import Refused

MOST_TOGETHER = 2000  # sentence pairs of equal lengths that word alignment takes in one array


@dataclass
class Vocabulary:
    """A tokenizer and, where it keeps a token of the old one, that token's old id (-1 for a new token)."""

    tokenizer: Tokenizer
    old_ids: np.ndarray


def trim(tokenizer: Tokenizer, texts: Iterable[str]) -> Vocabulary:
    """Keep the tokens that `texts` use, all special tokens and all single characters; any text that only needs kept
    tokens is cut exactly as before (tested), so a model with the same rows gives the same vectors.

    BPE keeps the merges that lead to a kept token, and their parts. Unigram keeps its least likely piece, by which it
    scores unknown characters.
    """
    bare = _bare(tokenizer)
    state = json.loads(bare.to_str())
    model = state["model"]
    pieces = _pieces(model)
    used = {token["id"] for token in state["added_tokens"]}
    for start in _chunks(texts, 10_000):
        used |= {id_ for encoding in bare.encode_batch(start) for id_ in encoding.ids}
    used |= {id_ for piece, id_ in pieces.items() if _is_character(piece, model)}
    if model["type"] == "Unigram":
        used |= {model["unk_id"], min(range(len(model["vocab"])), key=lambda id_: model["vocab"][id_][1])} - {None}
    elif model.get("unk_token") is not None:
        used.add(pieces[model["unk_token"]])
    kept = _with_merge_parts(model, {piece for piece, id_ in pieces.items() if id_ in used})
    old_ids = sorted({pieces[piece] for piece in kept} | {token["id"] for token in state["added_tokens"]})
    return Vocabulary(_renumbered(state, pieces, {old: new for new, old in enumerate(old_ids)}), np.array(old_ids))


def extend(tokenizer: Tokenizer, english: Iterable[str], others: Mapping[str, Sequence[str]], size: int) -> Vocabulary:
    """A WordPiece teacher's whole vocabulary plus pieces trained on each other language, about `size` tokens in all.

    The teacher's pieces stay, and a new piece that would cut a word of `english` otherwise than the teacher cuts it is
    left out: so the student's English starts exactly as the teacher. The room is shared among the languages equally.
    """
    state = json.loads(_bare(tokenizer).to_str())
    model = state["model"]
    if model["type"] != "WordPiece":
        raise Refused(f"student.vocabulary: extend needs a WordPiece teacher, this one has {model['type']}; use train")
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    pieces = dict(sorted((model["vocab"] | added).items(), key=lambda entry: entry[1]))
    old = len(pieces)
    if size <= old:
        raise Refused(f"student.vocabulary_size: {size} leaves no room beside the teacher's {old} tokens; for extend it counts both")
    prefix = model["continuing_subword_prefix"]
    learned = {lang: _trained_pieces(tokenizer, others[lang], 2 * size, prefix) for lang in sorted(others)}
    foreign = _not_english(tokenizer, pieces, {piece for found in learned.values() for piece in found}, english)
    for number, found in enumerate(learned.values()):
        most = old + (size - old) * (number + 1) // len(others)
        for piece in found:
            if piece in foreign and len(pieces) < most:
                pieces.setdefault(piece, len(pieces))
    model["vocab"] = pieces
    old_ids = np.concatenate([np.arange(old), np.full(len(pieces) - old, -1)])
    return Vocabulary(Tokenizer.from_str(json.dumps(state)), old_ids)


def _not_english(tokenizer: Tokenizer, pieces: Mapping[str, int], candidates: set[str], english: Iterable[str]) -> set[str]:
    """The candidates that no English word is cut into. Without one of them a word may fall to another, so this goes on
    until no English word uses any."""
    normalise = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    words = {word for text in english for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalise(text))}
    foreign = candidates - pieces.keys()
    while words:
        vocabulary = {piece: number for number, piece in enumerate([*pieces, *sorted(foreign)])}
        cutter = models.WordPiece(vocabulary, unk_token=next(iter(pieces)), max_input_chars_per_word=100)
        used = {word: {token.value for token in cutter.tokenize(word)} & foreign for word in words}
        words = {word for word, found in used.items() if found}
        foreign -= set().union(*used.values())
    return foreign


def _trained_pieces(tokenizer: Tokenizer, texts: Sequence[str], size: int, prefix: str) -> list[str]:
    """WordPieces learned from texts, in the order of learning; the same list every time.

    The trainer numbers continuing characters in the order of a hash table, and breaks ties by number: naming them
    beforehand takes the chance out.
    """
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    normalise = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    characters = sorted({character for text in texts for character in normalise(text) if not character.isspace()})
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[prefix + character for character in characters],
        continuing_subword_prefix=prefix,
    )
    learner.train_from_iterator(texts, trainer)
    ids = learner.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def train(texts: Iterable[str], size: int, specials: dict[str, str]) -> Vocabulary:
    """A new Unigram vocabulary (NFKC, lower case) with the teacher's special tokens: {"cls": "[CLS]", …}.

    Its trainer sums in the order of a hash table: two trainings may differ in rare pieces.
    """
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
        spelled = _spelled(names[int(id_)], old)
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
    size = new.get_vocab_size()
    result = Aligned(np.zeros((size, table.shape[1]), np.float32), np.zeros(size, np.float32))
    old, new = _bare(old), _bare(new)
    for sources, translations in pairs:
        links = expected_links(_ids(old, sources), _ids(new, translations))
        counts = scipy.sparse.csr_array((links.counts, links.pairs.T), shape=(size, len(table)), dtype=np.float32)
        result.sums += counts @ table
        result.weight += counts.sum(axis=1)
    return result


@dataclass
class Links:
    """Pairs (target token, source token), shape (n, 2), with expected counts, shape (n,)."""

    pairs: np.ndarray
    counts: np.ndarray


def expected_links(
    sources: list[list[int]], targets: list[list[int]], iterations: int = 4, longest: int = 60, least: float = 0.05
) -> Links:
    """IBM model 1 (Brown et al. 1993) on token ids, by EM over the whole list at once. Sentences over `longest` tokens
    are left out, and links below `least` expected counts.

    Sentence pairs of equal lengths make one array (pairs, targets, sources + 1), whose first source is -1: a target
    aligned to nothing. Its cells are numbered by kind, that is by (target token, source token), and a kind has one
    probability in each direction. Memory holds four bytes per cell.
    """
    blocks, pairs = _blocks(_grids(sources, targets, longest))
    forward = backward = np.ones(len(pairs), np.float32)
    counts = np.zeros(len(pairs))
    for iteration in range(iterations):
        down, up = np.zeros(len(pairs)), np.zeros(len(pairs))
        for kinds, cells in blocks:
            given_source, given_target = forward[kinds][cells], backward[kinds][cells]
            given_source /= given_source.sum(axis=2, keepdims=True)  # each target chooses a source
            given_target /= given_target.sum(axis=1, keepdims=True)  # each source chooses a target
            down[kinds] += np.bincount(cells.ravel(), given_source.ravel())
            up[kinds] += np.bincount(cells.ravel(), given_target.ravel())
            if iteration == iterations - 1:
                counts[kinds] += np.bincount(cells.ravel(), np.sqrt(given_source * given_target).ravel())
        forward, backward = _conditional(down, pairs[:, 1]), _conditional(up, pairs[:, 0])
    real = (pairs[:, 1] >= 0) & (counts >= least)
    return Links(pairs[real], counts[real])


def _grids(sources: list[list[int]], targets: list[list[int]], longest: int) -> Iterator[np.ndarray]:
    """For sentence pairs of equal lengths, int64 (pairs, targets, sources + 1): the target's id in the upper half of the
    bits and the source's id + 1 in the lower."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if 0 < len(source) <= longest and 0 < len(target) <= longest:
            shapes.setdefault((len(target), len(source)), []).append(number)
    for numbers in shapes.values():
        for start in range(0, len(numbers), MOST_TOGETHER):
            together = numbers[start : start + MOST_TOGETHER]
            upper = np.array([targets[number] for number in together], np.int64)[:, :, None] << 32
            lower = np.array([[-1, *sources[number]] for number in together], np.int64)[:, None, :] + 1
            yield upper | lower


def _blocks(grids: Iterator[np.ndarray]) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """For each grid its kinds and its cells as indices into them, int32; and all kinds' (target, source) ids, shape (n, 2)."""
    found: list[np.ndarray] = []
    cells: list[np.ndarray] = []
    for grid in grids:
        ids, inverse = np.unique(grid, return_inverse=True)
        found.append(ids)
        cells.append(inverse.astype(np.int32).reshape(grid.shape))
    known, _ = np.unique(np.concatenate([np.empty(0, np.int64), *found]), return_counts=True)  # so it sorts; hashing these is slow
    blocks = [(np.searchsorted(known, ids).astype(np.int32), inverse) for ids, inverse in zip(found, cells, strict=True)]
    return blocks, np.stack([known >> 32, (known & 0xFFFFFFFF) - 1], axis=1)


def _conditional(counts: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Counts as probabilities given one side's token, float32."""
    given = given + 1
    return (counts / np.maximum(np.bincount(given, counts)[given], 1e-12)).astype(np.float32)


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
    bare = piece.removeprefix(prefix).removesuffix(model.get("end_of_word_suffix") or "")
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
    renumbered = Tokenizer.from_str(json.dumps(state))
    if any(renumbered.token_to_id(token["content"]) != token["id"] for token in state["added_tokens"]):
        raise Refused("student.vocabulary: this tokenizer's added tokens have ids among its pieces and cannot be moved; use keep")
    return renumbered


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
        matches = ((length, old.token_to_id(f"##{bare[:length]}")) for length in range(len(bare), 0, -1))
        length, id_ = next(((length, id_) for length, id_ in matches if id_ is not None), (1, None))
        ids += [] if id_ is None else [id_]
        bare = bare[length:]
    return ids
