"""Distillation losses. Pure functions of unit vectors; `s` student and `t` teacher, both of shape (batch, dimension), float32.

    cosine            mean (1 - s·t)                                     direction of each vector
    mse               mean over the batch of |s - t|²                    the classic of Reimers & Gurevych 2020 (2004.09813)
    similarity        mean (S Sᵀ - T Tᵀ)²                                structure within the batch (Jasper/Stella 2412.19048)
    contrastive       InfoNCE, the teacher's vectors as keys             DistilCSE (2112.05638)
    soft_contrastive  cross entropy softmax(T Tᵀ/τ) → softmax(S Tᵀ/τ)    IMASCL (2405.16155)
    soft_labels       KL(classes of t ‖ classes of s), by the task's head   self-teaching of FILTER (2009.05166)

None of them depends on the dimension: with unit vectors, MSE summed over dimensions is 2 × cosine. (Averaged over
dimensions, as it often is, its signal shrinks with the dimension and students collapse.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax, normalize

Head = tuple[Tensor, Tensor]  # weights (classes, dimension) and bias (classes)


def cosine(s: Tensor, t: Tensor) -> Tensor:
    """Mean cosine distance, in [0, 2]."""
    return (1 - (s * t).sum(-1)).mean()


def mse(s: Tensor, t: Tensor) -> Tensor:
    """Squared distance summed over dimensions, averaged over the batch, in [0, 4]."""
    return (s - t).square().sum(-1).mean()


def similarity(s: Tensor, t: Tensor) -> Tensor:
    """Mean squared difference of the two matrices of pairwise cosines."""
    return (s @ s.T - t @ t.T).square().mean()


def contrastive(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """InfoNCE over the batch. Texts of one group share their target, so equal targets are not each other's negatives."""
    logits = s @ t.T / temperature
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    same = (t @ t.T > 1 - 1e-4) & ~itself
    return cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(s), device=s.device))


def soft_contrastive(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Cross entropy between the teacher's and the student's distribution over the batch."""
    wanted = (t @ t.T / temperature).softmax(-1)
    return -(wanted * log_softmax(s @ t.T / temperature, -1)).sum(-1).mean()


def soft_labels(s: Tensor, t: Tensor, head: Head) -> Tensor:
    """Mean Kullback-Leibler divergence from the head's class probabilities of the teacher's vector to those of the student's."""
    wanted, found = (log_softmax(linear(vectors, *head), -1) for vectors in (t, s))
    return kl_div(found, wanted, log_target=True, reduction="batchmean")


def total(
    s: Tensor, t: Tensor, weights: dict[str, float], temperature: float = 0.05, prefixes: Sequence[int] = (), head: Head | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the named losses, and each term by itself (on the full vector, detached).

    `prefixes` are Matryoshka lengths (2205.13147): the same loss on the renormalised beginning of both vectors, averaged
    with the full one. `head` (weights, bias) of a classifier on the full vector is what soft_labels needs.
    """
    terms = _terms(s, t, weights, temperature)
    if head and weights.get("soft_labels"):
        terms["soft_labels"] = soft_labels(s, t, head)
    losses = [_weighted(terms, weights)]
    for length in prefixes:
        losses.append(_weighted(_terms(normalize(s[:, :length]), normalize(t[:, :length]), weights, temperature), weights))
    return torch.stack(losses).mean(), {name: value.detach() for name, value in terms.items()}


def _weighted(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def _terms(s: Tensor, t: Tensor, weights: dict[str, float], temperature: float) -> dict[str, Tensor]:
    plain = {"cosine": cosine, "mse": mse, "similarity": similarity}
    tempered = {"contrastive": contrastive, "soft_contrastive": soft_contrastive}
    terms = {name: function(s, t) for name, function in plain.items() if weights.get(name)}
    return terms | {name: function(s, t, temperature) for name, function in tempered.items() if weights.get(name)}
