"""What a sentence is: how text is normalised, and the two hashes that everything hangs on.

`clean` and `match_keys` work on whole Arrow columns: they are the hot path of prepare. Both are pure functions.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

# Zero-width space, word joiner, BOM, soft hyphen and direction marks carry no meaning in running text. The zero-width
# joiners U+200C and U+200D stay: Persian and Indic spelling needs them.
_INVISIBLE = r"[\x{200B}\x{2060}\x{FEFF}\x{00AD}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2066}-\x{2069}]"
_SPACE = r"[\p{Cc}\p{Z}]+"
_NOT_WORD = r"[^\p{L}\p{M}\p{N}]+"


def clean(column: pa.Array) -> pa.Array:
    """Unicode NFC, no invisible or control characters, single spaces, no space at either end."""
    column = pc.utf8_normalize(column, form="NFC")
    column = pc.replace_substring_regex(column, pattern=_INVISIBLE, replacement="")
    column = pc.replace_substring_regex(column, pattern=_SPACE, replacement=" ")
    return pc.utf8_trim(column, characters=" ")


def text_hash(text: str) -> int:
    """Stable unsigned 64-bit hash of one cleaned text: its identity in the store, its shard, its split."""
    return xxhash.xxh3_64_intdigest(text.encode())


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """`text_hash` of each text, shape (n,), uint64."""
    return np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in texts), dtype=np.uint64)


def match_keys(column: pa.Array) -> np.ndarray:
    """Hash of letters and digits alone (NFKC, lower case), shape (n,), uint64: equal for texts that only differ in
    case, spacing or punctuation. Decontamination compares these."""
    column = pc.utf8_lower(pc.utf8_normalize(column, form="NFKC"))
    return text_hashes(pc.replace_substring_regex(column, pattern=_NOT_WORD, replacement="").to_pylist())


def holdout_order(hashes: np.ndarray) -> np.ndarray:
    """A second hash of the hash, uint64, independent of shard and sample (which use the first): ranks the held-out split."""
    return np.fromiter((xxhash.xxh3_64_intdigest(h.tobytes(), seed=1) for h in hashes.astype("<u8")), dtype=np.uint64)
