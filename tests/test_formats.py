"""Every format, whole and broken: what is read, what is set apart with which reason, what is refused."""

import bz2
import gzip
import json
import tracemalloc
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdist import delimited, formats, streams
from xdist.chunks import Bad, Chunk
from xdist.errors import Refused

PAIR = ["source", "target"]
Found = tuple[list[tuple[Any, ...]], list[tuple[int, str]]]


def read(path: Path | str, columns: list[str] = PAIR, kind: str = "auto", **options: Any) -> Found:
    """(line, values…) of the good rows, and (line, reason) of the bad."""
    chosen = formats.format_of(str(path), options.get("target_path"), kind)
    return gather(formats.read(str(path), chosen, columns, **options))


def gather(chunks: Iterator[Chunk]) -> Found:
    good, bad = [], []
    for chunk in chunks:
        values = [chunk.columns[name].to_pylist() for name in chunk.columns]
        good += list(zip(chunk.lines.tolist(), *values, strict=True))
        bad += [(row.line, row.reason) for row in chunk.bad]
    return good, bad


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# --- TSV ---


def test_tsv_quotes_are_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'id\ttarget\tsource\n1\t"eins\t5" pipe\n2\t\'zwei"\t""\n')
    assert read(path) == ([(2, '5" pipe', '"eins'), (3, '""', "'zwei\"")], [])


@pytest.mark.parametrize(
    ("data", "good", "bad"),
    [
        (b"source\ttarget\r\na\tb\r\nc\td\r\n", [(2, "a", "b"), (3, "c", "d")], []),
        (b"\xef\xbb\xbfsource\ttarget\na\tb", [(2, "a", "b")], []),
        (b"source\ttarget\na\tb\nlonely\na\tb\tc\n\nc\td\n", [(2, "a", "b"), (6, "c", "d")],
         [(3, "1_fields_instead_of_2"), (4, "3_fields_instead_of_2")]),
        (b"source\ttarget\na\tb\nx\xff\ty\nc\td\n", [(2, "a", "b"), (4, "c", "d")], [(3, "invalid_utf8")]),
        (b"source\ttarget\na\tb\nx\0\ty\nc\td\n", [(2, "a", "b"), (4, "c", "d")], [(3, "nul_byte")]),
        (b"source\ttarget\na\rb\tc\n", [(2, "a\rb", "c")], []),
        (b"source\ttarget\n\t\nNULL\tnan\n", [(2, "", ""), (3, "NULL", "nan")], []),
        (b"source\ttarget\n", [], []),
        (b"source\ttarget", [], []),
    ],
)  # fmt: skip
def test_tsv_oddities(tmp_path: Path, data: bytes, good: list[Any], bad: list[Any]) -> None:
    assert read(write(tmp_path / "a.tsv", data)) == (good, bad)


def test_a_ten_megabyte_line_in_a_tsv_costs_one_row(tmp_path: Path) -> None:
    rows = [f"s{number}\tt{number}" for number in range(1000)]
    rows[500] = "x" * 10_000_000 + "\ty"
    path = write(tmp_path / "a.tsv", "source\ttarget\n" + "\n".join(rows))
    tracemalloc.start()
    good, bad = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bad == [(502, "line_too_long")]
    assert [line for line, *_ in good] == [line for line in range(2, 1002) if line != 502]
    assert good[499:501] == [(501, "s499", "t499"), (503, "s501", "t501")]
    assert peak < 8_000_000


