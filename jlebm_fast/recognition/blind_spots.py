"""What the code of a forward may look at and nobody watches: then a structure that was found once cannot be trusted.

Watched are plain values however nested in lists, dicts and namespaces, functions, modules and tensors (`watching.py`).
An attribute of some object of one's own, numpy, the environment or a property of a class are not. What matters is what
code that a forward reaches names: methods that it does not call, torch's own code and unused attributes do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import sys
import types
from collections.abc import Iterator
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor, nn

from .snapshots import EMPTY_CELL, MOST_ENTRIES, OF_EVERY_MODULE, PLAIN, contents_of
from .watching import DEPTH_OUTSIDE, classes_behind, codes_of, is_of_torch

_DEPTH = 4  # of attributes of modules, as in snapshots.py
_IMMUTABLE = (torch.dtype, torch.device, torch.layout, torch.memory_format, range, complex, bytes, type(Ellipsis))
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
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
    attributes = _attributes_of(net)
    functions = _reached(net, method, attributes)
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
        if isinstance(value, types.MethodType):
            value = value.__self__
        if isinstance(value, nn.Module):
            return id(value) in modules
        if isinstance(value, type) and issubclass(value, nn.Module):
            return value in classes or _is_trusted(value)
        if type(value) in (list, tuple):
            return _is_seen(value, depth) and all(is_seen(entry, depth - 1) for entry in value)
        return _is_seen(value, depth)

    return next((f"{what}, a {_kind_of(value)}" for what, value, depth in named if not is_seen(value, depth)), None)


def _kind_of(value: object) -> str:
    if isinstance(value, (type, types.ModuleType)):
        return "class" if isinstance(value, type) else "module"
    return type(value).__name__


def _attributes_of(net: nn.Module) -> dict[str, list[tuple[object, int]]]:
    """Attributes of all modules and of the user's classes behind them by name, and how deep each is watched."""
    found: dict[str, list[tuple[object, int]]] = {}
    for module in net.modules():
        for name, value in module.__dict__.items():
            if name not in OF_EVERY_MODULE:
                found.setdefault(name, []).append((value, _DEPTH))
    for cls in filterfalse(_is_trusted, classes_behind(net)):
        for name, value in vars(cls).items():
            found.setdefault(name, []).append((value, DEPTH_OUTSIDE))
    return found


def _reached(net: nn.Module, method: str, attributes: dict) -> list[types.FunctionType]:
    """The user's functions that a forward runs or may run, by the names in their code."""
    waiting: list[Any] = [value for value, _ in attributes.get(method, ())]
    for module in net.modules():
        waiting += [module.__dict__.get("forward"), getattr(type(module), "forward", None)]
    found: dict[int, types.FunctionType] = {}
    while waiting:
        function = _function_of(waiting.pop())
        if function is None or id(function) in found or _is_trusted(function):
            continue
        found[id(function)] = function
        waiting += map(contents_of, function.__closure__ or ())
        for code in codes_of(function):
            waiting += [function.__globals__.get(name) for name in _globals_of(code)]
            waiting += [value for name in code.co_names for value, _ in attributes.get(name, ())]
    return list(found.values())


def _function_of(value: object) -> types.FunctionType | None:
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if type(value) is types.FunctionType else None


def _globals_of(code: types.CodeType) -> list[str]:
    """Names that code looks up as globals; `co_names` has those of attributes too, which may be the same."""
    return _looked_up(code, "LOAD_GLOBAL", "LOAD_NAME")


def _looked_up(code: types.CodeType, *instructions: str) -> list[str]:
    return [one.argval for one in dis.get_instructions(code) if one.opname in instructions]


def _named_by(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """What the code of a function finds outside itself: globals, variables of its closure, default arguments."""
    for code in codes_of(function):
        for name in _globals_of(code):
            if name in function.__globals__:
                yield name, function.__globals__[name]
            elif name in _REACHING:
                yield name, object()
        for name in _looked_up(code, "IMPORT_NAME"):
            yield name, sys.modules.get(name, object())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if contents_of(cell) is not EMPTY_CELL:
            yield name, contents_of(cell)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        # a list among them would be nobody's
        yield function.__name__, object() if isinstance(value, (list, dict)) else value


def _is_trusted(value: type | types.FunctionType | types.ModuleType) -> bool:
    """torch's or ours."""
    return (
        is_of_torch(value)
        or (getattr(value, "__module__", None) or "").partition(".")[0] == __package__.partition(".")[0]
    )


def _is_seen(value: object, depth: int) -> bool:
    """Whether a change of it, or of what can be reached through it, would be noticed."""
    if type(value) in PLAIN or isinstance(value, (*_IMMUTABLE, Tensor, nn.Module)):
        return True
    if isinstance(value, types.ModuleType):
        return is_of_torch(value) or value.__name__.partition(".")[0] in _PURE_MODULES
    if isinstance(value, type):
        return is_of_torch(value) or issubclass(value, nn.Module) or value.__module__ in ("builtins", *_PURE_MODULES)
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    if isinstance(value, types.FunctionType):
        return not vars(value)  # its code is reached too
    if isinstance(value, (property, staticmethod, classmethod)):
        return True
    if isinstance(value, (types.BuiltinFunctionType, types.BuiltinMethodType)):
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType) and not is_of_torch(type(owner)):
            return _is_seen(owner, depth)  # random.random is a method of a generator
        return value.__module__ in (None, "builtins", "math", "operator") or is_of_torch(value)
    if callable(value) and is_of_torch(type(value)):
        return True
    if type(value) in (list, tuple, dict, torch.Size) or isinstance(value, _NAMESPACES):
        entries = vars(value) if isinstance(value, _NAMESPACES) else value
        entries = list(entries.values()) if isinstance(entries, dict) else entries
        few = len(entries) <= MOST_ENTRIES or isinstance(value, (*_NAMESPACES, dict))
        return depth > 0 and few and all(_is_seen(entry, depth - 1) for entry in entries)
    return depth > 0 and _is_record(value) and all(_is_seen(entry, depth - 1) for entry in vars(value).values())


def _is_record(value: object) -> bool:
    """An object that is its attributes, as those of a dataclass: its class has no others, and no methods."""
    if not hasattr(value, "__dict__") or callable(value):
        return False
    names = {name for cls in type(value).__mro__[:-1] for name in vars(cls)}
    others = {name for name in names if not name.startswith("__")} - vars(value).keys()
    return not others and {name for name in names if name.startswith("__")} <= _OF_RECORDS
