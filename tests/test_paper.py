"""The paper's setting on a hub cache made by hand: the real ids and classes, tiny random models, no network.

Each case is a Python of its own, because huggingface_hub reads HF_HOME when it is imported.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import sentences, tiny_checkpoint
from test_student import roberta
from transformers import BertConfig, BertModel

from xdist import formats, recipes
from xdist.errors import Refused
from xdist.text import text_hashes

RECIPE = Path(__file__).parent.parent / "recipes" / "paper.yaml"
TEACHER, MBERT, XLMR = (
    "pritamdeka/BioBERT-mnli-snli-scinli-scitail-mednli-stsb",
    "google-bert/bert-base-multilingual-cased",
    "FacebookAI/xlm-roberta-base",
)
SHA = "0123456789abcdef0123456789abcdef01234567"

CASE = """
import json, sys
from types import SimpleNamespace

import numpy as np
from sentence_transformers import SentenceTransformer

from xdist import encoder, files, loss, student, train, weights
from xdist.config import Recipe
from xdist.shards import Batch

recipe = Recipe(**json.load(sys.stdin))
teacher_folder = weights.located(recipe.teacher)
teacher = encoder.load(teacher_folder, "float32")
table = files.read_table(f"{recipe.folder}/corpus/00000.parquet")
sources, texts = table["source"].to_pylist(), table["texts"].combine_chunks().flatten().to_pylist()
initial = student.build(recipe, teacher_folder, SimpleNamespace(shards=1))
model = encoder.load(initial, "float32")
train.freeze_unused(model)
optimizer = train.make_optimizer(model, recipe)

rows = [np.array(row) for row in model.tokenize(texts[:16], recipe.student.max_length)]
from xdist.batching import padded
batch = Batch(*padded(rows, model.model.tokenizer.pad_token_id), teacher.encode(sources[:16]))
losses = [train.step(model, model, optimizer, [batch], recipe.train, 1.0, 1, True)["loss"] for _ in range(4)]
model.model.save(f"{recipe.folder}/student", create_model_card=False)

again = SentenceTransformer(f"{recipe.folder}/student", device="cpu")
base = weights.other(recipe, recipe.student.base)
json.dump({
    "teacher": teacher_folder, "base": base, "losses": losses, "classes": [type(module).__name__ for module in again],
    "teacher_class": type(teacher.body).__name__, "body": type(again[0].auto_model).__name__,
    "dimensions": [teacher.dimension, again.get_embedding_dimension(), again[0].auto_model.config.hidden_size],
    "difference": float(np.abs(again.encode(texts) - model.encode(texts)).max()),
    "moved": float(np.abs(again.encode(texts) - SentenceTransformer(initial, device="cpu").encode(texts)).max()),
    "tokens": [len(SentenceTransformer(base, device="cpu").tokenizer), len(again.tokenizer)],
}, open(f"{recipe.folder}/told.json", "w"))
"""


def publish(home: Path, name: str, folder: Path) -> Path:
    """Put a checkpoint into a hub cache as huggingface_hub lays it out: blobs, a snapshot of links, a ref."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / SHA
    (root / "blobs").mkdir(parents=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(SHA)
    return snapshot


def multilingual_bert(folder: Path) -> Path:
    """mBERT's kind: a plain BertModel checkpoint, cased WordPiece, no pooling."""
    from test_vocabulary import word_piece
    from transformers import PreTrainedTokenizerFast

    tokenizer = word_piece()
    names = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    torch.manual_seed(0)
    settings = {
        "hidden_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **settings)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in names.items()}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hf")
    work = tmp_path_factory.mktemp("models")
    publish(home, TEACHER, tiny_checkpoint(work / "teacher", hidden=768, layers=2))
    publish(home, MBERT, multilingual_bert(work / "mbert"))
    publish(home, XLMR, Path(roberta(work / "xlmr")))
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Callable[..., dict]:
    def case(base: str, **student: object) -> dict:
        import pyarrow as pa

        from xdist import files

        recipe = recipes.load(RECIPE).model_dump(mode="json")
        recipe["run"] |= {"storage": str(tmp_path)}
        recipe["teacher"] |= {"max_length": 32}
        recipe["student"] |= {"base": base, "max_length": 64} | student
        rows = sentences(60)
        table = pa.table({
            "hash": text_hashes([row["en"] for row in rows]),
            "source": [row["en"] for row in rows],
            "languages": [["es", "de"]] * len(rows),
            "texts": [[row["es"], row["de"]] for row in rows],
        })  # fmt: skip
        files.write_table(f"{tmp_path}/paper/corpus/00000.parquet", table)
        environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", CASE], input=json.dumps(recipe), env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads((tmp_path / "paper" / "told.json").read_text()))

    return case


@pytest.mark.parametrize(("base", "body"), [(MBERT, "BertModel"), (XLMR, "XLMRobertaModel")])
def test_hub_models_are_found_trained_and_loaded_again(run: Callable[..., dict], home: Path, base: str, body: str) -> None:
    told = run(base)
    for name, folder in ((TEACHER, told["teacher"]), (base, told["base"])):
        assert folder == str(home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / SHA)
    assert (told["teacher_class"], told["body"]) == ("BertModel", body)
    assert told["classes"] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert told["dimensions"][:2] == [768, 768]
    assert told["dimensions"][2] < 768
    assert told["losses"][-1] < told["losses"][0]
    assert told["difference"] < 1e-5
    assert told["moved"] > 1e-3
    assert told["tokens"][1] < told["tokens"][0]


def test_without_a_network_a_model_that_is_not_cached_is_refused_by_name(run: Callable[..., dict]) -> None:
    with pytest.raises(AssertionError, match=r"model google-bert/bert-base-german-cased is neither a folder nor reachable on the hub"):
        run("google-bert/bert-base-german-cased")


def test_the_recipe_names_models_and_files_as_they_are(tmp_path: Path) -> None:
    recipe = recipes.load(RECIPE)
    assert (recipe.teacher.model, recipe.student.base) == (TEACHER, MBERT)
    assert recipe.student.vocabulary == "trim"
    assert recipe.data.languages == ["es", "fr", "de"]
    found = {lang: corpus.path.replace("{lang}", lang) for corpus in recipe.data.corpora for lang in corpus.languages or []}
    assert found == {"es": "emea/en-es.txt.zip", "fr": "emea/en-fr.txt.zip", "de": "emea/de-en.txt.zip"}


def test_a_corpus_as_opus_packs_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "de-en.txt.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("EMEA.de-en.de", "Fieber\nHusten\n")
        archive.writestr("EMEA.de-en.en", "fever\ncough\n")
        archive.writestr("EMEA.de-en.xml", "<?xml version='1.0'?>")
        archive.writestr("README", "about")
    options = {"target_path": None, "languages": {"source": "en", "target": "de"}}
    chunks = list(formats.read(str(path), "moses", ["source", "target"], **options))
    found = [{side: [str(value) for value in chunk.columns[side]] for side in ("source", "target")} for chunk in chunks]
    assert found == [{"source": ["fever", "cough"], "target": ["Fieber", "Husten"]}]


def test_the_recipe_refuses_a_missing_corpus_by_its_file(tmp_path: Path) -> None:
    recipe = recipes.load(RECIPE)
    with pytest.raises(Refused, match="en-es"):
        formats.expand(recipe.located("emea/en-es.txt.zip"), "moses")