def test_a_truncated_tsv_keeps_its_whole_rows(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    rows = [f"{rng.getrandbits(300):x}\t{number}" for number in range(5000)]
    whole = gzip.compress(("source\ttarget\n" + "\n".join(rows) + "\n").encode())
    good, bad = read(write(tmp_path / "a.tsv.gz", whole[: len(whole) * 2 // 3]))
    assert len(good) > 3000
    assert [f"{source}\t{target}" for _, source, target in good] == rows[: len(good)]
    assert len(bad) == 1
    assert bad[0][0] == len(good) + 2
    assert bad[0][1].startswith("truncated_file")


@settings(max_examples=200)
@given(st.lists(st.lists(st.text(st.sampled_from("ab\"'\r\0\t é\\,"), max_size=4), min_size=1, max_size=3), max_size=8), st.booleans())
def test_arrow_and_line_by_line_agree(rows: list[list[str]], crlf: bool) -> None:
    data = "".join("\t".join(fields) + ("\r\n" if crlf else "\n") for fields in rows).encode()
    header = delimited._Header(["a", "b"], ["b"], [1])
    if not data:
        return
    fast, slow = delimited._parsed(streams.Block(2, data), header), delimited._by_line(streams.Block(2, data), header)
    if fast is not None:
        assert gather(iter([fast])) == gather(iter([slow]))


def test_clean_blocks_take_the_fast_way() -> None:
    header = delimited._Header(["a", "b"], ["a", "b"], [0, 1])
    fast = delimited._parsed(streams.Block(7, "x\t\"y\r\n'é\tz\r\n".encode()), header)
    assert fast is not None
    assert gather(iter([fast])) == ([(7, "x", '"y'), (8, "'é", "z")], [])


def test_one_column_twice_and_columns_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "x\ty\tz\n1\t2\t3\n")
    assert read(path, ["z", "x"]) == ([(2, "3", "1")], [])
    assert read(write(tmp_path / "one.tsv", "text\na\nb\n"), ["text"]) == ([(2, "a"), (3, "b")], [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"source\tziel\na\tb\n", r"no column 'target'; it has source, ziel"),
        (b"sou\xffrce\ttarget\n", r"header cannot be read \(invalid_utf8\)"),
        ("source\ttarget\n".encode("utf-16"), r"header cannot be read \(nul_byte\)"),
        (b"x" * 2_000_000, "line_too_long"),
    ],
)
def test_headers_that_cannot_be_used_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message):
        read(write(tmp_path / "a.tsv", data))


def test_text_under_a_gz_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="damaged compressed data"):
        read(write(tmp_path / "a.tsv.gz", "source\ttarget\na\tb\n"))


# --- CSV ---


@pytest.mark.parametrize(
    ("data", "good", "bad"),
    [
        ('source,target\n"a, b","say ""hi"""\n', [(2, "a, b", 'say "hi"')], []),
        ('source,target\r\n"two\r\nlines",b\r\nc,d\r\n', [(2, "two\nlines", "b"), (4, "c", "d")], []),
        ('source,target\n"",x\na,""\n', [(2, "", "x"), (3, "a", "")], []),
        ('source,target\n"open,b\nc,d\ne,f\n', [(3, "c", "d"), (4, "e", "f")], [(2, "unbalanced_quote")]),
        ('source,target\na,"open\nc,d', [(3, "c", "d")], [(2, "unbalanced_quote")]),
        # stray quotes inside plain fields are text, however many lines lie between them
        ('source,target\n5" pipe,a\nb,c\n6" pipe,d\n', [(2, '5" pipe', "a"), (3, "b", "c"), (4, '6" pipe', "d")], []),
        # an open quote must not swallow the rows up to the next quoted field
        ('source,target\n"open,b\nc,d\n"e, f",g\nh,i\n', [(3, "c", "d"), (4, "e, f", "g"), (5, "h", "i")], [(2, "unbalanced_quote")]),
        ('source,target\n"open,b\nc,d\ne,"f"\n', [(3, "c", "d"), (4, "e", "f")], [(2, "unbalanced_quote")]),
        ('source,target\n"a"b,c\nd,e\n', [(3, "d", "e")], [(2, "unbalanced_quote")]),
        ("source,target\na\nb,c,d\n\ne,f\n", [(5, "e", "f")], [(2, "1_fields_instead_of_2"), (3, "3_fields_instead_of_2")]),
    ],
)
def test_csv(tmp_path: Path, data: str, good: list[Any], bad: list[Any]) -> None:
    assert read(write(tmp_path / "a.csv", data)) == (good, bad)


