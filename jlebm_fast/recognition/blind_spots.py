"""What the code of a forward may look at and nobody watches: then a structure that was found once cannot be trusted.

Watched are plain values however nested in lists, dicts and namespaces, functions, modules and tensors (`watching.py`).
An attribute of some object of one's own, numpy, the environment or a property of a class are not. What matters is what
code that a forward reaches names: methods that it does not call, torch's own code and unused attributes do not.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .snapshots import EMPTY_CELL, MOST_ENTRIES, PLAIN, attributes_of, contents_of, is_a
from .watching import (
    DEPTH_OUTSIDE,
    NAMESPACES,
    attributes_by_name,
    classes_behind,
    codes_of,
    functions_reached,
    is_of_torch,
    is_trusted,
    names_of,
)

_IMMUTABLE = (torch.dtype, torch.device, torch.layout, torch.memory_format, range, complex, bytes, type(Ellipsis))
_PURE_MODULES = ("math", "typing", "operator", "collections", "functools", "itertools", "contextlib", "abc")
# builtins that reach what no name in the code tells
_REACHING = frozenset(
    ("getattr", "vars", "globals", "locals", "eval", "exec", "open", "input", "compile", "__import__")
)


# what a module has of its own that is not looked at as such
_OF_MODULES = frozenset(
    ("_buffers", "_parameters", "_modules", "__dict__", "_non_persistent_buffers_set", "state_dict", "named_buffers")
)
# of a class whose instances are their attributes and nothing else
_OF_RECORDS = frozenset(vars(dataclasses.make_dataclass("Record", ["field"]))) | {
    "__annotations__", "__slotnames__", "__static_attributes__", "__firstlineno__", "__annotate_func__",
    "__annotations_cache__", "__annotate__", "__order__", "__lt__", "__le__", "__gt__", "__ge__", "__setattr__",
    "__delattr__",
}  # fmt: skip


def blind_spot(net: nn.Module, method: str = "forward") -> str | None:
    """The first thing that the code behind a forward, or another method, looks at and nobody watches; None if there is
    none."""
    attributes, functions = attributes_by_name(net), functions_reached(net, method)
    names = frozenset(name for function in functions for code in codes_of(function) for name in code.co_names)
    named = [(f"'{name}'", value, DEPTH_OUTSIDE) for function in functions for name, value in _named_by(function)]
    for name in sorted(names & attributes.keys()):
        named += [(f"attribute '{name}'", value, depth) for value, depth in attributes[name]]
    named += [(f"'{name}'", object(), 0) for name in sorted(names & _OF_MODULES)]
    for name in ("__getattr__", "__getattribute__", "__call__"):
        named += [(f"'{name}'", object(), 0) for _ in attributes.get(name, ())]
    modules, classes = {id(module) for module in net.modules()}, set(classes_behind(net))

    def is_seen(value: object, depth: int) -> bool:
        # a module or class that is none of the net's own is watched by nobody
        if is_a(value, types.MethodType):
            value = value.__self__
        if is_a(value, nn.Module):
            return id(value) in modules
        if is_a(value, type) and issubclass(value, nn.Module):
            return value in classes or is_trusted(value)
        if type(value) in (list, tuple):
            return _is_seen(value, depth) and all(is_seen(entry, depth - 1) for entry in value)
        return _is_seen(value, depth)

    return next((f"{what}, a {_kind_of(value)}" for what, value, depth in named if not is_seen(value, depth)), None)


def _kind_of(value: object) -> str:
    if is_a(value, (type, types.ModuleType)):
        return "class" if is_a(value, type) else "module"
    return type(value).__name__


def _named_by(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """What the code of a function finds outside itself: globals, variables of its closure, default arguments."""
    for code in codes_of(function):
        for name in names_of(code, "LOAD_GLOBAL", "LOAD_NAME"):
            if name in function.__globals__:
                yield name, function.__globals__[name]
            elif name in _REACHING:
                yield name, object()
        for name in names_of(code, "IMPORT_NAME"):
            yield name, sys.modules.get(name, object())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if contents_of(cell) is not EMPTY_CELL:
            yield name, contents_of(cell)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        # a list among them would be nobody's
        yield function.__name__, object() if is_a(value, (list, dict)) else value


def _is_seen(value: object, depth: int) -> bool:
    """Whether a change of it, or of what can be reached through it, would be noticed."""
    if type(value) in PLAIN or is_a(value, (*_IMMUTABLE, Tensor, nn.Module)):
        return True
    if is_a(value, types.ModuleType):
        return is_of_torch(value) or value.__name__.partition(".")[0] in _PURE_MODULES
    if is_a(value, type):
        return is_of_torch(value) or issubclass(value, nn.Module) or value.__module__ in ("builtins", *_PURE_MODULES)
    if is_a(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    if is_a(value, types.FunctionType):
        return not vars(value)  # its code is reached too
    if is_a(value, (property, staticmethod, classmethod)):
        return True
    if is_a(value, (types.BuiltinFunctionType, types.BuiltinMethodType)):
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType) and not is_of_torch(type(owner)):
            return _is_seen(owner, depth)  # random.random is a method of a generator
        return value.__module__ in (None, "builtins", "math", "operator") or is_of_torch(value)
    if callable(value) and is_of_torch(type(value)):
        return True
    if type(value) in (list, tuple, dict, torch.Size) or is_a(value, NAMESPACES):
        entries = attributes_of(value) if is_a(value, NAMESPACES) else value
        entries = list(entries.values()) if isinstance(entries, dict) else entries
        few = len(entries) <= MOST_ENTRIES or is_a(value, (*NAMESPACES, dict))
        return depth > 0 and few and all(_is_seen(entry, depth - 1) for entry in entries)
    attributes = attributes_of(value)
    is_record = depth > 0 and attributes is not None and _is_record(value, attributes)
    return is_record and all(_is_seen(entry, depth - 1) for entry in attributes.values())


def _is_record(value: object, attributes: dict) -> bool:
    """An object that is its attributes, as those of a dataclass: its class has no others, and no methods."""
    if callable(value):
        return False
    names = {name for cls in type(value).__mro__[:-1] for name in vars(cls)}
    others = {name for name in names if not name.startswith("__")} - attributes.keys()
    return not others and {name for name in names if name.startswith("__")} <= _OF_RECORDS
