"""The floor under a transformer's time: the operations of its matrix products on real tokens ÷ the rate at which this machine
multiplies matrices of those shapes, measured in the same run."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

ROWS = (1024, 2048, 4096)  # tokens of a product; the fastest counts


def products(config: Any) -> list[tuple[int, int]]:
    """(input, output) width of a layer's linear products: queries, keys and values as one, attention's output, wide, narrow."""
    width, wide = config.hidden_size, config.intermediate_size
    return [(width, 3 * width), (width, width), (width, wide), (wide, width)]


def operations(config: Any, lengths: Sequence[int]) -> float:
    """Of one forward pass over texts of so many tokens, a multiplication and an addition counted as two: linear products, and
    attention's logits and sums. What is not a matrix product is left out."""
    sizes = np.asarray(lengths, dtype=np.float64)
    linears = 2 * sizes.sum() * sum(a * b for a, b in products(config))
    attention = 2 * 2 * np.square(sizes).sum() * config.hidden_size
    return float(config.num_hidden_layers * (linears + attention))


def matmul_rate(config: Any, dtype: torch.dtype, device: str, enough: float = 0.5) -> float:
    """Operations per second of a layer's linear products one after the other, nothing between them: the best pass of those that
    `enough` seconds hold for each number of rows."""
    best = 0.0
    with torch.inference_mode():
        for rows in ROWS:
            pairs = [
                (torch.randn(rows, a, device=device).to(dtype), torch.randn(b, a, device=device).to(dtype)) for a, b in products(config)
            ]
            count = 2 * rows * sum(a * b for a, b in products(config))
            deadline = time.perf_counter() + enough
            while time.perf_counter() < deadline:
                settle()
                started = time.perf_counter()
                for x, weight in pairs:
                    linear(x, weight)
                settle()
                best = max(best, count / (time.perf_counter() - started))
    return best


def settle() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
