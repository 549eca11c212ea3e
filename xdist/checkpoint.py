"""What a checkpoint holds: weights, optimiser state and the position in the order of training. Safetensors and JSON only.

weights.safetensors     the student's parameters, float32
optimizer.safetensors   AdamW's two moments and step of each parameter
state.json              version, position
"""

import json
import os
from dataclasses import asdict

import torch
from safetensors.torch import load_file, save_file

from xdist.batching import Position
from xdist.errors import Refused

VERSION = 1


def save(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Write a checkpoint into an existing folder."""
    save_file(_owned(model.state_dict()), os.path.join(folder, "weights.safetensors"))
    state = optimizer.state_dict()["state"]
    flat = {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
    save_file(_owned(flat), os.path.join(folder, "optimizer.safetensors"))
    with open(os.path.join(folder, "state.json"), "w", encoding="utf-8") as stream:
        json.dump({"version": VERSION, "position": asdict(position)}, stream)


def load(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Restore weights and optimiser in place; gives the position. Raises Refused for a version
    that this code does not read."""
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as stream:
        state = json.load(stream)
    if state.get("version") != VERSION:
        raise Refused(f"{folder} was written by another version of xdist; continue with that version, or start under a new run.name")
    load_weights(folder, model)
    current = optimizer.state_dict()
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(os.path.join(folder, "optimizer.safetensors")).items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})
    return Position(**state["position"])


def load_weights(folder: str, model: torch.nn.Module) -> None:
    """Restore the weights alone."""
    model.load_state_dict(load_file(os.path.join(folder, "weights.safetensors")))


def _owned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
