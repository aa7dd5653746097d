"""What may change about a recognised module after it was examined: a snapshot to compare, and what no snapshot can see.

A structure read out of one run (`tracing.py`) holds for as long as everything it came from stays as it was. Values of
parameters are no part of it: those are read at every call.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .backends import _native

_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_MOST_WATCHED = 64  # entries of a list or dict among a module's attributes
_DEPTH_OUTSIDE = 2  # of what is no attribute of a module: a logger or data set must not be searched at every call
_NORM_HOOKS = (SpectralNorm, WeightNorm)
# hooks that torch runs around the forward of every module
HOOKS_OF_ALL = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


class _Snapshot:
    """Dicts, lists and objects, and the very objects that they held: what the compiled module compares."""

    def __init__(self, most: int) -> None:
        self._holders, self._entries, self._most = [], [], most

    def add(self, holder: object) -> None:
        self._holders.append(holder)
        if isinstance(holder, list):
            self._entries += holder[: self._most]
        else:
            entries = holder if isinstance(holder, dict) else vars(holder)
            self._entries += itertools.chain(*itertools.islice(entries.items(), self._most))
        self._entries.append(holder)

    def holds(self) -> bool:
        return _native.load().same_entries(self._holders, self._entries, self._most)


class Guards:
    """A snapshot of everything about a module, except values of tensors, that its structure may depend on."""

    def __init__(self, net: nn.Module) -> None:
        self._classes, self._scalars, self._identities, self._shapes = [], [], [], []
        self._others, self._ties, self._collections = [], [], []
        self._forwards: dict[type, object] = {}
        owners: dict[int, tuple[dict, str]] = {}
        # all entries of the first, as many of the second as `frozen` looks at
        self._own, self._inner = _Snapshot(sys.maxsize), _Snapshot(_MOST_WATCHED)
        for module in net.modules():
            entries = module.__dict__
            self._classes.append((weakref.ref(module), type(module)))
            self._forwards[type(module)] = forward_of(type(module))
            for holder in (entries, *(options_of(name, value) for name, value in entries.items())):
                self._scalars += [(holder, name, v) for name, v in holder.items() if type(v) in _PLAIN]
                self._own.add(holder)
            for name, value in entries.items():
                if name not in _OF_EVERY_MODULE and type(value) not in _PLAIN:
                    self._others.append((entries, name, frozen(value)))
                    for container in containers_in(value):
                        self._inner.add(container)
            for name, p in module._parameters.items():
                self._shapes.append((module._parameters, name, shape_of(p)))
                if p is not None:
                    first = owners.setdefault(id(p), (module._parameters, name))
                    if first[0] is not module._parameters or first[1] != name:
                        self._ties.append((*first, module._parameters, name))
            self._identities += [(module._modules, name, id(child)) for name, child in module._modules.items()]
            self._own.add(module._modules)
            hooks = (module._modules, module._parameters, module._forward_hooks, module._forward_pre_hooks)
            self._collections += [entries, *hooks]
        self._collections += HOOKS_OF_ALL
        self._lengths = list(map(len, self._collections))
        outside = [(holder, name, holder.get(name)) for holder, name in outside_names(net)]
        # identities without the objects: what a code names may be the net itself, which would then live for ever
        self._fixed = [(holder, name, id(v)) for holder, name, v in outside if _is_told_by_identity(v)]
        self._outside = [
            (holder, name, frozen(v, _DEPTH_OUTSIDE)) for holder, name, v in outside if not _is_told_by_identity(v)
        ]
        self._cells = [
            (cell, frozen(_contents(cell), _DEPTH_OUTSIDE))
            for function in functions_behind(net)
            for cell in function.__closure__ or ()
        ]

    def hold(self) -> bool:
        """Whether all of it is still so: ten to twenty microseconds."""
        return (
            list(map(len, self._collections)) == self._lengths
            and (self._entries_are_the_same() or self._entries_are_equal())
            and self._parameters_fit()
            and self._surroundings_hold()
        )

    def _entries_are_the_same(self) -> bool:
        """Whether all entries are the objects that they were, which is enough, and said at once."""
        return _native.unavailable_reason() is None and self._own.holds() and self._inner.holds()

    def _entries_are_equal(self) -> bool:
        """Whether all entries are worth what they were, others in their place or not."""
        for entries, name, value in self._scalars:
            if entries.get(name, _ABSENT) != value:
                return False
        for children, name, identity in self._identities:
            if id(children.get(name)) != identity:
                return False
        return all(frozen(entries.get(name)) == value for entries, name, value in self._others)

    def _parameters_fit(self) -> bool:
        for parameters, name, shape in self._shapes:
            parameter = parameters.get(name)
            if (parameter.shape if type(parameter) is nn.Parameter else shape_of(parameter)) != shape:
                return False
        return all(one.get(name) is other.get(other_name) for one, name, other, other_name in self._ties)

    def _surroundings_hold(self) -> bool:
        """The classes, and what their code names."""
        for holder, name, identity in self._fixed:
            if id(holder.get(name)) != identity:
                return False
        for holder, name, value in self._outside:
            if frozen(holder.get(name), _DEPTH_OUTSIDE) != value:
                return False
        for cell, value in self._cells:
            if frozen(_contents(cell), _DEPTH_OUTSIDE) != value:
                return False
        for ref, cls in self._classes:
            if type(ref()) is not cls:
                return False
        return all(forward_of(cls) is forward for cls, forward in self._forwards.items())


def _is_told_by_identity(value: object) -> bool:
    """Whether `frozen` makes nothing else of it, or there is but one such value: most names are no globals."""
    return value is None or (not isinstance(value, _PLAIN) and frozen(value, _DEPTH_OUTSIDE) == id(value))


def containers_in(value: object, depth: int = 4) -> Iterator[object]:
    """The lists, dicts and objects whose entries `frozen` looks at."""
    if depth == 0 or isinstance(value, (*_PLAIN, types.MethodType, Tensor, nn.Module)) or callable(value):
        return
    if isinstance(value, (list, tuple)):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif hasattr(value, "__dict__") and depth > 1:
        inner, depth = vars(value).values(), depth - 1
    else:
        return
    if not isinstance(value, tuple):
        yield value
    for entry in itertools.islice(inner, _MOST_WATCHED):
        yield from containers_in(entry, depth - 1)


def forward_of(cls: type) -> object:
    """The forward that instances of a module class run, as it stands in the class."""
    forward = cls.forward
    if type(forward) is types.FunctionType:  # found as it stands, by a search that Python remembers
        return forward
    return next(vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))


def shape_of(parameter: nn.Parameter | None) -> torch.Size | None:
    """None where there is none, and where it has no shape yet (`nn.LazyLinear`)."""
    return None if parameter is None or is_lazy(parameter) else parameter.shape


def frozen(value: object, depth: int = 4) -> object:
    """What can be compared later of an attribute: plain values however nested, identities of everything else."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, types.MethodType):
        return id(value.__func__)
    if depth == 0 or isinstance(value, (Tensor, nn.Module)) or callable(value):
        return id(value)
    if isinstance(value, dict):
        return tuple((key, frozen(entry, depth - 1)) for key, entry in itertools.islice(value.items(), _MOST_WATCHED))
    if isinstance(value, (list, tuple)):
        return tuple(frozen(entry, depth - 1) for entry in value[:_MOST_WATCHED])
    if hasattr(value, "__dict__"):
        return frozen(vars(value), depth - 1)
    return id(value)


