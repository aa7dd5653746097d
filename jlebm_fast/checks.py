"""One way to say what came: shape, dtype and device of a tensor in words."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float64)
TENSOR_CLASSES = (Tensor, torch.nn.Parameter)  # torch's own, whose memory is all there is to them


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


def traced(value: object) -> bool:
    """Whether it is an integer of a graph that is being made, whose value comes when the graph runs: checked then."""
    return isinstance(value, torch.SymInt)


def is_dense(tensor: Tensor) -> bool:
    """Not sparse, not nested: what the operations can read."""
    return tensor.layout is torch.strided and not tensor.is_nested


def has_memory(tensor: Tensor) -> bool:
    """Whether its class is one whose values stand in memory: a DTensor, a quantised weight compute in their own way."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it: row after row, with its sign (torch keeps the imaginary part of a conjugate as its
    negative), and with the zeros that autograd writes down without making them.

    Raises:
        ValueError: it has no memory.
    """
    if not has_memory(tensor):
        raise ValueError(
            f"a tensor whose memory the kernels can read was expected, got a {type(tensor).__name__} "
            f"{describe(tensor)}; give plain torch.Tensors and Parameters, or backend='eager'"
        )
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.contiguous().resolve_neg()


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
