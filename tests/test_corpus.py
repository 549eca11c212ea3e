"""Prepare as a whole: groups, shards, duplicates, rejects and counts worked out by hand; kills at every place; bad input."""

import gzip
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xdist import corpus, files, filters, formats, groups, text
from xdist.config import Data, Recipe
from xdist.corpus import Prepared
from xdist.errors import Refused

Make = Callable[..., Recipe]


class Quiet:
    """What a RemoteBoard takes."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, float]] = []

    def count(self, key: str, value: int, share: float = 0.0) -> None:
        self.counts.append((value, share))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work runs in this process, one item after the other; what passes between is JSON, as in Ray."""

    def stream(items: list[Any], work: Callable[..., Any], progress: Any, **arguments: Any) -> Iterator[Any]:
        for item in items:
            yield json.loads(json.dumps(work(json.loads(json.dumps(item)), Quiet(), **arguments)))

    monkeypatch.setattr("xdist.cluster.stream", stream)
    monkeypatch.setattr("xdist.cluster.cores", lambda: 2)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def recipe(*corpora: dict[str, Any], tasks: list[dict[str, Any]] | None = None, name: str = "r", **data: Any) -> Recipe:
        named = [{"name": f"c{number}", **found} for number, found in enumerate(corpora)]
        data = {"root": str(tmp_path), "languages": ["es", "fr", "de"], "shards": 4, **data}
        return Recipe(
            run={"name": name, "storage": str(tmp_path / "runs")}, data=data | {"corpora": named}, evaluate={"tasks": tasks or []}
        )

    return recipe


def tsv(path: Path, *rows: str, header: str = "source\ttarget") -> str:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path.name


