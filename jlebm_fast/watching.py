"""What may change about a recognised module after it was examined: a snapshot to compare, and what no snapshot can see.

A structure read out of one run (`tracing.py`) holds for as long as everything it came from stays as it was. Values of
parameters are no part of it: those are read at every call.
"""

from __future__ import annotations

import argparse
import itertools
import types
import weakref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_MOST_WATCHED = 64  # entries of a list or dict among a module's attributes
_NORM_HOOKS = (SpectralNorm, WeightNorm)


class Guards:
    """A snapshot of everything about a module, except values of tensors, that its structure may depend on."""

    def __init__(self, net: nn.Module) -> None:
        self._classes, self._scalars, self._identities, self._lengths, self._shapes = [], [], [], [], []
        self._others, self._ties = [], []
        self._forwards: dict[type, object] = {}
        owners: dict[int, tuple[dict, str]] = {}
        for module in net.modules():
            entries = module.__dict__
            self._classes.append((weakref.ref(module), type(module)))
            self._forwards[type(module)] = forward_of(type(module))
            for holder in (entries, *(options_of(name, value) for name, value in entries.items())):
                self._scalars += [(holder, name, v) for name, v in holder.items() if type(v) in _PLAIN]
            self._others += [
                (entries, name, frozen(value))
                for name, value in entries.items()
                if name not in _OF_EVERY_MODULE and type(value) not in _PLAIN
            ]
            for name, p in module._parameters.items():
                self._shapes.append((module._parameters, name, shape_of(p)))
                if p is not None:
                    first = owners.setdefault(id(p), (module._parameters, name))
                    if first[0] is not module._parameters or first[1] != name:
                        self._ties.append((*first, module._parameters, name))
            self._identities += [(module._modules, name, id(child)) for name, child in module._modules.items()]
            hooks = (module._modules, module._parameters, module._forward_hooks, module._forward_pre_hooks)
            self._lengths += [(collection, len(collection)) for collection in (entries, *hooks)]

    def hold(self) -> bool:
        """Whether all of it is still so: a few microseconds."""
        for entries, name, value in self._scalars:
            if entries.get(name, _ABSENT) != value:
                return False
        for children, name, identity in self._identities:
            if id(children.get(name)) != identity:
                return False
        for collection, length in self._lengths:
            if len(collection) != length:
                return False
        for parameters, name, shape in self._shapes:
            if shape_of(parameters.get(name)) != shape:
                return False
        for entries, name, value in self._others:
            if frozen(entries.get(name)) != value:
                return False
        for one, name, other, other_name in self._ties:
            if one.get(name) is not other.get(other_name):
                return False
        for ref, cls in self._classes:
            if type(ref()) is not cls:
                return False
        return all(forward_of(cls) is forward for cls, forward in self._forwards.items())


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


def numbers_of(net: nn.Module) -> frozenset[tuple[type, float]]:
    """Numbers of known origin, with int or float: those in the code behind the modules' forwards, and their attributes.

    A number from anywhere else (a global, a closure, computed from others) may change without being noticed.
    """
    found: set[tuple[type, float]] = set()
    seen: set[int] = set()
    for module in net.modules():
        for name, value in module.__dict__.items():
            if name not in _OF_EVERY_MODULE:
                _collect_plain(frozen(value), found)
                _collect_written(value, found, seen)
        for cls in type(module).__mro__:
            if cls in (nn.Module, object):
                break
            for value in vars(cls).values():
                _collect_written(value, found, seen)
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


def _collect_written(value: object, found: set[tuple[type, float]], seen: set[int]) -> None:
    """The constants in the code of a function, and of the functions that it names."""
    function = getattr(value, "__func__", value)
    if type(function) is not types.FunctionType or id(function) in seen:
        return
    seen.add(id(function))
    if function.__module__.partition(".")[0] == "torch":
        return
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        _collect_plain(tuple(c for c in code.co_consts if type(c) in (int, float)), found)
        codes += [constant for constant in code.co_consts if type(constant) is types.CodeType]
        for name in code.co_names:
            _collect_written(function.__globals__.get(name), found, seen)
    _collect_plain((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), found)


def foreign_hook(net: nn.Module) -> str | None:
    """The layer with a forward hook that the fused kernels would never run; None if there is no such hook."""
    for path, module in net.named_modules():
        known = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _NORM_HOOKS)]
        if module._forward_hooks or len(known) != len(module._forward_pre_hooks):
            return f"layer '{path}' ({type(module).__name__})" if path else f"the {type(module).__name__} itself"
    return None
