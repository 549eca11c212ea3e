"""Normalisation and hashes, against values worked out by hand and Python's own unicodedata."""

import re
import time
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from xdist import text


def clean(*texts: str) -> list[str]:
    return text.clean(pa.array(texts, pa.string())).to_pylist()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("plain", "plain"),
        ("e\u0301", "é"),
        ("e\u200b\u0301", "é"),  # what an invisible character held apart is composed
        ("a\u00adb\ufeffc\u2060d\u200ee\u2066f", "abcdef"),
        ("  two   spaces ", "two spaces"),
        ("tab\tnbsp\u00a0line\u2028em\u2003ideographic\u3000end\u0085", "tab nbsp line em ideographic end"),
        ("bell\x07 esc\x1b[0m nul\0", "bell esc [0m nul"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # the zero-width joiner spells Persian
        ("\u212b", "Å"),
        ("가", "가"),
        ("\u1100\u1161", "가"),
        ("\u200b \u00ad", ""),
        ("", ""),
        ("«¿Qué?»", "«¿Qué?»"),
    ],
)
def test_clean(raw: str, expected: str) -> None:
    assert clean(raw) == [expected]


def test_clean_mixes_tidy_and_untidy_rows() -> None:
    assert clean("a", " b ", "ü", "u\u0308", "") == ["a", "b", "ü", "ü", ""]


@given(st.lists(st.text(), max_size=5))
def test_clean_is_nfc_and_clean_of_clean_is_clean(texts: list[str]) -> None:
    once = clean(*texts)
    assert clean(*once) == once
    for found in once:
        assert unicodedata.is_normalized("NFC", found)
        assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") or (c.isspace() and c != " ") for c in found)


def test_the_fast_path_passes_only_what_nfc_leaves_alone() -> None:
    stable = re.sub(r"\\x\{(\w+)\}", lambda found: re.escape(chr(int(found[1], 16))), text.STABLE)
    characters = [chr(code) for code in range(0x20, 0x10000) if re.fullmatch(f"[{stable}]", chr(code))]
    assert len(characters) > 30_000
    for character in characters:
        assert unicodedata.is_normalized("NFC", character)
        assert unicodedata.combining(character) == 0
        assert unicodedata.category(character) not in ("Cc", "Cf", "Mn", "Mc", "Me", "Zs", "Zl", "Zp"), hex(ord(character))


def test_hashes_are_xxh3_of_the_utf8_bytes() -> None:
    expected = xxhash.xxh3_64_intdigest("corazón".encode())
    assert text.text_hash("corazón") == expected
    assert text.text_hashes(["corazón"]).tolist() == [expected]
    assert text.text_hashes(pa.array(["corazón"])).tolist() == [expected]
    assert text.text_hashes([]).shape == (0,)
    assert text.text_hash("") == 0x2D06800538D394C2  # published value of XXH3 for empty input


def keys(*texts: str) -> list[int]:
    return text.match_keys(pa.array(texts, pa.string())).tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Atrial septal defect", "atrial-septal  DEFECT."),
        ("¿Qué tal?", "qué tal"),
        ("«Straße»", "STRASSE"),
        ("ΟΔΟΣ", "οδος"),
        ("10 mg", "１０ｍｇ"),
        ("H₂O", "h2o"),
        ("हिन्दी।", "हिन्दी"),
        ("snake_case", "snakecase"),
    ],
)
def test_match_keys_look_past_case_spacing_and_punctuation(one: str, other: str) -> None:
    assert keys(one) == keys(other)


@pytest.mark.parametrize(("one", "other"), [("pie", "píe"), ("हिन्दी", "हन्द"), ("???", "!!!"), ("5", "6"), ("", "?")])
def test_match_keys_tell_texts_apart(one: str, other: str) -> None:
    assert keys(one) != keys(other)


@given(st.text(st.characters(categories=["L", "N"])))
def test_match_key_survives_punctuation_anywhere(letters: str) -> None:
    if letters:
        assert keys(letters) == keys(" ".join(letters) if letters.isascii() else f"¡{letters}… —«»")


@given(st.lists(st.text(), max_size=8))
def test_match_keys_of_many_are_those_of_each(texts: list[str]) -> None:
    """By the definition, character after character, of texts as `clean` leaves them."""
    column = text.clean(pa.array(texts, pa.string()))

    def key(row: str) -> str:
        letters = "".join(character for character in row.lower() if character.isalnum() or not character.isascii())
        folded = unicodedata.normalize("NFKC", letters).casefold()
        return "".join(character for character in folded if character.isalnum() or unicodedata.category(character).startswith("M")) or row

    assert text.match_keys(column).tolist() == [text.text_hash(key(row)) for row in column.to_pylist()]


def test_thousands_of_different_symbols_take_no_longer() -> None:
    """Hostile text: every private character there is, in every row."""
    symbols = "".join(map(chr, range(0xE000, 0xF8FF)))
    started = time.process_time()
    found = keys(*(f"{symbols}né{number}" for number in range(200)))
    assert time.process_time() - started < 2  # a pass over the text for each symbol takes ten times as long
    assert found == keys(*(f"NÉ {number}" for number in range(200)))


def test_the_holdout_order_is_another_hash() -> None:
    hashes = np.arange(2000, dtype=np.uint64)
    order = text.holdout_order(hashes)
    assert order.dtype == np.uint64
    assert int(order[7]) == xxhash.xxh3_64_intdigest((7).to_bytes(8, "little"), seed=1)
    assert abs(np.corrcoef(hashes.astype(float), order.astype(float))[0, 1]) < 0.1
