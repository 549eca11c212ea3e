"""Evaluation files: read whole, or refused with file and line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xdist import tasks
from xdist.config import Recipe
from xdist.errors import Refused

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def recipe(**task: Any) -> Recipe:
        data = {"root": str(tmp_path), "languages": ["es", "de"]}
        only = {} if "{lang}" in str(task) else {"languages": ["en"]}  # one text cannot be the same in all languages
        return Recipe(data=data, evaluate={"tasks": [{"name": "t", "kind": "retrieval", "test": "test.tsv", **only, **task}]})

    return recipe


def read(recipe: Recipe, split: str = "test", lang: str = "en") -> tasks.Rows:
    return tasks.read(recipe, recipe.evaluate.tasks[0], split, lang)


def test_wide_file_with_splits_codes_and_labels(tmp_path: Path, make: Make) -> None:
    (tmp_path / "all.tsv").write_text("eng\tspa\tlabel\tsplit\na\tx\t1\ttrain\nb\ty\t2\ttest\nc\tz\t1\ttest\n")
    codes = {"en": "eng", "es": "spa"}
    recipe = make(kind="classification", train="all.tsv", dev="all.tsv", test="all.tsv", text="{lang}", split="split", codes=codes)
    assert read(recipe) == {"text": ["b", "c"], "label": ["2", "1"], "split": ["test", "test"]}
    assert read(recipe, "train", "es") == {"text": ["x"], "label": ["1"], "split": ["train"]}
    with pytest.raises(Refused, match=r"evaluate\.tasks\.t: no dev row for language en"):
        read(recipe, "dev")


def test_one_file_per_language_compressed(tmp_path: Path, make: Make) -> None:
    import gzip

    (tmp_path / "spa.tsv.gz").write_bytes(gzip.compress(b'id\ttext\n1\t"quoted"\n2\tdos\n'))
    recipe = make(test="{lang}.tsv.gz", id="id", codes={"es": "spa"})
    assert read(recipe, lang="es") == {"text": ['"quoted"', "dos"], "id": ["1", "2"]}
    assert tasks.path_of(recipe, recipe.evaluate.tasks[0], "test", "es") == str(tmp_path / "spa.tsv.gz")
    assert tasks.path_of(recipe, recipe.evaluate.tasks[0], "dev", "es") is None


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        (None, {}, r"test\.tsv does not exist"),
        ("txt\na\n", {}, "no column 'text'; it has txt"),
        ("text\n", {}, "no test row"),
        ("text\tid\na\n", {}, r"line 2 cannot be read \(1_fields_instead_of_2\)"),
        ("text\tid\na\t1\n \t2\n", {}, "line 3 has an empty text"),
        ("text\tid\na\t\n", {"id": "id"}, "line 2 has an empty id"),
        ("text\ttext2\tscore\na\tb\thigh\n", {"kind": "sts"}, "line 2: score 'high' is not a number"),
        ("text\ttext2\tscore\na\tb\tnan\n", {"kind": "sts"}, "line 2: score 'nan' is not a number"),
    ],
)
def test_what_an_evaluation_file_must_not_be(tmp_path: Path, make: Make, content: str | None, task: dict[str, str], message: str) -> None:
    if content is not None:
        (tmp_path / "test.tsv").write_text(content)
    with pytest.raises(Refused, match=message):
        read(make(**task))


def test_undecodable_rows_are_refused(tmp_path: Path, make: Make) -> None:
    (tmp_path / "test.tsv").write_bytes(b"text\na\nb\xff\n")
    with pytest.raises(Refused, match=r"line 3 cannot be read \(invalid_utf8\)"):
        read(make())


def test_scores_and_pairs(tmp_path: Path, make: Make) -> None:
    (tmp_path / "test.tsv").write_text("text\ttext2\tscore\na\tb\t4.5\nc\td\t-1\n")
    assert read(make(kind="sts")) == {"text": ["a", "c"], "text2": ["b", "d"], "score": ["4.5", "-1"]}


def parallel(recipe: Recipe) -> dict[str, list[str]]:
    return tasks.parallel(recipe, recipe.evaluate.tasks[0], "test")


def test_rows_are_joined_by_id_or_by_place(tmp_path: Path, make: Make) -> None:
    (tmp_path / "en.tsv").write_text("text\tid\na\t1\nb\t2\nc\t3\n")
    (tmp_path / "es.tsv").write_text("text\tid\nz\t3\nx\t1\ny\t2\n")
    (tmp_path / "de.tsv").write_text("text\tid\nu\t1\nw\t3\nv\t9\n")
    assert parallel(make(test="{lang}.tsv", id="id")) == {"en": ["a", "c"], "es": ["x", "z"], "de": ["u", "w"]}
    assert parallel(make(test="{lang}.tsv"))["es"] == ["z", "x", "y"]
    assert parallel(make(test="{lang}.tsv", languages=["en", "es"])).keys() == {"en", "es"}


def test_what_cannot_be_joined_is_refused(tmp_path: Path, make: Make) -> None:
    (tmp_path / "en.tsv").write_text("text\tid\na\t1\nb\t2\n")
    (tmp_path / "es.tsv").write_text("text\tid\nx\t1\n")
    (tmp_path / "de.tsv").write_text("text\tid\nu\t7\nv\t8\n")
    with pytest.raises(Refused, match=r"languages differ in rows .*set `id`"):
        parallel(make(test="{lang}.tsv"))
    with pytest.raises(Refused, match="no id occurs in every language"):
        parallel(make(test="{lang}.tsv", id="id"))
    (tmp_path / "es.tsv").write_text("text\tid\nx\t1\ny\t1\n")
    with pytest.raises(Refused, match="an id occurs twice in language es"):
        parallel(make(test="{lang}.tsv", id="id", languages=["en", "es"]))