def options_of(name: str, value: object) -> dict[str, object]:
    """What a module's attribute holds of options: those of a namespace or dict such as `self.args`."""
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return vars(value)
    return value if type(value) is dict and not name.startswith("_") else {}


def classes_behind(net: nn.Module) -> Iterator[type]:
    """The classes of the net's modules and their bases, but for torch's own."""
    seen = {cls for module in net.modules() for cls in type(module).__mro__}
    return (cls for cls in seen if cls is not object and not _is_of_torch(cls))


def functions_behind(net: nn.Module) -> list[types.FunctionType]:
    """What a forward may run that is not torch's: methods, functions among the attributes, and what these name."""
    attributes = (
        value for module in net.modules() for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE
    )
    waiting = [*attributes, *(value for cls in classes_behind(net) for value in vars(cls).values())]
    found: dict[int, types.FunctionType] = {}
    while waiting:
        value = waiting.pop()
        function = getattr(value, "fget", None) if isinstance(value, property) else getattr(value, "__func__", value)
        if type(function) is types.FunctionType and id(function) not in found and not _is_of_torch(function):
            found[id(function)] = function
            waiting += [function.__globals__.get(name) for code in codes_of(function) for name in code.co_names]
            waiting += [_contents(cell) for cell in function.__closure__ or ()]
    return list(found.values())


