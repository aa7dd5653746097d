"""Copies of somebody's module to be examined: what a forward writes, and what a test replaces, stays in the copy."""

from __future__ import annotations

import collections
import copy
import copyreg
import math
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .snapshots import OF_EVERY_MODULE, attributes_of, is_a

# what somebody's forward, copied, in float64, on a foreign batch, may raise is theirs to choose, and theirs to see only
# when it runs as they call it
FORWARD_ERRORS = (Exception,)
_LARGEST_TESTED = 1e6  # of a parameter: beyond, what is tested may overflow or cancel
# what an object is that has a class of its own, beside its attributes
_BASES = (collections.OrderedDict, dict, list, object)
# how a class of one's own is copied, if it says so
_SAYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__")
_MADE_BY_CODE = 1 << 9  # of a class's flags (Py_TPFLAGS_HEAPTYPE): it is none of Python's own
_WITHOUT_PARTS = (str, bytes, int, float, complex, type(None), Tensor, type, types.ModuleType, types.FunctionType)


def copy_of(net: nn.Module) -> nn.Module:
    # attributes computed by a forward (the weight of an old-style norm) are no leaves and refuse to be copied
    memo = {
        id(value): value.detach().clone()
        for module in net.modules()
        for value in module.__dict__.values()
        if is_a(value, Tensor) and not value.is_leaf
    }
    _copy_what_answers(net, memo)
    return copy.deepcopy(net, memo)


def _copy_what_answers(net: nn.Module, memo: dict[int, object]) -> None:
    """Copies into the memo of objects that have a `__getattr__`, as options often do: Python's deepcopy would ask them
    for `__deepcopy__`, and they might raise, or make an entry of that name."""
    pairs = [(value, base.__new__(type(value))) for value in _parts_of(net) if (base := _base_of(value)) is not None]
    memo.update((id(value), twin) for value, twin in pairs)
    for value, twin in pairs:
        base = _base_of(value)
        if base is list:
            list.extend(twin, [copy.deepcopy(entry, memo) for entry in list.__iter__(value)])
        elif base is not object:
            for key, entry in dict.items(value):
                base.__setitem__(twin, copy.deepcopy(key, memo), copy.deepcopy(entry, memo))
        for name, entry in (attributes_of(value) or {}).items():
            attributes_of(twin)[name] = copy.deepcopy(entry, memo)
        for name in copyreg._slotnames(type(value)):
            try:
                entry = object.__getattribute__(value, name)
            except AttributeError:  # it was given none
                continue
            object.__setattr__(twin, name, copy.deepcopy(entry, memo))


def _parts_of(net: nn.Module) -> Iterator[object]:
    """A module and everything in it that a copy of it would have a copy of, but for values and code."""
    waiting, seen = [net], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or is_a(value, _WITHOUT_PARTS):
            continue
        seen.add(id(value))
        yield value
        attributes = attributes_of(value) or {}
        if is_a(value, nn.Module):  # what torch keeps in all of them takes longest, and has nothing of that kind
            waiting += value._modules.values()
            waiting += [part for name, part in attributes.items() if name not in OF_EVERY_MODULE]
            continue
        if attributes and not _says_how(type(value)):  # else a logger would lead to all that there are
            waiting += attributes.values()
        if is_a(value, dict):
            waiting += [part for entry in dict.items(value) for part in entry]
        elif is_a(value, (list, tuple, set, frozenset)):
            waiting += value


def _base_of(value: object) -> type | None:
    """Of an object whose class has a `__getattr__` and does not say how it is copied: what it is beside its attributes.
    None of any other, and of modules, whose own it is to have one."""
    cls = type(value)
    if is_a(value, nn.Module) or not any("__getattr__" in vars(base) for base in cls.__mro__) or _says_how(cls):
        return None
    base = next(base for base in cls.__mro__ if not base.__flags__ & _MADE_BY_CODE)
    return base if base in _BASES else None


def _says_how(cls: type) -> bool:
    """Whether a class has a word in how its objects are made or copied."""
    classes = [base for base in cls.__mro__ if base.__flags__ & _MADE_BY_CODE]
    return any(name in vars(base) for base in classes for name in _SAYING)


def replace_what_tests_nothing(net: nn.Module) -> None:
    """Random values for parameters whose entries are all the same, not finite or huge: a last layer of zeros would pass
    any test, one of NaN none. A structure never depends on them (`tracing.py`)."""
    generator = torch.Generator("cpu").manual_seed(1)
    for parameter in net.parameters():
        if parameter.numel() < 2 or not parameter.is_floating_point():
            continue
        values = parameter.detach()
        # written so that NaN is replaced
        if not (values.abs().max() <= _LARGEST_TESTED and values.min() < values.max()):
            fresh = torch.randn(values.shape, generator=generator, dtype=values.dtype, device="cpu")
            parameter.data = (fresh / math.sqrt(values.shape[-1])).to(values.device)
