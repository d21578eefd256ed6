"""A training run on disk: one safetensors file, replaced as a whole, from which the run goes on as if uninterrupted."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # of Muon and AdamW, per parameter


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    trained_s: float = 0.0  # time spent training, over all interruptions
    recipe: str = ""  # a run goes on with the recipe that it began with


def save(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], position: Position) -> None:
    """Write beside `path`, then rename: `path` is always whole."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": state[key] for key in _STATE if key in state}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata={"position": json.dumps(asdict(position))},
    )
    temporary.replace(path)


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Put the saved weights into `model`."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model/{name}"))


def load(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> Position:
    """Put the saved state into `model` and `optimizers`."""
    load_weights(path, model)
    with safe_open(path, framework="pt") as file:
        position = Position(**json.loads(file.metadata()["position"]))
        names = set(file.keys())
        parameters = dict(model.named_parameters())
        for optimizer in optimizers:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, parameter in parameters.items():
                saved = [key for key in _STATE if f"{key}/{name}" in names and id(parameter) in own]
                if saved:
                    state = {key: file.get_tensor(f"{key}/{name}").to(parameter.device) for key in saved}
                    optimizer.state[parameter] = {"step": torch.tensor(float(position.step)), **state}
    return position
