"""Checkpoints: one safetensors file that holds the whole state of a run, replaced as a whole or not at all.

Nested dicts and lists of tensors, numbers and strings are stored as flat named tensors plus one JSON text. Reading such
a file runs no code, so a run folder from a stranger is safe to open.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from .files import write_atomically

TENSOR_MARK = "__tensor__"  # stands in the JSON text where a tensor was


def save_checkpoint(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors, numbers, strings, booleans and None.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "checkpoint.safetensors"
        >>> save_checkpoint(path, {"step": 3, "model": {"weight": torch.ones(2)}})
        >>> load_checkpoint(path)["model"]["weight"]
        tensor([1., 1.])
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _take_tensors(state, "", tensors)
    write_atomically(path, save(tensors, metadata={"state": json.dumps(skeleton)}))


def load_checkpoint(path: pathlib.Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote.

    Raises:
        CheckpointError: there is no such file, or it is not a checkpoint of this package.
    """
    if not path.is_file():
        raise CheckpointError(f'no checkpoint at "{path}"')
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            skeleton = json.loads((file.metadata() or {})["state"])
        state = _put_tensors(skeleton, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f'"{path}" is not a readable checkpoint: {reason}') from error
    if not isinstance(state, dict):
        raise CheckpointError(f'"{path}" is not a checkpoint of jlebm_fast')
    return state


def _take_tensors(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON skeleton of `node`; its tensors go to `tensors` under their path."""
    if isinstance(node, Tensor):
        tensors[name] = node.detach().to("cpu", copy=True).contiguous()
        return {TENSOR_MARK: name}
    if isinstance(node, dict):
        # Keys may be integers (optimiser state), which JSON would turn into strings: keep pairs.
        return {"items": [[key, _take_tensors(value, f"{name}.{key}", tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return [_take_tensors(value, f"{name}.{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a checkpoint holds tensors, numbers, strings and None, got {type(node).__name__} at {name}")


def _put_tensors(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if TENSOR_MARK in node:
            return tensors[node[TENSOR_MARK]]
        return {key: _put_tensors(value, tensors) for key, value in node["items"]}
    if isinstance(node, list):
        return [_put_tensors(value, tensors) for value in node]
    return node
