"""One way to say what came: shape, dtype and device of a tensor in words."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def whole(value: object) -> object:
    """An integer of any kind (numpy's) as Python's int; anything else as it is, for the checks that follow.

    >>> import numpy as np
    >>> whole(np.int64(3))
    3
    """
    if type(value) is int or isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return value
    return int(value)


def is_dense(tensor: Tensor) -> bool:
    """Not sparse, not nested: what the operations can read."""
    return tensor.layout is torch.strided and not tensor.is_nested


def describe(value: object) -> str:
    """ "[100, 12] float64 on cpu" for a tensor, the type's name for anything else.

    >>> describe(torch.zeros(100, 12))
    '[100, 12] float32 on cpu'
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested tensor {dtype_name(value.dtype)} on {value.device}"
        kind = "" if value.layout is torch.strided else f" ({dtype_name(value.layout)})"
        return f"{list(value.shape)} {dtype_name(value.dtype)} on {value.device}{kind}"
    return type(value).__name__


def check_like(name: str, tensor: Tensor, shapes: tuple[tuple[int, ...], ...], like: Tensor) -> Tensor:
    """`tensor`, which must have one of `shapes` and the dtype and device of `like`."""
    if not isinstance(tensor, Tensor) or (
        tensor.shape not in shapes or tensor.dtype != like.dtype or tensor.device != like.device
    ):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {expected} {dtype_name(like.dtype)} on {like.device}, got {describe(tensor)}")
    return tensor
