"""What a sentence is: how text is normalised, and the hashes that everything hangs on.

All functions are pure. `clean` and `match_keys` work on whole Arrow columns: they are the hot path of prepare. A column is
first searched for rows that need work, which costs a fifth of working on them all.
"""

import re
import unicodedata
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

# Zero-width space, word joiner, BOM, soft hyphen, direction marks and annotation marks carry no meaning in running text.
# The zero-width joiners U+200C and U+200D stay: Persian and Indic spelling needs them.
_INVISIBLE = (
    r"[\x{200B}\x{2060}-\x{2064}\x{FEFF}\x{00AD}\x{061C}\x{180E}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2066}-\x{206F}\x{FFF9}-\x{FFFB}]"
)
_SPACE = r"[\p{Cc}\p{Z}]+"
# Visible characters that NFC leaves alone whatever stands beside them: ASCII, Latin, Greek, Cyrillic, Hebrew and Arabic
# letters, typographic punctuation, kana, Han, Hangul syllables.
STABLE = (
    r"!-~\x{A1}-\x{AC}\x{AE}-\x{2FF}\x{388}-\x{3FF}\x{400}-\x{482}\x{48A}-\x{52F}\x{5D0}-\x{5EA}\x{621}-\x{64A}\x{1E00}-\x{1EFF}"
    r"\x{2010}-\x{2027}\x{2030}-\x{205E}\x{3001}-\x{3029}\x{3041}-\x{3096}\x{30A1}-\x{30FE}\x{4E00}-\x{9FFF}\x{AC00}-\x{D7A3}"
)
_UNTIDY = rf"^ |  | $|[^ {STABLE}]"

_LOWER = bytes(range(256)).lower()
_NOT_WORD_ASCII = bytes(code for code in range(128) if not chr(code).isalnum() and chr(code) != "\n")


def clean(column: pa.Array) -> pa.Array:
    """Unicode NFC, no invisible or control characters, single spaces, no space at either end. Twice is the same as once."""
    untidy = pc.match_substring_regex(column, _UNTIDY)
    if not pc.any(untidy).as_py():
        return column
    rows = column.filter(untidy)
    rows = pc.replace_substring_regex(rows, pattern=_INVISIBLE, replacement="")
    # Not pc.utf8_normalize: as of pyarrow 25, its NFC decomposes and does not compose again.
    rows = pa.array([unicodedata.normalize("NFC", row) for row in rows.to_pylist()], pa.string())
    rows = pc.replace_substring_regex(rows, pattern=_SPACE, replacement=" ")
    return pc.replace_with_mask(column, untidy, pc.utf8_trim(rows, characters=" "))


def text_hash(text: str) -> int:
    """Stable unsigned 64-bit hash of one cleaned text: its identity in the store, its shard, its split."""
    return xxhash.xxh3_64_intdigest(text.encode())


def text_hashes(texts: Iterable[str] | pa.Array) -> np.ndarray:
    """`text_hash` of each text, shape (n,), uint64."""
    encoded = texts.cast(pa.binary()).to_pylist() if isinstance(texts, pa.Array) else [text.encode() for text in texts]
    return _hashes(encoded)


def _hashes(encoded: list[bytes]) -> np.ndarray:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), dtype=np.uint64, count=len(encoded))


def match_keys(column: pa.Array) -> np.ndarray:
    """Hash of letters, marks and digits alone (NFKC, case folded), shape (n,), uint64: equal for cleaned texts that only differ in
    case, spacing or punctuation. A text without any letter or digit stands for itself. Decontamination compares these.

    Works on all texts as one, a line each: no step joins or parts lines.
    """
    rows = column.cast(pa.binary()).to_pylist()
    keys = b"\n".join(rows).translate(_LOWER, _NOT_WORD_ASCII)
    if not keys.isascii():
        folded = unicodedata.normalize("NFKC", keys.decode()).casefold()
        others = [one for one in set(folded) - {"\n"} if not (one.isalnum() or unicodedata.category(one).startswith("M"))]
        keys = (re.sub(f"[{re.escape(''.join(others))}]+", "", folded) if others else folded).encode()
    return _hashes([key or row for key, row in zip(keys.split(b"\n"), rows, strict=True)] if rows else [])


def sampled(hashes: np.ndarray, share: float) -> np.ndarray:
    """Mask of the sentences that belong to a sample of this share; a smaller sample is part of every larger one."""
    return hashes <= np.uint64(share * (2**64 - 1)) if share < 1 else np.ones(len(hashes), dtype=bool)


def holdout_order(hashes: np.ndarray) -> np.ndarray:
    """A second hash of the hash, uint64, independent of shard and sample (which use the first): ranks the held-out split."""
    return np.fromiter((xxhash.xxh3_64_intdigest(h.tobytes(), seed=1) for h in hashes.astype("<u8")), dtype=np.uint64)
