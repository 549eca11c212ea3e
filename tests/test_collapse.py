"""Measures of collapse, where the answer is known."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from xdist import collapse
from xdist.config import Train
from xdist.errors import Collapsed
from xdist.train import refuse_collapse


def test_orthonormal_rows_have_cosine_zero_and_full_rank() -> None:
    rows = torch.eye(8, dtype=torch.float64)
    assert collapse.mean_cosine(rows).item() == pytest.approx(0)
    assert collapse.effective_rank(rows).item() == pytest.approx(7, rel=1e-4)  # centring takes one dimension


def test_equal_rows_have_cosine_one_and_rank_one() -> None:
    rows = normalize(torch.ones(5, 3))
    assert collapse.mean_cosine(rows).item() == pytest.approx(1)
    assert collapse.effective_rank(rows).item() == pytest.approx(1)


def test_mean_cosine_is_the_mean_over_pairs() -> None:
    rows = normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)))
    pairs = [(rows[i] @ rows[j]).item() for i in range(7) for j in range(7) if i != j]
    assert collapse.mean_cosine(rows).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert collapse.mean_cosine(rows[:1]).item() == pytest.approx(0, abs=1e-6)


def test_effective_rank_by_hand() -> None:
    # Rows ±3 and ±1 along two axes: centred already, singular values 3√2 and √2, shares 3/4 and 1/4.
    rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert collapse.effective_rank(rows).item() == pytest.approx(math.exp(entropy))


def test_effective_rank_does_not_see_the_mean() -> None:
    rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert collapse.effective_rank(rows + 100).item() == pytest.approx(collapse.effective_rank(rows).item(), rel=1e-4)


def test_measure_looks_at_the_first_rows_of_both_models() -> None:
    spread, point = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
    found = collapse.measure(torch.cat([spread, point]), torch.cat([point, spread]), most=4)
    assert {name: round(value.item(), 4) for name, value in found.items()} == {
        "student_cosine": 0, "student_rank": 3, "teacher_cosine": 1, "teacher_rank": 1,
    }  # fmt: skip


def test_what_is_not_finite_has_no_rank_and_is_refused_at_once() -> None:
    vectors = normalize(torch.randn(8, 4), dim=1)
    broken = vectors.clone()
    broken[3, 1] = torch.nan
    measured = {name: float(value) for name, value in collapse.measure(broken, vectors).items()}
    assert math.isnan(measured["student_rank"])
    with pytest.raises(Collapsed, match="effective rank nan"):
        refuse_collapse(measured, 1, Train(warmup_steps=100))
