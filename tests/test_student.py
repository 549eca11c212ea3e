"""The untrained student: its layers, vocabulary, projection and dropout, and the folder that users load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import sentences, tiny_checkpoint
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from xdist import encoder, files, shards, student
from xdist.config import Recipe
from xdist.errors import Refused
from xdist.text import text_hashes

TEXTS = [row[lang] for row in sentences(30) for lang in ("en", "es", "de")] + ["", "fever fever"]


@pytest.fixture
def build(make_recipe: Callable[..., Recipe], teacher: str) -> Callable[..., tuple[str, Recipe]]:
    """Build a student on a corpus written by hand; gives its folder and the recipe."""

    def make(teacher_folder: str = teacher, **sections: dict[str, Any]) -> tuple[str, Recipe]:
        recipe = make_recipe(**sections)
        rows = sentences(300)
        table = pa.table(
            {
                "hash": text_hashes([row["en"] for row in rows]),
                "source": [row["en"] for row in rows],
                "languages": [["es", "de"]] * 300,
                "texts": [[row["es"], row["de"]] for row in rows],
            }
        )
        for shard in range(2):
            files.write_table(f"{recipe.folder}/corpus/{shard:05d}.parquet", table.slice(150 * shard, 150))
        prepared: Any = SimpleNamespace(shards=2)  # all that build asks of what prepare found
        return student.build(recipe, teacher_folder, prepared), recipe

    return make


def plain(folder: str) -> np.ndarray:
    """As a user would load it."""
    return SentenceTransformer(folder, device="cpu").encode(TEXTS)


def test_all_layers_and_the_same_vocabulary_give_the_teachers_vectors(build: Callable[..., Any], teacher: str) -> None:
    folder, _ = build(student={"vocabulary": "keep"})
    np.testing.assert_allclose(plain(folder), plain(teacher), atol=1e-6)


@pytest.mark.parametrize("vocabulary", ["keep", "trim", "extend", "train"])
def test_the_saved_folder_gives_the_engines_vectors_and_tokens(build: Callable[..., Any], vocabulary: str) -> None:
    folder, recipe = build(student={"vocabulary": vocabulary, "vocabulary_size": 300, "max_length": 16})
    found = encoder.load(folder, "float32")
    vectors = plain(folder)
    np.testing.assert_allclose(found.encode(TEXTS), vectors, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert found.model.max_seq_length == 16
    long = [*TEXTS, "the heart " * 30]
    assert [encoding.ids for encoding in shards._tokenizer(folder, 16).encode_batch(long)] == found.tokenize(long)
    assert shards._pad_token(folder) == found.model.tokenizer.pad_token == "[PAD]"
    assert recipe.folder in folder


def test_trim_changes_no_vector_and_makes_the_table_smaller(build: Callable[..., Any], tmp_path: Path) -> None:
    base = tmp_path / "bert"
    found = str(tiny_checkpoint(base))
    folder, _ = build(found, teacher={"model": found}, student={"vocabulary": "trim"})
    text = [row["en"] for row in sentences(300)]
    one, two = (SentenceTransformer(name, device="cpu") for name in (found, folder))
    np.testing.assert_allclose(two.encode(text), one.encode(text), atol=1e-6)
    assert two[0].auto_model.config.vocab_size == two[0].auto_model.get_input_embeddings().num_embeddings == len(two.tokenizer)
    assert len(two.tokenizer) < len(one.tokenizer)


def test_a_sample_of_the_corpus_gives_the_vocabulary_as_well(build: Callable[..., Any]) -> None:
    share = 0.005  # of 300 sentences
    folder, _ = build(student={"vocabulary": "trim"}, data={"sample": share}, run={"name": "sample"})
    rows = sentences(300)
    chosen = [row for row in rows if int(text_hashes([row["en"]])[0]) < share * 2**64]
    assert 0 < len(chosen) < 20
    words = {word for row in chosen for lang in ("en", "es", "de") for word in row[lang].split()}
    kept = SentenceTransformer(folder, device="cpu").tokenizer.get_vocab()
    assert {"heart", "lung", "knee", "fever"} - words, "the sample has every word"
    assert {"heart", "lung", "knee", "fever"} & set(kept) == {"heart", "lung", "knee", "fever"} & words


def test_extend_keeps_the_english_vectors(build: Callable[..., Any], teacher: str) -> None:
    folder, _ = build(student={"vocabulary": "extend", "vocabulary_size": 300})
    text = [row["en"] for row in sentences(50)]
    one, two = (SentenceTransformer(name, device="cpu") for name in (teacher, folder))
    np.testing.assert_allclose(two.encode(text), one.encode(text), atol=1e-5)
    assert len(two.tokenizer) > len(one.tokenizer)
    assert len(two.tokenizer.tokenize("el paciente")) < len(one.tokenizer.tokenize("el paciente"))


def test_train_carries_the_special_tokens_rows_over(build: Callable[..., Any], teacher: str) -> None:
    folder, _ = build(student={"vocabulary": "train", "vocabulary_size": 300})
    one, two = (SentenceTransformer(name, device="cpu") for name in (teacher, folder))
    old, new = (model[0].auto_model.get_input_embeddings().weight for model in (one, two))
    for role in ("pad", "unk", "cls", "sep", "mask"):
        a, b = (getattr(model.tokenizer, f"{role}_token_id") for model in (one, two))
        assert getattr(one.tokenizer, f"{role}_token") == getattr(two.tokenizer, f"{role}_token")
        assert torch.equal(old[a], new[b])


def test_layers_are_those_asked_for(build: Callable[..., Any], teacher: str) -> None:
    folder, _ = build(student={"vocabulary": "keep", "layers": [0, 2]})
    one, two = (SentenceTransformer(name, device="cpu")[0].auto_model for name in (teacher, folder))
    assert two.config.num_hidden_layers == len(two.encoder.layer) == 2
    for new, old in enumerate((0, 2)):
        for a, b in zip(two.encoder.layer[new].parameters(), one.encoder.layer[old].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layers", [[], [3], [-1, 0], [1, 0], [0, 0]])
def test_layers_that_are_not_there_are_refused(build: Callable[..., Any], layers: list[int]) -> None:
    with pytest.raises(Refused, match=r"student\.layers: .* between 0 and 2: the base has 3 layers"):
        build(student={"vocabulary": "keep", "layers": layers})


def test_no_projection_where_the_dimensions_agree(build: Callable[..., Any]) -> None:
    folder, _ = build(student={"vocabulary": "keep"})
    assert [type(module).__name__ for module in SentenceTransformer(folder, device="cpu")] == ["Transformer", "Pooling", "Normalize"]


@pytest.mark.parametrize(("teacher_width", "student_width"), [(48, 32), (32, 48), (768, 384)])
def test_a_projection_where_they_differ(build: Callable[..., Any], tmp_path: Path, teacher_width: int, student_width: int) -> None:
    wide = str(tiny_checkpoint(tmp_path / "teacher", teacher_width, layers=1))
    narrow = str(tiny_checkpoint(tmp_path / "base", student_width, layers=1))
    folder, _ = build(wide, teacher={"model": wide}, student={"base": narrow, "vocabulary": "keep"})
    found = SentenceTransformer(folder, device="cpu")
    assert [type(module).__name__ for module in found] == ["Transformer", "Pooling", "Dense", "Normalize"]
    weight = found[2].linear.weight
    assert tuple(weight.shape) == (teacher_width, student_width)
    pooled = SentenceTransformer(narrow, device="cpu")
    wanted = torch.nn.functional.normalize(torch.from_numpy(pooled.encode(TEXTS)) @ weight.T.detach())
    np.testing.assert_allclose(plain(folder), wanted.numpy(), atol=1e-5)  # the teacher normalises before, which changes no direction
    assert encoder.load(folder).dimension == teacher_width


def test_the_projection_depends_on_the_seed_alone(build: Callable[..., Any], tmp_path: Path) -> None:
    narrow = str(tiny_checkpoint(tmp_path / "base", 16, layers=1))
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder, _ = build(run={"name": name, "seed": seed}, student={"base": narrow, "vocabulary": "keep"})
        found.append(SentenceTransformer(folder, device="cpu")[2].linear.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_bases_own_pooling_and_dense_modules_stay(build: Callable[..., Any], tmp_path: Path, teacher: str) -> None:
    torch.manual_seed(0)
    modules = [Transformer(teacher, max_seq_length=32), Pooling(32, ("cls", "mean")), Dense(64, 32), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "dense"), create_model_card=False)
    base = str(tmp_path / "dense")
    folder, _ = build(base, teacher={"model": base}, student={"vocabulary": "keep"})
    np.testing.assert_allclose(plain(folder), plain(base), atol=1e-6)


def test_dropout_is_the_recipes(build: Callable[..., Any]) -> None:
    for number, rate in enumerate((0.0, 0.25)):
        folder, _ = build(run={"name": f"run{number}"}, student={"vocabulary": "keep", "dropout": rate})
        body = SentenceTransformer(folder, device="cpu")[0].auto_model
        assert {module.p for module in body.modules() if isinstance(module, torch.nn.Dropout)} == {rate}
        assert body.config.attention_probs_dropout_prob == body.config.hidden_dropout_prob == rate


def test_without_dropout_training_mode_gives_the_same_vectors(build: Callable[..., Any]) -> None:
    folder, _ = build(student={"vocabulary": "keep"})
    found = encoder.load(folder, "float32")
    ids = torch.tensor(found.tokenize(["the heart has pain"]))
    assert torch.equal(found.train()(ids, torch.ones_like(ids)), found.eval()(ids, torch.ones_like(ids)))


def test_dropout_of_other_architectures() -> None:
    from transformers import DistilBertConfig, DistilBertModel

    body = DistilBertModel(DistilBertConfig(vocab_size=20, dim=8, n_heads=2, n_layers=3, hidden_dim=16))
    student.set_dropout(body, 0.0)
    assert (body.config.dropout, body.config.attention_dropout) == (0.0, 0.0)
    student.keep_layers(body, [1])
    assert (len(body.transformer.layer), body.config.num_hidden_layers) == (1, 1)


def test_a_modern_body_keeps_its_kinds_of_layers() -> None:
    from transformers import ModernBertConfig, ModernBertModel

    settings: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "pad_token_id": 0}
    body = ModernBertModel(ModernBertConfig(num_hidden_layers=4, global_attn_every_n_layers=3, **settings))
    kinds = list(body.config.layer_types)
    student.keep_layers(body, [0, 3])
    assert body.config.layer_types == [kinds[0], kinds[3]]


def test_a_student_is_built_once(build: Callable[..., Any]) -> None:
    folder, _ = build(student={"vocabulary": "keep"})
    weights = Path(folder) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again, _ = build(student={"vocabulary": "train"})
    assert again == folder
    assert weights.stat().st_mtime_ns == before


def test_refusals(build: Callable[..., Any]) -> None:
    with pytest.raises(Refused, match="max_length 65 is more than the model's 64 positions"):
        build(student={"vocabulary": "keep", "max_length": 65})
    with pytest.raises(Refused, match=r"train\.matryoshka: 32 is no prefix of vectors of length 32"):
        build(student={"vocabulary": "keep"}, train={"matryoshka": [8, 32]})


def roberta(folder: Path) -> str:
    """A body that counts positions from its padding token's id on, as XLM-R, CamemBERT and MPNet do."""
    from test_vocabulary import unigram
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    tokenizer = unigram()
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in names.items()})
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    XLMRobertaModel(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("vocabulary", ["trim", "train"])
def test_roberta_keeps_its_padding_id(build: Callable[..., Any], tmp_path: Path, vocabulary: str) -> None:
    base = roberta(tmp_path / "roberta")
    assert encoder.load(base).positions == 64
    folder, _ = build(base, teacher={"model": base}, student={"vocabulary": vocabulary, "max_length": 64})
    found = SentenceTransformer(folder, device="cpu")
    assert found.tokenizer.pad_token_id == found[0].auto_model.embeddings.padding_idx == 1
    np.testing.assert_allclose(encoder.load(folder, "float32").encode(TEXTS), plain(folder), atol=1e-5)
    if vocabulary == "trim":
        np.testing.assert_allclose(
            plain(folder), SentenceTransformer(base, device="cpu").encode(TEXTS, normalize_embeddings=True), atol=1e-5
        )
        assert len(found.tokenizer) < len(SentenceTransformer(base, device="cpu").tokenizer)


@pytest.mark.parametrize("vocabulary", ["keep", "trim"])
def test_a_base_that_lower_cases_makes_a_student_that_does(build: Callable[..., Any], tmp_path: Path, vocabulary: str) -> None:
    cased = tmp_path / "cased"
    shutil.copytree(tiny_checkpoint(tmp_path / "base"), cased)
    state = json.loads((cased / "tokenizer.json").read_text("utf-8"))
    (cased / "tokenizer.json").write_text(json.dumps(state | {"normalizer": {"type": "NFC"}}), "utf-8")
    settings = json.loads((cased / "sentence_bert_config.json").read_text("utf-8"))
    tokens = json.loads((cased / "tokenizer_config.json").read_text("utf-8"))
    tokens |= {"tokenizer_class": "BertTokenizer", "do_lower_case": False}  # as cased BERT checkpoints have it
    (cased / "tokenizer_config.json").write_text(json.dumps(tokens), "utf-8")
    (cased / "sentence_bert_config.json").write_text(json.dumps(settings | {"max_seq_length": 32, "do_lower_case": True}), "utf-8")
    folder, _ = build(str(cased), teacher={"model": str(cased)}, student={"vocabulary": vocabulary})
    one, two = (encoder.load(name, "float32") for name in (str(cased), folder))
    text = ["FEVER and Cough"]
    np.testing.assert_allclose(two.encode(text), one.encode(text), atol=1e-6)
    np.testing.assert_allclose(two.encode(text), two.encode(["fever and cough"]), atol=1e-6)
    assert shards._tokenizer(folder, 32).encode(text[0]).ids == two.tokenize(text)[0]


@pytest.mark.parametrize("names", [["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]])
def test_the_tokenizers_inputs_are_the_bases(build: Callable[..., Any], tmp_path: Path, names: list[str]) -> None:
    from transformers import AutoTokenizer

    folder = tiny_checkpoint(tmp_path / "base", plain=True)
    AutoTokenizer.from_pretrained(folder, model_input_names=names).save_pretrained(folder)
    found, _ = build(str(folder), teacher={"model": str(folder)}, student={"vocabulary": "trim"})
    again = SentenceTransformer(found, device="cpu")
    assert again.tokenizer.model_input_names == names
    np.testing.assert_allclose(encoder.load(found, "float32").encode(TEXTS), again.encode(TEXTS), atol=1e-5)


def test_distilbert_takes_no_token_types(build: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    folder = tmp_path / "distilbert"
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(tmp_path / "base", plain=True))
    tokenizer.save_pretrained(folder)
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_heads=2, n_layers=2, hidden_dim=32)).save_pretrained(folder)
    found, _ = build(str(folder), teacher={"model": str(folder)}, student={"vocabulary": "trim"})
    np.testing.assert_allclose(encoder.load(found, "float32").encode(TEXTS), plain(found), atol=1e-5)
