"""Losses against closed forms and torch primitives written out by hand."""

from collections.abc import Callable

import pytest
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from xdist import loss
from xdist.config import LOSSES

TEMPERATURE = 0.1


def vectors(rows: int = 6, dimension: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, rows, dimension, generator=generator, dtype=torch.float64)
    return normalize(s), normalize(t)


def head() -> tuple[Tensor, Tensor]:
    """Weights and bias of a classifier of three classes."""
    weights, bias = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).split([8, 1], dim=1)
    return weights, bias[:, 0]


def test_cosine_and_mse_by_hand() -> None:
    s, t = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert loss.cosine(s, t).item() == pytest.approx((1.0 + 0.4) / 2)
    assert loss.mse(s, t).item() == pytest.approx((2.0 + 0.8) / 2)  # (1 + 1), (0.16 + 0.64)


def test_mse_is_twice_the_cosine_loss_of_unit_vectors() -> None:
    assert loss.mse(*vectors()).item() == pytest.approx(2 * loss.cosine(*vectors()).item())


def test_similarity_by_hand() -> None:
    s, t = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert loss.similarity(s, t).item() == pytest.approx(2 * 0.6**2 / 4)  # two of four cosines differ by 0.6


def test_similarity_does_not_see_a_common_rotation() -> None:
    s, _ = vectors()
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert loss.similarity(s @ rotation, s).item() == pytest.approx(0, abs=1e-12)


def test_contrastive_is_cross_entropy_over_the_batch() -> None:
    s, t = vectors()
    logits = torch.stack([torch.stack([(a * b).sum() / TEMPERATURE for b in t]) for a in s])
    wanted = sum(torch.logsumexp(logits[i], 0) - logits[i, i] for i in range(6)) / 6
    assert loss.contrastive(s, t, TEMPERATURE).item() == pytest.approx(float(wanted))


def test_contrastive_equal_targets_are_no_negatives() -> None:
    s, t = vectors(rows=4)
    t = t[[0, 1, 1, 3]]
    wanted = 0.0
    for row, keys in enumerate(([0, 1, 2, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3])):  # rows 1 and 2 share a target
        wanted += cross_entropy((s[row] @ t[keys].T / TEMPERATURE)[None], torch.tensor([keys.index(row)])).item() / 4
    assert loss.contrastive(s, t, TEMPERATURE).item() == pytest.approx(wanted)


def test_soft_contrastive_is_cross_entropy_of_the_two_distributions() -> None:
    s, t = vectors()
    p, q = torch.exp(t @ t.T / TEMPERATURE), torch.exp(s @ t.T / TEMPERATURE)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    assert loss.soft_contrastive(s, t, TEMPERATURE).item() == pytest.approx(-(p * q.log()).sum().item() / 6)


def test_soft_contrastive_is_least_where_the_student_is_the_teacher() -> None:
    _, t = vectors()
    p = (t @ t.T / TEMPERATURE).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert loss.soft_contrastive(t, t, TEMPERATURE).item() == pytest.approx(entropy)
    assert loss.soft_contrastive(vectors()[0], t, TEMPERATURE).item() > entropy


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_depend_on_the_dimension(name: str) -> None:
    s, t = vectors()
    wider, (weights, bias) = [torch.cat([side, torch.zeros(6, 100, dtype=side.dtype)], 1) for side in (s, t)], head()
    wide_head = torch.cat([weights, torch.ones(3, 100, dtype=weights.dtype)], 1), bias
    narrow = loss.total(s, t, {name: 1.0}, head=(weights, bias))[0]
    assert loss.total(*wider, {name: 1.0}, head=wide_head)[0].item() == pytest.approx(narrow.item())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_student_and_descend(name: str) -> None:
    s, t = vectors()
    weight = s.clone().requires_grad_()

    def value() -> Tensor:
        return loss.total(normalize(weight), t, {name: 1.0}, TEMPERATURE, head=head())[0]

    before = value()
    before.backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    assert (weight.grad.abs().sum(1) > 0).all()
    weight.data -= 0.01 * weight.grad
    assert value() < before


def test_gradient_is_finite_where_all_targets_are_equal() -> None:
    s, t = vectors(rows=3)
    s.requires_grad_()
    value = loss.contrastive(s, t[[0, 0, 0]], TEMPERATURE)
    value.backward()
    assert value.item() == pytest.approx(0)
    assert torch.isfinite(s.grad).all()


def test_total_weighs_its_terms_and_shows_them() -> None:
    s, t = vectors()
    value, terms = loss.total(s.requires_grad_(), t, {"cosine": 2.0, "similarity": 10.0, "mse": 0.0})
    assert set(terms) == {"cosine", "similarity"}
    assert value.item() == pytest.approx(2 * loss.cosine(s, t).item() + 10 * loss.similarity(s, t).item())
    assert value.requires_grad
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("term", [loss.cosine, loss.similarity])
def test_matryoshka_averages_the_loss_of_renormalised_prefixes(term: Callable[[Tensor, Tensor], Tensor]) -> None:
    s, t = vectors()
    value, terms = loss.total(s, t, {term.__name__: 3.0}, prefixes=[2, 5])
    each = [term(s, t)]
    for length in (2, 5):
        a, b = s[:, :length], t[:, :length]
        each.append(term(a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)))
    assert value.item() == pytest.approx(3 * sum(part.item() for part in each) / 3)
    assert terms[term.__name__].item() == pytest.approx(each[0].item())  # shown on the full vector


def test_soft_labels_are_the_divergence_of_class_probabilities() -> None:
    s, t = vectors()
    weights, bias = head()
    p, q = (torch.from_numpy(softmax((vectors @ weights.T + bias).numpy(), axis=1)) for vectors in (t, s))
    wanted = float((p * (p / q).log()).sum(1).mean())
    assert loss.soft_labels(s, t, (weights, bias)).item() == pytest.approx(wanted, rel=1e-9)
    assert loss.soft_labels(t, t, (weights, bias)).item() == pytest.approx(0, abs=1e-6)
    value, terms = loss.total(s, t, {"cosine": 1.0, "soft_labels": 2.0}, head=(weights, bias))
    assert value.item() == pytest.approx(loss.cosine(s, t).item() + 2 * wanted, rel=1e-4)
    assert set(terms) == {"cosine", "soft_labels"}