def codes_of(function: types.FunctionType) -> Iterator[types.CodeType]:
    """The code of a function and of the functions written inside it."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if type(constant) is types.CodeType]
        yield code


def outside_names(net: nn.Module) -> list[tuple[dict, str]]:
    """Where a forward finds what is neither its own code nor an attribute of an instance: (namespace, name).

    Attributes of the classes, globals that the code names, and what it names of the user's own modules of Python.
    """
    found = {
        (id(cls), name): (vars(cls), name)
        for cls in classes_behind(net)
        for name in vars(cls)
        if not name.startswith("__")
    }
    for function in functions_behind(net):
        for code in codes_of(function):
            for name in code.co_names:
                value = function.__globals__.get(name)
                if not isinstance(value, types.ModuleType):
                    found[id(function.__globals__), name] = (function.__globals__, name)
                elif not _is_of_torch(value):
                    for inner in code.co_names:
                        if inner in vars(value):
                            found[id(vars(value)), inner] = (vars(value), inner)
    return list(found.values())


def _is_of_torch(value: type | Callable | types.ModuleType) -> bool:
    home = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return (home or "").partition(".")[0] == "torch"


def _contents(cell: types.CellType) -> object:
    """The value of a closure's variable; _ABSENT before it was given one."""
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def numbers_of(net: nn.Module) -> frozenset[tuple[type, float]]:
    """Numbers of known origin, with int or float: those in the code behind the modules' forwards, and their attributes.

    A number from anywhere else (a global, a closure, computed from others) may change without being noticed.
    """
    found: set[tuple[type, float]] = set()
    for module in net.modules():
        for name, value in module.__dict__.items():
            if name not in _OF_EVERY_MODULE:
                _collect_plain(frozen(value), found)
    for function in functions_behind(net):
        for code in codes_of(function):
            _collect_plain(tuple(c for c in code.co_consts if type(c) in (int, float)), found)
        _collect_plain((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), found)
    return frozenset(found)


def _collect_plain(value: object, found: set[tuple[type, float]]) -> None:
    """The numbers among plain values, however nested."""
    if isinstance(value, tuple):
        for entry in value:
            _collect_plain(entry, found)
    elif isinstance(value, float):
        found.add((float, float(value)))
    elif type(value) is int:
        found.add((int, value))


def foreign_hook(net: nn.Module) -> str | None:
    """The layer with a forward hook that the fused kernels would never run; None if there is no such hook."""
    if any(HOOKS_OF_ALL):
        return "every module (torch.nn.modules.module.register_module_forward_hook)"
    for path, module in net.named_modules():
        known = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _NORM_HOOKS)]
        if module._forward_hooks or len(known) != len(module._forward_pre_hooks):
            return f"layer '{path}' ({type(module).__name__})" if path else f"the {type(module).__name__} itself"
    return None
