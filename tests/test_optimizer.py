"""The optimiser of the token table touches the batch's rows alone, and is Adam on them."""

import copy
from types import SimpleNamespace
from typing import Any

import torch

from xdist.config import Train
from xdist.optimizer import Optimizer, RowEmbedding, Rows


def table(rows: int = 10, dimension: int = 4) -> RowEmbedding:
    torch.manual_seed(0)
    return RowEmbedding.replacing(torch.nn.Embedding(rows, dimension)).train()


def test_rows_that_are_always_touched_move_as_adam_moves_them() -> None:
    ours, theirs = table(3), torch.nn.Embedding(3, 4)
    theirs.weight.data.copy_(ours.weight)
    rows, adam = Rows(ours, lr=0.1), torch.optim.Adam(theirs.parameters(), lr=0.1, betas=(0.9, 0.99))
    for seed in range(5):
        target = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        ids = torch.tensor([0, 2, 1, 2])
        (ours(ids) - target).square().sum().backward()
        rows.collect(world=1)
        rows.step(1.0)
        (theirs(ids) - target).square().sum().backward()
        adam.step()
        adam.zero_grad()
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_other_rows_do_not_move_and_start_their_own_count() -> None:
    ours = table()
    before = ours.weight.clone()
    rows = Rows(ours, lr=0.1)
    for ids in ([1, 2], [2, 3]):
        ours(torch.tensor(ids)).sum().backward()
        rows.collect(world=1)
        rows.step(1.0)
    assert rows.count.tolist() == [0, 1, 2, 1, 0, 0, 0, 0, 0, 0]
    changed = (ours.weight != before).any(1)
    assert changed.tolist() == [False, True, True, True, False, False, False, False, False, False]
    # Adam's first step is lr × sign of the gradient, whenever it comes.
    torch.testing.assert_close(ours.weight[3], before[3] - 0.1)
    torch.testing.assert_close(ours.weight[1], before[1] - 0.1)


def test_forward_passes_of_one_step_add_up() -> None:
    ours = table()
    rows = Rows(ours, lr=0.1)
    for ids in ([1, 1, 4], [4]):
        ours(torch.tensor(ids)).sum().backward()
    gradient = rows.collect(world=1)
    assert rows.ids.tolist() == [1, 4]
    assert gradient[:, 0].tolist() == [2.0, 2.0]
    assert ours.pending == []


def test_no_gradient_is_kept_in_evaluation() -> None:
    ours = table().eval()
    ours(torch.tensor([1]))
    with torch.no_grad():
        ours.train()(torch.tensor([1]))
    assert ours.pending == []


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 4)

    def get_input_embeddings(self) -> Any:
        return self.table

    def set_input_embeddings(self, table: Any) -> None:
        self.table = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids))


class Student(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Body()

    @property
    def model(self) -> list[Any]:
        return [SimpleNamespace(auto_model=self.body)]


def test_both_parts_are_clipped_by_their_common_norm() -> None:
    student = Student().train()
    optimizer = Optimizer(student, Train(clip=0.5), new_rows=True)
    reference = Student()
    ids = torch.tensor([0, 1, 1])
    (100 * student.body(ids)).sum().backward()
    (100 * reference.body(ids)).sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    torch.testing.assert_close(optimizer.step(1.0), expected)
    torch.testing.assert_close(optimizer.rows.gradient, reference.body.table.weight.grad[:2] * 0.5 / (expected + 1e-6))


def test_state_round_trip_goes_on_alike() -> None:
    students = [Student().train(), Student().train()]
    optimizers = [Optimizer(student, Train(), new_rows=True) for student in students]

    def go(which: int, steps: int) -> None:
        for _ in range(steps):
            students[which].body(torch.tensor([0, 3])).square().sum().backward()
            optimizers[which].step(1.0)

    go(0, 3)
    students[1].load_state_dict(students[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    go(0, 2)
    go(1, 2)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(one, other)
