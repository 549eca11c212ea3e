"""A checkpoint brings back the model, the optimiser and the position, and training goes on as if nothing had been."""

import json
from pathlib import Path

import pytest
import torch

from xdist import checkpoint
from xdist.batching import Position
from xdist.errors import Refused


def make(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "peak": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "peak": 0.2},
    ]
    return model, torch.optim.AdamW(groups, lr=0.01, fused=True)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_round_trip_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer, range(5))
    checkpoint.save(str(tmp_path), model, optimizer, Position(1, 2, 3, 5))
    train(model, optimizer, range(5, 9))

    other, fresh = make(1)
    assert checkpoint.load(str(tmp_path), other, fresh) == Position(epoch=1, window=2, batch=3, step=5)
    assert [group["peak"] for group in fresh.param_groups] == [0.1, 0.2]
    train(other, fresh, range(5, 9))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimiser_state_is_equal(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer, range(3))
    checkpoint.save(str(tmp_path), model, optimizer, Position())
    other, fresh = make(1)
    checkpoint.load(str(tmp_path), other, fresh)
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys() == set(range(6))
    for index in old:
        assert old[index].keys() == new[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(old[index][name], new[index][name]) for name in old[index])
        assert old[index]["step"] == 3


def test_weights_alone(tmp_path: Path) -> None:
    model, optimizer = make(0)
    checkpoint.save(str(tmp_path), model, optimizer, Position())
    other, _ = make(1)
    checkpoint.load_weights(str(tmp_path), other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_no_pickle_is_written(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer, range(1))
    checkpoint.save(str(tmp_path), model, optimizer, Position())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer.safetensors", "state.json", "weights.safetensors"]


@pytest.mark.parametrize("version", [0, 99, None])
def test_another_version_is_refused(tmp_path: Path, version: int | None) -> None:
    model, optimizer = make(0)
    checkpoint.save(str(tmp_path), model, optimizer, Position())
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(
        json.dumps({key: value for key, value in state.items() if key != "version"} | {"version": version})
    )
    with pytest.raises(Refused, match=r"another version of xdist.*run\.name"):
        checkpoint.load(str(tmp_path), model, optimizer)
