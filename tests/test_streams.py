"""Lines of damaged, odd and huge files: every whole line before the damage is kept, the rest is told."""

import bz2
import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from xdist import streams
from xdist.errors import Refused
from xdist.streams import Line

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def lines(path: Path) -> list[Line]:
    return list(streams.lines(streams.blocks(str(path))))


def text(path: Path, data: bytes) -> list[Line]:
    path.write_bytes(data)
    return lines(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"a\nb\n", [(1, "a"), (2, "b")]),
        (b"a\nb", [(1, "a"), (2, "b")]),
        (b"a\r\nb\r\n", [(1, "a"), (2, "b")]),
        (b"\xef\xbb\xbfa\nb\n", [(1, "a"), (2, "b")]),
        (b"\xef\xbb\xbfa", [(1, "a")]),
        (b"a\n\n\nb\n", [(1, "a"), (2, ""), (3, ""), (4, "b")]),
        ("a b\x85c\n".encode(), [(1, "a b\x85c")]),  # only a line feed ends a line
    ],
)
def test_lines_of_a_plain_file(tmp_path: Path, data: bytes, expected: list[tuple[int, str]]) -> None:
    assert [(line.number, line.text) for line in text(tmp_path / "f.txt", data)] == expected


def test_bad_lines_cost_only_themselves(tmp_path: Path) -> None:
    found = text(tmp_path / "f.txt", b"one\nbad \xff\xfe\nthree\nn\0ul\nfive\n")
    assert found == [(1, "one", ""), (2, None, "invalid_utf8"), (3, "three", ""), (4, None, "nul_byte"), (5, "five", "")]


@pytest.mark.parametrize("last", [b"", b"\n", b"\nafter", b"\nafter\n"])
def test_a_ten_megabyte_line_is_not_held(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "f.txt"
    path.write_bytes(b"before\n" + b"x" * 10_000_000 + last)
    tracemalloc.start()
    found = lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[:2] == [(1, "before", ""), (2, None, "line_too_long")]
    assert [line.text for line in found[2:]] == (["after"] if b"after" in last else [])
    assert peak < 6_000_000


def test_a_line_at_the_limit_is_kept_and_one_above_is_not(tmp_path: Path) -> None:
    most = streams.MAX_LINE
    found = text(tmp_path / "f.txt", b"a" * most + b"\n" + b"b" * (most + 1) + b"\nc\n")
    assert [(line.number, len(line.text or ""), line.reason) for line in found] == [(1, most, ""), (2, 0, "line_too_long"), (3, 1, "")]


@pytest.mark.parametrize("ending", PACK)
def test_several_members_are_one_file(tmp_path: Path, ending: str) -> None:
    data = PACK[ending](b"one\ntw") + PACK[ending](b"o\nthree\n")
    assert [line.text for line in text(tmp_path / f"f{ending}", data)] == ["one", "two", "three"]


def test_zeros_after_a_gzip_member_are_padding(tmp_path: Path) -> None:
    assert [line.text for line in text(tmp_path / "f.gz", gzip.compress(b"one\n") + b"\0" * 512)] == ["one"]


@pytest.mark.parametrize("ending", PACK)
def test_a_cut_off_file_gives_all_whole_lines_and_one_reason(tmp_path: Path, ending: str) -> None:
    import random

    rng = random.Random(0)
    rows = [f"{number} {rng.getrandbits(400):x}" for number in range(4000)]
    data = PACK[ending]("\n".join(rows).encode() + b"\n")
    found = text(tmp_path / f"f{ending}", data[: len(data) // 2])
    assert [line.text for line in found[:-1]] == rows[: len(found) - 1]
    assert found[-1].text is None
    assert found[-1].reason.startswith("truncated_file: ")
    assert found[-1].number == len(found)
    if ending == ".gz":  # the other codecs give nothing of a block that is not whole
        assert len(found) > 1800


@pytest.mark.parametrize("cut", range(1, 30))
def test_any_cut_near_the_end_is_noticed(tmp_path: Path, cut: int) -> None:
    data = gzip.compress(b"one\ntwo\n" * 50)
    found = text(tmp_path / "f.gz", data[:-cut])
    assert found[-1].reason.startswith("truncated_file")
    assert {line.text for line in found[:-1]} <= {"one", "two"}


def test_plain_text_under_a_compressed_name_is_told(tmp_path: Path) -> None:
    (found,) = text(tmp_path / "f.gz", b"plain\n")
    assert (found.text, found.reason.split(":")[0]) == (None, "truncated_file")


@pytest.mark.parametrize("ending", PACK)
def test_an_empty_compressed_file_has_no_lines(tmp_path: Path, ending: str) -> None:
    assert text(tmp_path / f"f{ending}", b"") == []
    assert text(tmp_path / f"g{ending}", PACK[ending](b"")) == []


@pytest.mark.parametrize("ending", PACK)
def test_a_bomb_is_read_in_bounded_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"bomb{ending}"
    path.write_bytes(PACK[ending](b"\n".join([b"good", b"0" * 300_000_000, b"after"])))
    tracemalloc.start()
    found = lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(line.text, line.reason) for line in found] == [("good", ""), (None, "line_too_long"), ("after", "")]
    assert peak < 350_000_000


def test_a_storage_that_fails_is_not_a_truncated_file() -> None:
    def failing() -> object:
        yield b"one\n"
        raise OSError("connection reset")

    with pytest.raises(OSError, match="connection reset"):
        list(streams.lines(failing()))  # type: ignore[arg-type]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"nothing\.tsv does not exist"):
        lines(tmp_path / "nothing.tsv")


@given(st.lists(st.binary(max_size=12)), st.integers(1, 7))
def test_lines_do_not_depend_on_how_the_stream_is_cut(parts: list[bytes], size: int) -> None:
    data = b"".join(parts)
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    expected = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    found = list(streams.lines(pieces))
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    for line, raw in zip(found, expected, strict=True):
        assert line.text is None or line.text.encode() == raw.removesuffix(b"\r")
