"""The optimiser: fused AdamW for the body, and for the token table an Adam that touches only the rows in the batch.

A vocabulary has tens of thousands of rows and a batch uses a few thousand of them. A dense gradient of the table would
be written, clipped, reduced over workers and stepped in full at every step; here all of that is as large as the batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from xdist.config import Train


class RowEmbedding(nn.Embedding):
    """An embedding table whose gradient, while training, is kept for the batch's rows alone."""

    @classmethod
    def replacing(cls, old: nn.Embedding) -> "RowEmbedding":
        """The same table, frozen for autograd: its rows are stepped by `Rows`."""
        table = cls(1, old.embedding_dim, padding_idx=None)
        table.num_embeddings, table.padding_idx = old.num_embeddings, old.padding_idx
        table.weight = nn.Parameter(old.weight.detach(), requires_grad=False)
        table.pending = []
        return table

    pending: list[tuple[Tensor, Tensor]]
    """(row ids, rows with gradient) of each forward pass since the last step."""

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ids, shape (*ids.shape, dimension)."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(ids)
        touched, place = torch.unique(ids, return_inverse=True)
        rows = self.weight[touched].requires_grad_()
        self.pending.append((touched, rows))
        return embedding(place, rows)


class Rows:
    """Adam on the rows that a step touched, with a step count and bias correction of each row's own (cf. SparseAdam)."""

    def __init__(self, table: RowEmbedding, lr: float, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        self.table, self.lr, self.betas, self.eps = table, lr, betas, eps
        self.first, self.second = torch.zeros_like(table.weight), torch.zeros_like(table.weight)
        self.count = torch.zeros(len(table.weight), device=table.weight.device)
        self.ids = torch.empty(0, dtype=torch.long, device=table.weight.device)
        self.gradient = torch.empty(0, table.embedding_dim, device=table.weight.device)

    def collect(self, world: int) -> Tensor:
        """The gradient (rows, dimension) of all forward passes since the last step, averaged over workers."""
        ids = torch.cat([touched for touched, _ in self.table.pending])
        gradient = torch.cat([rows.grad if rows.grad is not None else torch.zeros_like(rows) for _, rows in self.table.pending])
        self.table.pending.clear()
        if world > 1:
            ids, gradient = _from_all(ids, gradient, world)
        self.ids, place = torch.unique(ids, return_inverse=True)
        self.gradient = torch.zeros(len(self.ids), gradient.shape[1], device=gradient.device).index_add_(0, place, gradient) / world
        return self.gradient

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the collected rows by `rate` × the peak learning rate."""
        ids, gradient, (b1, b2) = self.ids, self.gradient, self.betas
        self.count[ids] += 1
        count = self.count[ids, None]
        first = self.first[ids].lerp_(gradient, 1 - b1)
        second = self.second[ids].lerp_(gradient.square(), 1 - b2)
        self.first[ids], self.second[ids] = first, second
        scale = (second / (1 - b2**count)).sqrt_().add_(self.eps)
        self.table.weight[ids] -= self.lr * rate * (first / (1 - b1**count)) / scale


def _from_all(ids: Tensor, gradient: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """Every worker's rows, in the order of ranks; workers touch different numbers of rows, so they are padded."""
    import torch.distributed as dist

    sizes = [torch.zeros(1, dtype=torch.long, device=ids.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(ids)], device=ids.device))
    longest = int(max(sizes))
    padded_ids = torch.cat([ids, ids.new_zeros(longest - len(ids))])
    padded = torch.cat([gradient, gradient.new_zeros(longest - len(gradient), gradient.shape[1])])
    all_ids, all_gradients = ([torch.empty_like(tensor) for _ in range(world)] for tensor in (padded_ids, padded))
    dist.all_gather(all_ids, padded_ids)
    dist.all_gather(all_gradients, padded)
    kept = [slice(int(size)) for size in sizes]
    return (
        torch.cat([found[part] for found, part in zip(all_ids, kept, strict=True)]),
        torch.cat([found[part] for found, part in zip(all_gradients, kept, strict=True)]),
    )


class Optimizer:
    """Both parts as one: clip by their common norm, step, and hand over the state for a checkpoint."""

    def __init__(self, student: Any, settings: Train, new_rows: bool, world: int = 1):
        body = student.model[0].auto_model
        table = RowEmbedding.replacing(body.get_input_embeddings())
        body.set_input_embeddings(table)
        self.rows = Rows(table, (settings.embedding_lr or 10 * settings.lr) if new_rows else settings.lr)
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, fused=True)
        self.settings, self.world = settings, world

    def step(self, rate: float) -> Tensor:
        """One step at `rate` × the peak learning rates, with gradients clipped; gives their norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None] + [self.rows.collect(self.world)]
        norm = get_total_norm(gradients)
        scale = torch.clamp(self.settings.clip / (norm + 1e-6), max=1.0)
        clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
        self.rows.gradient *= scale
        for group in self.adam.param_groups:
            group["lr"] = self.settings.lr * rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.rows.step(rate)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """State as torch's optimisers give it; the table's comes behind the body's parameters."""
        state = self.adam.state_dict()
        state["state"][len(self.parameters)] = {"first": self.rows.first, "second": self.rows.second, "count": self.rows.count}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        entries = dict(state["state"])
        for name, value in entries.pop(len(self.parameters)).items():
            getattr(self.rows, name).copy_(value)
        self.adam.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
