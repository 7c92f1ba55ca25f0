"""The state of a model, taken before an operation and compared afterwards."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Same:
    """Equal to what holds the same object; keeps it alive, so that no other one gets its id."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def snapshot(model: object) -> dict[Any, Any]:
    """All that an operation could change in a model and around it.

    For each part its class and its attributes, for each tensor its bits, its gradient and how often
    it was changed in place; the random states, and whether gradients are recorded.
    """
    state: dict[Any, Any] = {"random": random_states(), "grad": torch.is_grad_enabled()}
    if not isinstance(model, nn.Module):
        return state
    for path, module in model.named_modules():
        state[path] = type(module)
        for name, value in vars(module).items():
            # Parts and tensors have entries of their own.
            listed = name in ("_modules", "_parameters", "_buffers")
            state[path, name] = Same(value), b"" if listed else _content(value)
            if isinstance(value, dict):
                state[path, name, "items"] = [(key, Same(part)) for key, part in value.items()]
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[path, "value"] = _bits(tensor), tensor.requires_grad, tensor._version
        state[path, "gradient"] = Same(tensor.grad), _bits(tensor.grad)
    return state


def assert_unchanged(model: object, before: dict[Any, Any]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name] == value, name


def random_states() -> list[bytes]:
    states = [*map(_bits, [torch.get_rng_state(), *_cuda_states()])]
    return [*states, pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())]  # noqa: NPY002


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _bits(tensor: Tensor | None) -> bytes:
    if tensor is None or tensor.is_meta:
        return b""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _content(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception:  # of locks, local functions and the like
        return b""
