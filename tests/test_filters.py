"""Filters: each reason by a pair made for it, in the order that decides; evaluation text kept out by text and by id."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from xdist import filters, text
from xdist.config import Corpus, Data, Recipe
from xdist.errors import Refused
from xdist.filters import Keys

NONE = Keys(np.empty(0, np.uint64), {})


def reasons(
    pairs: list[tuple[str, str]], keys: Keys = NONE, ids: list[str] | None = None, corpus: Any = None, **data: Any
) -> list[str | None]:
    columns = [text.clean(pa.array(side, pa.string())) for side in zip(*pairs, strict=True)]
    found = Corpus(name="c", path="x", **(corpus or {}))
    given = None if ids is None else pa.array(ids, pa.string())
    return filters.reasons(*columns, given, "es", found, Data(**{"languages": ["es"], **data}), keys).to_pylist()


def held_out(*texts: str) -> Keys:
    return Keys(np.unique(text.match_keys(pa.array(texts))), {"task": ["s1", "s2"]})


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (("a good pair", "un buen par"), None),
        (("", "x"), "empty"),
        (("x", " \u200b\t"), "empty"),
        (("", ""), "empty"),
        (("same", "same "), "identical"),
        (("a", "a"), "identical"),
        (("a", "bb"), "too_short"),
        (("ab", "cd"), None),
        (("x" * 2000, "y" * 2000), None),
        (("x" * 2001, "y" * 2000), "too_long"),
        (("x" * 2001, "y"), "too_short"),
        (("ab", "y" * 32), None),  # (32 + 8) / (2 + 8) is the ratio allowed
        (("ab", "y" * 33), "length_ratio"),
        (("y" * 33, "ab"), "length_ratio"),
    ],
)
def test_the_reason_of_a_pair(pair: tuple[str, str], expected: str | None) -> None:
    assert reasons([pair]) == [expected]


def test_lengths_count_characters_not_bytes() -> None:
    assert reasons([("ñ" * 10, "中" * 10)], max_chars=10) == [None]


def test_limits_come_from_the_settings() -> None:
    pairs = [("abc", "abcd"), ("abc", "defghi"), ("abcdefghijk", "lmnopqrstu")]
    assert reasons(pairs, min_chars=4) == ["too_short", "too_short", None]
    assert reasons(pairs, max_chars=10) == [None, None, "too_long"]
    assert reasons(pairs, max_length_ratio=1) == ["length_ratio", "length_ratio", "length_ratio"]


def test_evaluation_text_is_kept_out_on_either_side_whatever_its_case() -> None:
    keys = held_out("Atrial septal defect", "comunicación interauricular", "zzz")
    pairs = [
        ("ATRIAL septal-defect.", "otra cosa"),
        ("other thing", "¿Comunicación  interauricular?"),
        ("atrial septal", "defecto"),
        ("zz", "zzzz"),
    ]
    assert reasons(pairs, keys) == ["evaluation_text", "evaluation_text", None, None]


def test_the_largest_and_smallest_keys_are_found() -> None:
    texts = [f"text {number}" for number in range(50)]
    keys = held_out(*texts)
    assert reasons([(found, "otra cosa") for found in texts], keys) == ["evaluation_text"] * 50
    assert reasons([(f"{found} x", "otra cosa") for found in texts], keys) == [None] * 50


def test_evaluation_ids_are_kept_out_where_the_corpus_shares_them() -> None:
    keys, pairs = held_out("nothing"), [("one", "uno"), ("two", "dos"), ("three", "tres")]
    assert reasons(pairs, keys, ["s1", "s3", ""], {"id": "id", "shares_ids_with": ["task"]}) == ["evaluation_id", None, None]
    assert reasons(pairs, keys, ["s1", "s3", "s2"], {"id": "id"}) == [None, None, None]
    assert reasons(pairs, keys, ["s1", "s3", "s2"], {"id": "id", "shares_ids_with": ["other"]}) == [None, None, None]


def test_the_first_reason_counts() -> None:
    assert reasons([("atrial", "atrial")], held_out("atrial"), ["s1"], {"id": "id", "shares_ids_with": ["task"]}) == ["identical"]
    assert reasons([("atrial", "otro")], held_out("atrial"), ["s1"], {"id": "id", "shares_ids_with": ["task"]}) == ["evaluation_id"]


def test_no_rows_no_reasons() -> None:
    empty = pa.array([], pa.string())
    data = Data(languages=["es"])
    assert filters.reasons(empty, empty, None, "es", Corpus(name="c", path="x"), data, held_out("a")).to_pylist() == []


EN = "The patient was admitted with severe chest pain last night."
ES = "El paciente ingresó anoche con un fuerte dolor en el pecho."
DE = "Der Patient wurde gestern Nacht mit starken Brustschmerzen eingeliefert."


def test_foreign_text_is_told_by_lingua() -> None:
    pytest.importorskip("lingua")
    pairs = [(EN, ES), (EN, DE), (ES, ES + "!"), (EN, EN + "!"), ("short text", "Kurzer Text")]
    found = reasons(pairs, languages=["es", "de"], detect_language=True)
    assert found == [None, "wrong_language", "wrong_language", "wrong_language", None]


def test_without_lingua_language_identification_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    filters._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(Refused, match=r"pip install 'xdist-ray\[langid\]'"):
        filters.detector(Data(languages=["es"]))


def test_a_language_that_lingua_does_not_know_is_refused() -> None:
    pytest.importorskip("lingua")
    with pytest.raises(Refused, match="lingua does not know the language 'xx'"):
        filters.detector(Data(languages=["xx"]))
    assert filters.detector(Data(source_language="en-GB", languages=["es-LA"])) is not None


Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def recipe(**evaluate: Any) -> Recipe:
        settings = {"run": {"storage": str(tmp_path / "runs")}, "data": {"root": str(tmp_path), "languages": ["es"]}}
        return Recipe(**settings, evaluate=evaluate)

    return recipe


def test_keys_of_dev_and_test_but_not_of_train(tmp_path: Path, make: Make) -> None:
    for lang in ("en", "es"):
        for split in ("train", "dev", "test"):
            (tmp_path / f"{split}.{lang}.tsv").write_text(f"text\tlabel\tid\n{split} in {lang}\tx\t{split}-1\n")
    paths = {split: f"{split}.{{lang}}.tsv" for split in ("train", "dev", "test")}
    recipe = make(tasks=[{"name": "t", "kind": "classification", "id": "id", **paths}])
    keys = filters.evaluation_keys(recipe)
    texts = ["dev in en", "dev in es", "test in en", "test in es"]
    assert keys.texts.tolist() == sorted(text.match_keys(pa.array(texts)).tolist())
    assert keys.ids == {"t": ["dev-1", "test-1"]}
    filters.write_keys(recipe.folder, keys)
    again = filters.read_keys(recipe.folder)
    assert (again.texts.tolist(), again.ids) == (keys.texts.tolist(), keys.ids)
    off = filters.evaluation_keys(make(decontaminate=False, tasks=recipe.model_dump()["evaluate"]["tasks"]))
    assert (len(off.texts), off.ids) == (0, {})


def test_both_sentences_of_a_similarity_task_and_the_sentences_of_a_report(tmp_path: Path, make: Make) -> None:
    for lang in ("en", "es"):
        report = f"{EN} Short one. {ES}" if lang == "en" else "uno"
        (tmp_path / f"{lang}.tsv").write_text(f"text\ttext2\tscore\n{report}\tsecond {lang}\t1\n")
    keys = filters.evaluation_keys(make(tasks=[{"name": "t", "kind": "sts", "test": "{lang}.tsv"}]))
    expected = [f"{EN} Short one. {ES}", EN, ES, "second en", "uno", "second es"]
    assert keys.texts.tolist() == sorted(text.match_keys(pa.array(expected)).tolist())