def grouped(recipe: Recipe) -> dict[str, list[tuple[str, str, str]]]:
    """source → (language, text, corpus), having checked that each sentence lies in the shard of its hash."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for name in files.names(f"{recipe.folder}/corpus", ".parquet"):
        for row in pq.read_table(f"{recipe.folder}/corpus/{name}").to_pylist():
            assert row["source"] not in found
            assert row["hash"] == text.text_hash(row["source"])
            assert row["hash"] % (recipe.data.shards or 1) == int(name[:5])
            found[row["source"]] = list(zip(row["languages"], row["texts"], row["corpora"], strict=True))
    return found


def rejects(recipe: Recipe) -> list[dict[str, Any]]:
    folder = f"{recipe.folder}/rejects"
    tables = [pq.read_table(f"{folder}/{name}") for name in files.names(folder)]
    return [row for table in tables for row in table.to_pylist()]


def balanced(recipe: Recipe, prepared: Prepared) -> None:
    """No row is lost: kept and rejected are what was read, in the counts and on disk."""
    pairs, dropped = grouped(recipe), rejects(recipe)
    assert sum(map(len, pairs.values())) == prepared.pairs
    assert len(pairs) == prepared.sentences == sum(prepared.per_shard)
    assert len(dropped) == sum(prepared.rejected.values()) == sum(sum(found.values()) for found in prepared.rejected_by_corpus.values())
    assert prepared.pairs + len(dropped) == prepared.rows_read


@pytest.mark.usefixtures("here")
def test_one_english_sentence_in_three_languages_is_one_group(tmp_path: Path, make: Make) -> None:
    for lang, words in {"es": ["hola", "gato"], "fr": ["salut", "chat"], "de": ["hallo", "Katze"]}.items():
        tsv(tmp_path / f"x.{lang}.tsv", f"hello\t{words[0]}", f"cat {lang}\t{words[1]}")
    recipe = make({"path": "x.{lang}.tsv"})
    prepared = corpus.prepare(recipe)
    assert grouped(recipe) == {
        "hello": [("de", "hallo", "c0"), ("es", "hola", "c0"), ("fr", "salut", "c0")],
        "cat es": [("es", "gato", "c0")],
        "cat fr": [("fr", "chat", "c0")],
        "cat de": [("de", "Katze", "c0")],
    }
    assert prepared.languages == {"es": 2, "fr": 2, "de": 2}
    assert (prepared.rows_read, prepared.pairs, prepared.sentences, prepared.rejected) == (6, 6, 4, {})
    assert not os.path.exists(f"{recipe.folder}/parts")
    balanced(recipe, prepared)


@pytest.mark.usefixtures("here")
def test_every_reason_reaches_the_rejects_with_its_place(tmp_path: Path, make: Make) -> None:
    tsv(tmp_path / "eval.en.tsv", "Held out text.\tk1", header="text\tid")
    tsv(tmp_path / "eval.es.tsv", "Texto reservado.\tk2", header="text\tid")
    lines = [
        "source\ttarget\tid", "good\tbueno\t1", "good\tbueno\t2", " good \tbueno\u200b\t3", "x\t\t4", "same\tsame\t5", "a\tbb\t6",
        "y" * 60 + "\tz" + "z" * 55 + "\t7", "ab\t" + "z" * 40 + "\t8", "one two\tuno dos\tk1", "held OUT text\totro\t9",
        "other\ttexto reservado\t10",
        "three\tfields", "good\tbuena\t11",
    ]  # fmt: skip
    data = ("\n".join(lines) + "\n").encode() + b"bad \xff\tx\t12\n" + b"last\tfinal\t13"
    (tmp_path / "a.tsv").write_bytes(data)
    task = {"name": "t", "kind": "retrieval", "test": "eval.{lang}.tsv", "id": "id"}
    recipe = make({"path": "a.tsv", "id": "id", "shares_ids_with": ["t"]}, tasks=[task], languages=["es"], max_chars=50)
    prepared = corpus.prepare(recipe)
    assert grouped(recipe) == {"good": [("es", "buena", "c0"), ("es", "bueno", "c0")], "last": [("es", "final", "c0")]}
    path = str(tmp_path / "a.tsv")
    found = sorted((row["line"], row["reason"]) for row in rejects(recipe))
    assert found == [
        (3, "duplicate"), (4, "duplicate"), (5, "empty"), (6, "identical"), (7, "too_short"), (8, "too_long"), (9, "length_ratio"),
        (10, "evaluation_id"), (11, "evaluation_text"), (12, "evaluation_text"), (13, "2_fields_instead_of_3"), (15, "invalid_utf8"),
    ]  # fmt: skip
    assert prepared.rejected == {"duplicate": 2, "evaluation_text": 2} | {
        reason: 1
        for reason in (
            "empty",
            "identical",
            "too_short",
            "too_long",
            "length_ratio",
            "evaluation_id",
            "2_fields_instead_of_3",
            "invalid_utf8",
        )
    }
    by_line = {row["line"]: row for row in rejects(recipe)}
    assert by_line[6] == {"corpus": "c0", "file": path, "line": 6, "language": "es", "reason": "identical", "text": "same ⇥ same"}
    assert by_line[13] == {
        "corpus": "c0",
        "file": path,
        "line": 13,
        "language": "es",
        "reason": "2_fields_instead_of_3",
        "text": "three\tfields",
    }
    assert by_line[4]["text"] == "good ⇥ bueno"
    balanced(recipe, prepared)


@pytest.mark.usefixtures("here")
def test_the_first_of_equal_pairs_is_kept_in_the_recipes_order(tmp_path: Path, make: Make) -> None:
    tsv(tmp_path / "z.tsv", "one\tuno", "two\tdos")
    tsv(tmp_path / "a.tsv", "two\tdos", "one\tuno", "one\tuna")
    recipe = make({"path": "z.tsv", "name": "zebra"}, {"path": "a.tsv", "name": "ant"}, languages=["es"])
    prepared = corpus.prepare(recipe)
    assert grouped(recipe) == {"one": [("es", "una", "ant"), ("es", "uno", "zebra")], "two": [("es", "dos", "zebra")]}
    assert prepared.corpora == {"zebra": 2, "ant": 1}
    assert prepared.rejected_by_corpus == {"zebra": {}, "ant": {"duplicate": 2}}
    balanced(recipe, prepared)


@pytest.mark.usefixtures("here")
def test_a_wide_file_loses_only_the_translations_that_are_missing(tmp_path: Path, make: Make) -> None:
    rows = [{"en": "one", "es": "uno", "fr": None, "de": "eins"}, {"en": "two", "fr": "deux", "de": "zwei"}, {"en": None, "es": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = make({"path": "a.jsonl", "source": "{lang}", "target": "{lang}"})
    prepared = corpus.prepare(recipe)
    assert grouped(recipe) == {"one": [("de", "eins", "c0"), ("es", "uno", "c0")], "two": [("de", "zwei", "c0"), ("fr", "deux", "c0")]}
    assert prepared.rejected == {"empty": 5}
    balanced(recipe, prepared)


@pytest.mark.usefixtures("here")
def test_where_max_rows_codes_and_languages(tmp_path: Path, make: Make) -> None:
    header = "eng\tes-LA\tfr\tsplit\tkind"
    tsv(tmp_path / "a.tsv", "one\tuno\tun\ttrain\tx", "two\tdos\tdeux\ttest\tx", "broken", "three\ttres\ttrois\ttrain\ty",
        "four\tcuatro\tquatre\ttrain\tz",
        "broken too", "five\tcinco\tcinq\ttrain\tx", header=header)  # fmt: skip
    wide = {"path": "a.tsv", "source": "{lang}", "target": "{lang}", "codes": {"es": "es-LA", "en": "eng"}, "languages": ["es", "fr"]}
    recipe = make(wide | {"where": {"split": "train", "kind": ["x", "y"]}, "max_rows": 4})
    prepared = corpus.prepare(recipe)
    assert grouped(recipe) == {
        "one": [("es", "uno", "c0"), ("fr", "un", "c0")],
        "three": [("es", "tres", "c0"), ("fr", "trois", "c0")],
    }
    assert [(row["line"], row["language"]) for row in rejects(recipe)] == [(4, "es+fr")]
    assert prepared.rows_read == 5
    balanced(recipe, prepared)


@pytest.mark.usefixtures("here")
def test_many_formats_make_one_corpus(tmp_path: Path, make: Make) -> None:
    (tmp_path / "m.en").write_text("moses\nboth\n")
    (tmp_path / "m.es").write_text("moisés\nambos\n")
    with zipfile.ZipFile(tmp_path / "o.zip", "w") as archive:
        archive.writestr("o.en-es.en", "zipped\nboth\n")
        archive.writestr("o.en-es.es", "comprimido\nambos\n")
    tuv = '<tuv xml:lang="{}"><seg>{}</seg></tuv>'
    (tmp_path / "t.tmx").write_text(f"<tmx><body><tu>{tuv.format('en-US', 'memory')}{tuv.format('es', 'memoria')}</tu></body></tmx>")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "1.tsv.gz").write_bytes(gzip.compress(b"source\ttarget\nfolder\tcarpeta\n"))
    (tmp_path / "s" / "2.csv").write_text('source,target\n"comma, inside","coma, dentro"\n')
    pq.write_table(pa.table({"translation": [{"en": "struct", "es": "estructura"}]}), tmp_path / "p.parquet")
    recipe = make(
        {"path": "m.en", "target_path": "m.{lang}"}, {"path": "o.zip"}, {"path": "t.tmx"}, {"path": "s"},
        {"path": "p.parquet", "source": "translation.{lang}", "target": "translation.{lang}"}, languages=["es"],
    )  # fmt: skip
    prepared = corpus.prepare(recipe)
    assert {source: pairs[0][1] for source, pairs in grouped(recipe).items()} == {
        "moses": "moisés", "both": "ambos", "zipped": "comprimido", "memory": "memoria", "folder": "carpeta",
        "comma, inside": "coma, dentro",
        "struct": "estructura",
    }  # fmt: skip
    assert prepared.rejected == {"duplicate": 1}
    balanced(recipe, prepared)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"path": "none.tsv"}, r"none\.tsv does not exist"),
        ({"path": "*.nope"}, "matches no file"),
        ({"path": "a.tsv", "source": "src"}, "no column 'src'; it has source, target"),
        ({"path": "a.tsv", "where": {"split": "train"}}, "no column 'split'"),
        ({"path": "empty.tsv"}, "the file is empty"),
        ({"path": "header.tsv"}, "no pair is left of 0 rows read .no rows at all."),
        ({"path": "bad.tsv"}, "no pair is left of 2 rows read .identical 1, empty 1.; .*rejects/ holds each row"),
        ({"path": "a.en", "target_path": "*.tsv"}, "path matches 1 files and target_path 4"),
        ({"path": "a.tmx", "where": {"x": "y"}}, "`where` and `id` name columns"),
        ({"path": "a.xyz"}, "the ending tells no format"),
    ],
)
def test_what_is_refused(tmp_path: Path, make: Make, found: dict[str, Any], message: str) -> None:
    tsv(tmp_path / "a.tsv", "one\tuno")
    tsv(tmp_path / "header.tsv")
    tsv(tmp_path / "bad.tsv", "same\tsame", "x\t")
    for name in ("empty.tsv", "a.en", "a.tmx", "a.xyz"):
        (tmp_path / name).write_text("")
    with pytest.raises(Refused, match=message):
        corpus.prepare(make(found, languages=["es"]))


def test_no_corpora_and_one_column_for_two_languages_are_refused(tmp_path: Path, make: Make) -> None:
    with pytest.raises(Refused, match=r"data\.corpora is empty"):
        corpus.prepare(make())
    with pytest.raises(Refused, match=r"a\.tsv is read for es, fr, de, but `target: target` is one column"):
        corpus.prepare(make({"path": tsv(tmp_path / "a.tsv", "one\tuno")}))


@pytest.mark.usefixtures("here")
def test_a_language_without_pairs_is_told(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.prepare(make({"path": tsv(tmp_path / "a.tsv", "one\tuno"), "languages": ["es"]}, languages=["es", "fr"]))
    assert "no corpus has a pair in fr" in capsys.readouterr().out


# --- killed and continued ---


def two_files(tmp_path: Path, make: Make, name: str) -> Recipe:
    for number in (1, 2):
        rows = [f"sentence {row}\tfrase {row} {number}" for row in range(40)] + ["same\tsame", f"bad {number}"]
        tsv(tmp_path / f"f{number}.tsv", *rows)
    return make({"path": "f1.tsv"}, {"path": "f2.tsv"}, name=name, languages=["es"])


def outcome(recipe: Recipe) -> tuple[Any, Any, Any]:
    manifest = files.read_json(f"{recipe.folder}/corpus/manifest.json")
    return manifest, grouped(recipe), sorted(map(str, rejects(recipe)))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("most", range(1, 20))
def test_a_run_killed_after_any_file_it_wrote_ends_the_same(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(corpus, "PART_ROWS", 30)
    monkeypatch.setattr("xdist.streams.GATHER", 100)
    monkeypatch.setattr("xdist.streams.BLOCK", 100)
    whole = two_files(tmp_path, make, "whole")
    expected = corpus.prepare(whole)
    killed = two_files(tmp_path, make, "killed")
    write, written = files.write, []

    def dying(uri: str, data: bytes) -> None:
        if len(written) == most:
            raise KeyboardInterrupt
        written.append(uri)
        write(uri, data)

    monkeypatch.setattr(files, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        corpus.prepare(killed)
    monkeypatch.setattr(files, "write", write)
    assert corpus.prepare(killed) == expected
    assert outcome(killed) == outcome(whole)
    balanced(killed, expected)


@pytest.mark.usefixtures("here")
def test_finished_files_and_shards_are_not_done_again(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = two_files(tmp_path, make, "r")
    read, group, started = corpus._prepare_file, groups._group_shard, []

    def watched(unit: Any, *args: Any, **kwargs: Any) -> Any:
        started.append(unit["path"][-6:])
        return read(unit, *args, **kwargs)

    def dying(folder: str, shard: int, rows: pa.Table) -> pa.Table:
        if shard == 2:
            raise OSError("node lost")
        return group(folder, shard, rows)

    monkeypatch.setattr(corpus, "_prepare_file", watched)
    monkeypatch.setattr(groups, "_group_shard", dying)
    with pytest.raises(OSError, match="node lost"):
        corpus.prepare(recipe)
    assert started == ["f1.tsv", "f2.tsv"]
    times = {name: os.stat(f"{recipe.folder}/corpus/{name}").st_mtime_ns for name in files.names(f"{recipe.folder}/corpus", ".parquet")}
    assert sorted(times) == ["00000.parquet", "00001.parquet"]
    monkeypatch.setattr(groups, "_group_shard", group)
    prepared = corpus.prepare(recipe)
    assert started == ["f1.tsv", "f2.tsv"]
    assert all(os.stat(f"{recipe.folder}/corpus/{name}").st_mtime_ns == time for name, time in times.items())
    balanced(recipe, prepared)
    monkeypatch.setattr(formats, "expand", None)  # a finished run looks at nothing again
    assert corpus.prepare(recipe) == prepared


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("change", ["grown", "reordered", "evaluation"])
def test_inputs_that_changed_under_a_killed_run_start_it_over(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tsv(tmp_path / "eval.tsv", "nothing", header="text")
    task = {"name": "t", "kind": "retrieval", "test": "eval.tsv", "languages": ["en"]}
    corpora = [{"path": tsv(tmp_path / "a.tsv", "one\tuno"), "name": "a"}, {"path": tsv(tmp_path / "b.tsv", "two\tdos"), "name": "b"}]
    group = groups._group_shard
    monkeypatch.setattr(groups, "_group_shard", None)
    with pytest.raises(TypeError):
        corpus.prepare(make(*corpora, tasks=[task], languages=["es"]))
    monkeypatch.setattr(groups, "_group_shard", group)
    if change == "grown":
        tsv(tmp_path / "b.tsv", "two\tdos", "three\ttres")
    elif change == "reordered":
        corpora.reverse()
    else:
        tsv(tmp_path / "eval.tsv", "Two!", header="text")
    recipe = make(*corpora, tasks=[task], languages=["es"])
    prepared = corpus.prepare(recipe)
    expected = {"grown": {"one", "two", "three"}, "reordered": {"one", "two"}, "evaluation": {"one"}}[change]
    assert grouped(recipe).keys() == expected
    assert "changed since this run began" in capsys.readouterr().out
    balanced(recipe, prepared)


@pytest.mark.usefixtures("here")
def test_a_full_disk_in_the_middle_loses_nothing(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    recipe, fsync, calls = two_files(tmp_path, make, "r"), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match=r"disk is full.*run again"):
        corpus.prepare(recipe)
    assert not [name for _, _, names in os.walk(recipe.folder) for name in names if name.startswith(".tmp")]
    prepared = corpus.prepare(recipe)
    assert prepared.pairs == 80
    balanced(recipe, prepared)


# --- properties ---

PAIRS = st.lists(st.tuples(*[st.text(st.sampled_from("ab \u00a0é\u0301"), max_size=4)] * 2), min_size=1, max_size=30)


@pytest.mark.usefixtures("here")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PAIRS, st.sampled_from([1, 2, 8]), st.integers(1, 7))
def test_every_pair_lands_once_in_the_shard_of_its_hash(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], shards: int, part: int
) -> None:
    folder = tmp_path_factory.mktemp("p")
    tsv(folder / "a.tsv", *("\t".join(pair) for pair in pairs))
    data = {"root": str(folder), "languages": ["es"], "shards": shards, "min_chars": 1, "corpora": [{"name": "c", "path": "a.tsv"}]}
    recipe = Recipe(run={"storage": str(folder / "runs")}, data=data)
    cleaned = {tuple(text.clean(pa.array(pair, pa.string())).to_pylist()) for pair in pairs}
    expected = {(source, target) for source, target in cleaned if source and target and source != target}
    rows, corpus.PART_ROWS = corpus.PART_ROWS, part
    try:
        if not expected:
            with pytest.raises(Refused, match="no pair is left"):
                corpus.prepare(recipe)
            return
        prepared = corpus.prepare(recipe)
    finally:
        corpus.PART_ROWS = rows
    assert {(source, target) for source, found in grouped(recipe).items() for _, target, _ in found} == expected
    assert prepared.pairs == len(expected)
    balanced(recipe, prepared)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10), st.integers(0, 10))
def test_shards_of_powers_of_two_nest(value: int, small: int, more: int) -> None:
    assert (value % 2 ** (small + more)) % 2**small == value % 2**small


def test_buckets_hold_each_row_once_and_in_order() -> None:
    sources = [f"sentence {number}" for number in range(500)]
    unit = {"corpus": "c", "path": "f", "languages": ["es"]}
    table = pa.table(
        {"line": pa.array(range(500), pa.int64()), "language": pa.array([0] * 500, pa.int16()), "source": sources, "target": sources}
    )
    reader = pa.ipc.open_file(corpus._bucketed(pa.concat_tables([table.slice(0, 200), table.slice(200)]), 16, unit))
    assert reader.num_record_batches == 16
    lines = []
    for shard in range(16):
        batch = reader.get_batch(shard)
        assert all(text.text_hash(source) % 16 == shard for source in batch["source"].to_pylist())
        found = batch["line"].to_pylist()
        assert found == sorted(found)
        lines += found
    assert sorted(lines) == list(range(500))


@pytest.mark.parametrize(("size", "expected"), [(0, 8), (8 << 20, 8), (100 << 20, 16), (10 << 30, 2048), (10 << 40, 16384)])
def test_shards_hold_some_ten_thousand_sentences_however_large_the_corpus(
    monkeypatch: pytest.MonkeyPatch, size: int, expected: int
) -> None:
    monkeypatch.setattr(files, "size", lambda _: size)
    assert corpus._shard_count([{"path": "x.tsv"}]) == expected
    assert corpus._shard_count([{"path": "x.tsv"}, {"path": "x.tsv"}]) == expected


@pytest.mark.parametrize(
    ("shards", "pairs", "cores", "expected"),
    [
        (1, 100, 2, 1), (8, 10_000, 2, 8), (64, 1_000_000, 2, 8), (64, 1_000_000, 3, 13), (64, 1_000_000, 16, 64),
        (4096, 40_000_000, 2, 256), (4096, 40_000_000, 256, 1024), (4096, 400_000_000, 2, 1024), (8, 40_000_000, 2, 8), (8, 0, 1, 4),
    ],
)  # fmt: skip
def test_items_of_the_second_pass_cover_each_shard_once(shards: int, pairs: int, cores: int, expected: int) -> None:
    """Four to a core or more, of 16 shards or 400,000 pairs at most."""
    items = groups.items(shards, pairs, cores)
    assert [shard for item in items for shard in item["shards"]] == list(range(shards))
    assert len(items) == expected


@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_what_one_process_gives(tmp_path: Path, make: Make) -> None:
    recipe = two_files(tmp_path, make, "ray")
    prepared = corpus.prepare(recipe)
    assert (prepared.rows_read, prepared.pairs, prepared.sentences) == (84, 80, 40)
    assert prepared.rejected == {"identical": 2, "1_fields_instead_of_2": 2}
    balanced(recipe, prepared)


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_ray_task_refuses_is_one_message(tmp_path: Path, make: Make) -> None:
    tsv(tmp_path / "a.tsv", "one\tuno")
    with pytest.raises(Refused, match="no column 'nope'"):
        corpus.prepare(make({"path": "a.tsv", "source": "nope"}, languages=["es"]))


def test_memory_of_a_task_stays_flat(tmp_path: Path) -> None:
    """Ten times the rows, in a process of its own: peak memory within a tenth."""
    import subprocess
    import sys

    program = """