def test_csv_bad_bytes_inside_a_quoted_field_cost_its_lines_only(tmp_path: Path) -> None:
    good, bad = read(write(tmp_path / "a.csv", b'source,target\n"a\n\xff\nb",c\nd,e\n'))
    assert good == [(5, "d", "e")]
    assert [line for line, _ in bad] == [2, 3, 4]


def test_csv_a_field_beyond_the_parsers_limit_is_set_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "source,target\n" + "x" * 200_000 + ",y\na,b\n")
    assert read(path) == ([(3, "a", "b")], [(2, "field_too_long")])


def test_csv_many_open_quotes_stay_fast(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "source,target\n" + '"open,b\n' * 2000 + "a,b\n")
    good, bad = read(path)
    assert good == [(2002, "a", "b")]
    assert len(bad) == 2000


@settings(max_examples=100)
@given(st.lists(st.tuples(*[st.text(st.sampled_from("ab\", \n'é"), max_size=6)] * 2), max_size=6))
def test_csv_reads_what_python_writes(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    import csv

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([PAIR, *rows])
    good, bad = read(path)
    assert [tuple(row[1:]) for row in good] == rows
    assert bad == []


# --- JSONL ---


def test_jsonl_nested_columns_numbers_and_nulls(tmp_path: Path) -> None:
    rows = [
        {"t": {"en": "a", "es": "b"}, "n": 1.5},
        {"t": {"en": "c", "es": None}, "n": 2},
        {"t": {"en": "d"}, "n": True},
        {"t.en": "dotted"},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    good, bad = read(path, ["t.en", "t.es", "n"])
    assert good == [(1, "a", "b", "1.5"), (2, "c", "", "2"), (3, "d", "", "True"), (4, "dotted", "", "")]
    assert bad == []


def test_jsonl_broken_rows(tmp_path: Path) -> None:
    lines = ['{"source": "a", "target": "b"}', "", "[1, 2]", "{", '"text"', '{"source": "\\ud800", "target": "x"}',
             '{"source": ["a"], "target": "b"}', "[" * 100_000, '{"source": "ü", "target": "c"}']  # fmt: skip
    good, bad = read(write(tmp_path / "a.ndjson", "\n".join(lines)))
    assert good == [(1, "a", "b"), (9, "ü", "c")]
    assert bad == [(3, "not_an_object"), (4, "invalid_json"), (5, "not_an_object"), (6, "invalid_unicode"), (7, "not_text_in_source"),
                   (8, "invalid_json")]  # fmt: skip


def test_jsonl_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"en": "a", "t": {"es": "b"}}\n{"en": "a"}\n')
    with pytest.raises(Refused, match=r"no column 't\.de'; it has en, t"):
        read(path, ["en", "t.de"])


def test_jsonl_without_a_record_reads_nothing(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", "\n\n")) == ([], [])
    assert read(write(tmp_path / "b.jsonl", "{\n"))[1] == [(1, "invalid_json")]


# --- Parquet and Hugging Face ---


def test_parquet_with_a_struct_column_and_nulls(tmp_path: Path) -> None:
    table = pa.table({"translation": [{"en": "a", "es": "b"}, {"en": None, "es": None}, None], "id": [1, 2, 3], "list": [[1], [], None]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", ["translation.en", "translation.es", "id"]) == (
        [(1, "a", "b", "1"), (2, "", "", "2"), (3, "", "", "3")],
        [],
    )
    assert read(tmp_path / "a.parquet", ["id", "list"])[1] == [(1, "not_text_in_list"), (2, "not_text_in_list")]


def test_parquet_wrong_column_and_damage_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"source": ["x" * 50] * 5000, "t": [{"en": "a"}] * 5000}), path, compression="snappy")
    with pytest.raises(Refused, match="no column 'target'; it has source, t"):
        read(path)
    with pytest.raises(Refused, match=r"no column 't\.de'"):
        read(path, ["source", "t.de"])
    data = path.read_bytes()
    for damaged in (data[:-30], data[:100], b"", b"PAR1" + b"\xff" * (len(data) // 2) + data[len(data) // 2 + 4 :]):
        with pytest.raises(Refused, match="is damaged or no Parquet file"):
            read(write(path, damaged), ["source"])
    with pytest.raises(Refused, match="does not exist"):
        read(tmp_path / "none.parquet")


def test_a_saved_hugging_face_folder(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"translation": [{"en": "a", "es": "b"}, {"en": "c", "es": None}], "id": [1, 2]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "dict")
    columns = ["translation.en", "translation.es", "id"]
    expected = [(1, "a", "b", "1"), (2, "c", "", "2")]
    assert formats.expand(str(tmp_path / "one"), "auto") == [str(tmp_path / "one")]
    assert formats.expand(str(tmp_path / "dict"), "auto") == [str(tmp_path / "dict")]
    assert read(tmp_path / "one", columns) == (expected, [])
    assert read(tmp_path / "dict", columns) == (expected, [])
    assert read(tmp_path / "dict", columns, split="test") == ([(1, "c", "", "2")], [])
    with pytest.raises(Refused, match="no split 'dev'; it has train, test"):
        read(tmp_path / "dict", columns, split="dev")
    with pytest.raises(Refused, match=r"no column 'translation\.fr'"):
        read(tmp_path / "one", ["translation.en", "translation.fr"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="cannot be read as a Hugging Face data set"):
        read(tmp_path / "empty", columns, "hf")


# --- Moses ---


def test_moses_pairs(tmp_path: Path) -> None:
    source, target = write(tmp_path / "a.en", b"one\ntwo\n\xff\nfour\n"), write(tmp_path / "a.es", "uno\r\ndos\ntres\ncu\0atro")
    assert read(source, target_path=str(target)) == ([(1, "one", "uno"), (2, "two", "dos")], [(3, "invalid_utf8"), (4, "nul_byte")])


def test_moses_sides_of_unequal_length_are_told(tmp_path: Path) -> None:
    source, target = write(tmp_path / "a.en", "1\n2\n3\n4\n"), gzip_file(tmp_path / "a.es.gz", "1\n2\n")
    good, bad = read(source, target_path=str(target))
    assert [line for line, *_ in good] == [1, 2]
    assert bad == [(3, "sides_differ_in_length: 2 lines more on one side")]
    assert read(target, target_path=str(source))[1] == bad
    with pytest.raises(Refused, match="needs `target_path`"):
        read(source, kind="moses")


def gzip_file(path: Path, text: str) -> Path:
    return write(path, gzip.compress(text.encode()))


def opus(path: Path, members: dict[str, str], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


EN_ES = {"languages": {"source": "en", "target": "es"}}


def test_an_opus_zip_is_read_without_unpacking(tmp_path: Path) -> None:
    path = opus(tmp_path / "en-es.txt.zip", {"README": "read me", "EMEA.en-es.en": "a\nb\n", "EMEA.en-es.es": "c\nd\n", "LICENSE": ""})
    assert read(path, **EN_ES) == ([(1, "a", "c"), (2, "b", "d")], [])
    assert [found.name for found in tmp_path.iterdir()] == ["en-es.txt.zip"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../x.en": "a", "x.es": "b"}, "points outside the archive"),
        ({"/etc/x.en": "a", "x.es": "b"}, "points outside the archive"),
        ({"..\\x.en": "a", "x.es": "b"}, "points outside the archive"),
        ({"x.en": "a" * 40_000_000, "x.es": "b"}, "more than 200 times"),
        ({"x.en": "a"}, r"0 members end in \.es"),
        ({"x.en": "a", "y.en": "b", "x.es": "c"}, r"2 members end in \.en"),
    ],
)
def test_harmful_and_unclear_archives_are_refused(tmp_path: Path, members: dict[str, str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        read(opus(tmp_path / "a.zip", members), **EN_ES)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = opus(tmp_path / "a.zip", {"x.en": "hello world\n" * 1000, "x.es": "hola\n" * 1000})
    data = path.read_bytes()
    for damaged in (data[:-10], b"", b"no zip", data[:40] + b"\xff" * 10 + data[50:]):
        with pytest.raises(Refused, match="is not a whole zip"):
            read(write(path, damaged), **EN_ES)
    encrypted = bytearray(data)
    for at in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        encrypted[at] |= 1
    with pytest.raises(Refused, match="cannot be unpacked"):
        read(write(path, bytes(encrypted)), **EN_ES)


# --- TMX ---

TMX = """<?xml version="1.0" encoding="UTF-8"?>
{doctype}<tmx version="1.4"><header srclang="en"/><body>{units}</body></tmx>"""


def unit(**texts: str) -> str:
    return "<tu>" + "".join(f'<tuv xml:lang="{lang.replace("_", "-")}"><seg>{text}</seg></tuv>' for lang, text in texts.items()) + "</tu>"


def tmx(path: Path, *units: str, doctype: str = "") -> Path:
    return write(path, TMX.format(units="".join(units), doctype=doctype))


def test_tmx_languages_and_inline_tags(tmp_path: Path) -> None:
    units = [
        unit(en_US="a &amp; b", es_ES="uno"),
        '<tu><note>n</note><tuv lang="EN"><prop>p</prop><seg>x <bpt i="1">&lt;b&gt;</bpt>bold<ept i="1">&lt;/b&gt;</ept> '
        "<hi>high <ph>9</ph>up</hi>!</seg></tuv>"
        '<tuv xml:lang="es_MX"><seg>dos</seg></tuv></tu>',
        unit(en="only"),
        unit(en="three", fr="trois", es="tres"),
        unit(en="", es="vacío"),
        unit(eng="no", es="sí"),
    ]
    good, bad = read(tmx(tmp_path / "a.tmx", *units, doctype='<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n'), **EN_ES)
    assert good == [(1, "a & b", "uno"), (2, "x bold high up!", "dos"), (4, "three", "tres")]
    assert bad == [(3, "no_es"), (5, "no_en"), (6, "no_en")]


def test_tmx_a_full_code_asks_for_that_variant(tmp_path: Path) -> None:
    path = tmx(tmp_path / "a.tmx", unit(en="a", es_ES="b", es_LA="c"))
    assert read(path, languages={"source": "en", "target": "es-LA"})[0] == [(1, "a", "c")]
    assert read(path, languages={"source": "en", "target": "es"})[0] == [(1, "a", "b")]


def test_tmx_with_a_name_space_and_in_utf_16(tmp_path: Path) -> None:
    text = TMX.format(units=unit(en="a", es="ñ"), doctype="")
    path = write(tmp_path / "a.tmx", text.replace("<tmx ", '<tmx xmlns="http://www.lisa.org/tmx14" '))
    assert read(path, **EN_ES) == ([(1, "a", "ñ")], [])
    assert read(write(path, text.replace("UTF-8", "UTF-16").encode("utf-16")), **EN_ES) == ([(1, "a", "ñ")], [])


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE tmx [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE tmx [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY x "&b;&b;&b;&b;">]>',
        '<!DOCTYPE tmx [<!ENTITY % p SYSTEM "http://127.0.0.1/x.dtd"> %p;]>',
    ],
)
def test_tmx_entities_are_refused(tmp_path: Path, doctype: str) -> None:
    with pytest.raises(Refused, match="declares entities"):
        read(tmx(tmp_path / "a.tmx", unit(en="&x;" if "ENTITY x" in doctype else "a", es="b"), doctype=doctype), **EN_ES)


def test_a_cut_off_tmx_keeps_its_whole_units(tmp_path: Path) -> None:
    whole = TMX.format(units="".join(unit(en=f"e{number}", es=f"s{number}") for number in range(2000)), doctype="").encode()
    good, bad = read(write(tmp_path / "a.tmx", whole[: len(whole) // 2]), **EN_ES)
    assert [row[1] for row in good] == [f"e{number}" for number in range(len(good))]
    assert 900 < len(good) < 1100
    assert bad[0][0] == len(good) + 1
    assert bad[0][1].startswith("truncated_file")
    packed = gzip.compress(whole)
    good, bad = read(write(tmp_path / "b.tmx.gz", packed[: len(packed) // 2]), **EN_ES)
    assert len(good) > 500
    assert len(bad) == 1


def test_tmx_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(units: int) -> int:
        path = write(tmp_path / f"{units}.tmx", TMX.format(units=unit(en="a" * 50, es="b" * 50) * units, doctype=""))
        tracemalloc.start()
        rows = sum(len(chunk.lines) for chunk in formats.read(str(path), "tmx", PAIR, **EN_ES))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == units
        return found

    assert peak(100_000) < 1.15 * peak(50_000)


# --- which files ---


def test_formats_by_ending(tmp_path: Path) -> None:
    expected = {
        "a.tsv": "tsv",
        "a.txt.gz": "tsv",
        "a.csv.bz2": "csv",
        "a.jsonl.zst": "jsonl",
        "a.parquet": "parquet",
        "a.tmx.gz": "tmx",
        "a.zip": "moses",
    }
    for name, kind in expected.items():
        assert formats.format_of(f"/x/{name}", None, "auto") == kind
    assert formats.format_of("hf://a/b", None, "auto") == "hf"
    assert formats.format_of("a.en", "a.es", "auto") == "moses"
    assert formats.format_of("a.weird", None, "csv") == "csv"
    with pytest.raises(Refused, match="the ending tells no format"):
        formats.format_of(str(write(tmp_path / "a.xyz", "")), None, "auto")


def test_expand_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.tsv", "a.tsv.gz", "x.md", ".hidden.tsv", "_SUCCESS", "odd[1].tsv"):
        write(tmp_path / name, "")
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "c.tsv", "")

    def names(pattern: str, declared: str = "auto") -> list[str]:
        return [found.removeprefix(f"{tmp_path}/") for found in formats.expand(f"{tmp_path}/{pattern}".rstrip("/"), declared)]

    assert names("b.tsv") == ["b.tsv"]
    assert names("odd[1].tsv") == ["odd[1].tsv"]
    assert names("*.tsv*") == [".hidden.tsv", "a.tsv.gz", "b.tsv", "odd[1].tsv"]
    assert names("[ab].tsv*") == ["a.tsv.gz", "b.tsv"]
    assert names("*/c.tsv") == ["deep/c.tsv"]
    assert names("**/*.tsv") == ["deep/c.tsv"]
    assert names("") == ["a.tsv.gz", "b.tsv", "odd[1].tsv"]
    assert names("", "tsv") == ["a.tsv.gz", "b.tsv", "odd[1].tsv", "x.md"]
    for pattern, message in (("nothing.tsv", "does not exist"), ("*.csv", "matches no file")):
        with pytest.raises(Refused, match=message):
            names(pattern)


def test_an_fsspec_storage_is_read_like_a_disk() -> None:
    folder = uuid.uuid4().hex
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{folder}/a.tsv", b"source\ttarget\na\tb\n")
    memory.pipe(f"/{folder}/b.tsv.bz2", bz2.compress(b"source\ttarget\nc\td\n"))
    expected = [f"memory://{folder}/a.tsv", f"memory://{folder}/b.tsv.bz2"]
    assert formats.expand(f"memory://{folder}/*.tsv*", "auto") == expected
    assert formats.expand(f"memory://{folder}", "auto") == expected
    assert [read(path)[0] for path in expected] == [[(2, "a", "b")], [(2, "c", "d")]]
    with pytest.raises(Refused, match="does not exist"):
        formats.expand(f"memory://{folder}/none.tsv", "auto")


def test_the_first_rows_of_a_chunk(tmp_path: Path) -> None:
    (chunk,) = formats.read(str(write(tmp_path / "a.tsv", "source\ttarget\na\tb\nbad\nc\td\nbad\n")), "tsv", PAIR)
    first = chunk.first(1)
    assert (first.lines.tolist(), first.columns["source"].to_pylist(), first.bad) == ([2], ["a"], [])
    assert chunk.first(2) is chunk
    (chunk,) = formats.read(str(write(tmp_path / "b.tsv", "source\ttarget\na\tb\nbad\nc\td\nbad\nlast\t!\n")), "tsv", PAIR)
    assert chunk.first(2).bad == [Bad(3, "1_fields_instead_of_2", "bad")]
