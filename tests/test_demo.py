"""The demo's own corpus: whole rows, the split that its README promises, and no test sentence among the training texts; and
the files that the recipe of real corpora names."""

import csv
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import xxhash

from xdist import corpus, recipes, tasks

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "demo"
LANGUAGES = ("en", "es", "fr", "de")
SPLITS = {"sentences": ((0.2, "test"), (0.3, "dev"), (1, "train")), "messages": ((0.5, "test"), (1, "train"))}


def rows(name: str) -> list[dict[str, str]]:
    with open(FOLDER / f"{name}.tsv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True))


@pytest.mark.parametrize("name", ["sentences", "terms", "medicine", "everyday", "messages"])
def test_every_row_is_whole_and_there_once(name: str) -> None:
    found = rows(name)
    for row in found:
        assert None not in row
        for text in row.values():
            assert text == unicodedata.normalize("NFC", text).strip() != ""
    assert len({tuple(row[lang] for lang in LANGUAGES) for row in found}) == len(found)


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_is_a_function_of_the_english_text(name: str) -> None:
    for row in rows(name):
        share = xxhash.xxh3_64_intdigest(row["en"].encode()) / 2**64
        assert row["split"] == next(split for below, split in SPLITS[name] if share < below)


def test_sentences_cover_the_specialties_evenly() -> None:
    counts = Counter(row["specialty"] for row in rows("sentences"))
    assert len(counts) == 12
    assert max(counts.values()) < 1.2 * min(counts.values())
    tested = Counter(row["specialty"] for row in rows("sentences") if row["split"] == "test")
    assert min(tested.values()) >= 20


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_test_sentence_is_a_training_text(lang: str) -> None:
    training = {row[lang] for name in ("terms", "medicine", "everyday") for row in rows(name)}
    training |= {row[lang] for row in rows("sentences") if row["split"] == "train"}
    tested = {row[lang] for row in rows("sentences") if row["split"] == "test"} | {row[lang] for row in rows("messages")}
    assert not training & tested


@pytest.mark.parametrize("languages", ['["es","fr","de"]', '["es","fr","de","it","nl","pt"]', '["pt"]'])
def test_the_biomedical_recipe_finds_its_files(languages: str) -> None:
    root = ROOT.parent / "shared" / "data"
    if not root.exists():
        pytest.skip(f"{root} is not here")
    recipe, _ = recipes.parse([str(ROOT / "recipes" / "biomed.yaml"), "--data.root", str(root), "--data.languages", languages], "", None)
    units = corpus._units(recipe)
    assert {lang for unit in units for lang in unit["languages"]} == set(json.loads(languages))
    for task in recipe.evaluate.tasks:
        for split, lang in tasks.measured(recipe, task):
            assert tasks.read(recipe, task, split, lang)["text"]
