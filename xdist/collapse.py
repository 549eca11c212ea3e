"""Is the student mapping everything to one point? Two measures of a batch of unit vectors, against the teacher's."""

import math

import torch
from torch import Tensor


def mean_cosine(vectors: Tensor) -> Tensor:
    """Mean cosine over pairs of different rows of unit vectors (n, d): near 0 for spread vectors, 1 when all are equal."""
    n = len(vectors)
    return (vectors.sum(0).square().sum() - n) / max(1, n * (n - 1))


def effective_rank(vectors: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values of the centred rows (Roy & Vetterli 2007); NaN where a
    value is not finite."""
    if not vectors.isfinite().all():
        return vectors.new_tensor(math.nan)
    values = torch.linalg.svdvals((vectors - vectors.mean(0)).float())
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(share * torch.log(share.clamp_min(1e-12))).sum())


def measure(student: Tensor, teacher: Tensor, most: int = 256) -> dict[str, Tensor]:
    """Both measures for both models, on at most the first `most` rows."""
    found = {}
    for name, vectors in (("student", student[:most]), ("teacher", teacher[:most])):
        found[f"{name}_cosine"], found[f"{name}_rank"] = mean_cosine(vectors), effective_rank(vectors)
    return found