import resource, sys
from xdist import corpus, filters
from xdist.config import Data
import numpy as np
folder, path = sys.argv[1:]
filters.write_keys(folder, filters.Keys(np.arange(9, dtype=np.uint64), {}))
data = Data(languages=["es"], corpora=[{"name": "c", "path": path}]).model_dump(mode="json")
unit = {"corpus": "c", "path": path, "target_path": None, "format": "tsv", "languages": ["es"], "key": "0", "size": 1, "share": 1}
corpus.PART_ROWS = 20_000
board = type("Board", (), {"count": lambda *_: None})()
print(corpus._prepare_file(unit, board, folder=folder, settings=data, shards=8)["rows"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.tsv.gz"
        with gzip.open(path, "wt", compresslevel=1) as stream:
            stream.write("source\ttarget\n")
            stream.writelines(
                f"the patient number {row} has a fever today\tel paciente número {row} tiene fiebre hoy\n" for row in range(rows)
            )
        command = [sys.executable, "-c", program, str(tmp_path / "run"), str(path)]
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        ).stdout.split()
        assert int(found[0]) == rows
        return int(found[1])

    assert peak(600_000) < 1.1 * peak(60_000)


def test_a_file_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.tsv.gz"
    with gzip.open(path, "wt") as stream:
        stream.write("source\ttarget\n")
        stream.writelines(f"number {row} {row * 7919 % 1000003}\tnúmero {row} {row * 104729 % 999983}\n" for row in range(200_000))
    monkeypatch.setattr(corpus, "PART_ROWS", 20_000)
    filters.write_keys(str(tmp_path / "run"), filters.Keys(np.empty(0, np.uint64), {}))
    data = Data(languages=["es"], corpora=[{"name": "c", "path": str(path)}])  # type: ignore[list-item]
    unit = {"corpus": "c", "path": str(path), "target_path": None, "format": "tsv", "languages": ["es"], "key": "0"}
    other = unit | {"path": "hf://owner/name"}  # a hub does not say how large it is
    mine, _ = corpus._with_shares([unit, other])
    assert mine["share"] == 1
    board = Quiet()
    corpus._prepare_file(mine | {"share": 0.5}, board, str(tmp_path / "run"), data.model_dump(mode="json"), 2)  # type: ignore[arg-type]
    rows, shares = zip(*board.counts, strict=True)
    assert list(shares) == sorted(shares)
    assert rows[-1] == 200_000
    assert shares[-1] == 0.5
    half = min(range(len(rows)), key=lambda place: abs(rows[place] - 100_000))
    assert shares[half] == pytest.approx(0.25, abs=0.1)
