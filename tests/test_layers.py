"""The layers against the checkpoint's own modules: values, gradients, masks, and when they step aside."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, XLMRobertaConfig, XLMRobertaModel

from xdist import encoder, layers

FAST = encoder.chosen_dtype("auto", "cpu") == torch.bfloat16
needs_bf16 = pytest.mark.skipif(not FAST, reason="this CPU does not compute in bfloat16")

SIZES = {"vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**settings: Any) -> BertModel:
    return BertModel(BertConfig(**(SIZES | QUIET | settings)))


def roberta(**settings: Any) -> XLMRobertaModel:
    return XLMRobertaModel(XLMRobertaConfig(**(SIZES | QUIET | settings), pad_token_id=1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def lively(body: torch.nn.Module) -> Any:
    """Random weights large enough that every part matters: those of an untrained model hardly do."""
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return body


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Five rows of token ids, each shorter than the one before, and their mask; padded with id 1."""
    ids, mask = torch.randint(3, 90, (5, length)), torch.ones(5, length, dtype=torch.long)
    for row in range(1, 5):
        ids[row, length - row :], mask[row, length - row :] = 1, 0
    return ids, mask


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("length", [7, 31, 32, 50])
def test_values_and_gradients_are_those_of_the_modules(make: Callable[[], Any], length: int) -> None:
    body = lively(make())
    ids, mask = batch(length)
    wanted_vectors = torch.randn(5, 48)

    def pooled(hidden: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weights = mask[..., None].float()
        vectors = (hidden.float() * weights).sum(1) / weights.sum(1)
        body.zero_grad()
        (1 - cosine_similarity(vectors, wanted_vectors)).mean().backward()
        gradients = {name: p.grad.clone() for name, p in body.named_parameters() if p.grad is not None}
        return vectors.detach(), gradients

    modules, module_gradients = pooled(body(input_ids=ids, attention_mask=mask).last_hidden_state)  # float32
    ours, our_gradients = pooled(layers.hidden(body, ids, mask))
    assert cosine_similarity(ours, modules).min() > 0.999
    assert our_gradients.keys() == module_gradients.keys()
    for name, gradient in module_gradients.items():
        assert our_gradients[name].dtype == torch.float32
        if "key.bias" not in name:  # it moves all logits of a row alike: its gradient is nothing but rounding
            assert cosine_similarity(our_gradients[name].ravel(), gradient.ravel(), dim=0) > 0.99, name
            assert float(our_gradients[name].norm()) == pytest.approx(float(gradient.norm()), rel=0.05), name


@needs_bf16
@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("length", [7, 32, 50])
def test_packed_weights_give_the_values_of_the_modules(make: Callable[[], Any], length: int) -> None:
    body = lively(make())
    ids, mask = batch(length)
    seen = mask.bool()
    with torch.inference_mode():
        modules = body(input_ids=ids, attention_mask=mask).last_hidden_state[seen]
        packed = layers.Packed(body).hidden(ids, mask)[seen]
        assert packed.dtype == torch.bfloat16
        assert cosine_similarity(packed.float(), modules, dim=-1).min() > 0.999
        assert cosine_similarity(packed.float(), layers.hidden(body, ids, mask)[seen].float(), dim=-1).min() > 0.999


@needs_bf16
def test_padding_changes_nothing() -> None:
    body = lively(bert())
    ids, mask = batch(12)
    with torch.no_grad():
        for hidden in (functools.partial(layers.hidden, body), layers.Packed(body).hidden):
            alone = hidden(ids[4:, :8], mask[4:, :8])
            beside = hidden(ids, mask)[4:, :8]
            assert cosine_similarity(alone.float(), beside.float(), dim=-1).min() > 0.9999


@needs_bf16
def test_an_encoder_that_trains_encodes_with_its_weights_of_the_moment(teacher: str) -> None:
    found = encoder.load(teacher, "bfloat16").eval()
    before = found.encode(["fever and cough"])
    with torch.no_grad():
        for layer in found.body.encoder.layer:
            layer.output.dense.weight += 0.1 * torch.randn_like(layer.output.dense.weight)
    ids = torch.tensor(found.tokenize(["fever and cough"]))
    after = torch.from_numpy(found.encode(["fever and cough"]))
    assert cosine_similarity(after, torch.from_numpy(before)).item() < 0.999
    assert cosine_similarity(after, found(ids, torch.ones_like(ids)).detach()).item() > 0.9999


def test_which_models_fit() -> None:
    assert layers.fits(bert())
    assert layers.fits(roberta())
    assert not layers.fits(bert(hidden_act="relu"))
    assert not layers.fits(bert(is_decoder=True))
    assert not layers.fits(DistilBertModel(DistilBertConfig(vocab_size=20, dim=8, n_heads=2, n_layers=1, hidden_dim=16)))


@needs_bf16
def test_an_encoder_uses_them_only_where_they_compute_the_same(teacher: str, tmp_path: Path) -> None:
    assert encoder.load(teacher, "bfloat16").kernels == "fused layers"
    assert encoder.load(teacher, "bfloat16", "eager").kernels == "eager attention"
    assert encoder.load(teacher, "float32").kernels == "eager attention"

    found = encoder.load(str(tiny_checkpoint(tmp_path)), "bfloat16")  # as BERT comes: dropout 0.1
    ids = torch.randint(5, 100, (4, 9))
    mask = torch.ones_like(ids)
    assert found.dropout
    found.train()
    assert not torch.equal(found(ids, mask), found(ids, mask))
    found.eval()
    assert torch.equal(found(ids, mask), found(ids, mask))
