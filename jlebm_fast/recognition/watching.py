"""What may change about a recognised module after it was examined, watched, and what cannot be watched, refused.

A structure read out of one run (`tracing.py`) holds for as long as everything it came from stays as it was. Values of
parameters are no part of it: those are read at every call.
"""

from __future__ import annotations

import argparse
import dis
import itertools
import types
import weakref
from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .snapshots import (
    HOOKS,
    MOST_ENTRIES,
    OF_EVERY_MODULE,
    Objects,
    attributes_of,
    changed_in,
    contents_of,
    frozen,
    frozen_function,
    is_a,
    states_of,
)

DEPTH = 4  # of attributes of modules, as in snapshots.py
DEPTH_OUTSIDE = 2  # of what is no attribute of a module: a logger or data set must not be searched at every call
NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_NORM_HOOKS = (SpectralNorm, WeightNorm)
# hooks that torch runs around the forward and backward of every module
HOOKS_OF_ALL = tuple(
    getattr(nn.modules.module, f"_global_{name}_hooks")
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)


class Guards:
    """A snapshot of everything about a module, except values of tensors, that its structure may depend on."""

    def __init__(self, net: nn.Module, method: str = "forward") -> None:
        self._modules = [weakref.ref(module) for module in net.modules()]
        self._paths = [path for path, _ in net.named_modules()]
        self._forwards = {type(module): forward_of(type(module)) for module in net.modules()}
        self._names = outside_names(net)
        # what a forward may run, and what any function sees: the code of others may change as it likes
        reached = functions_reached(net, method)
        seen = {id(function) for function in reached}
        closures = [f for f in functions_behind(net) if f.__closure__ and id(f) not in seen]
        self._functions = [weakref.ref(function) for function in (*reached, *closures)]
        # a change in between (another thread's) makes objects differ, and values have the word
        self._objects, self._values = self._objects_now(), self._values_now()

    def hold(self, *, shapes: bool = True) -> bool:
        """Whether all of it is still so; shapes=False: as far as whoever reads the parameters will not find out."""
        if self._objects.hold(shapes=shapes):
            return True
        objects = self._objects_now()
        if not self.are_equal():
            return False
        self._objects = objects
        return True

    def are_the_same(self) -> bool:
        """Whether all are the very objects that they were, which is enough, and said at once."""
        return self._objects.hold()

    def are_equal(self) -> bool:
        """Whether all are worth what they were, others in their place or not."""
        return self._values_now() == self._values

    def change(self) -> str | None:
        """The first of what is worth something else now, in words; None if nothing is."""
        before, now = self._values, self._values_now()
        for path, was, state in zip(self._paths, before[0], now[0], strict=True):
            where = f"layer '{path}'" if path else "the module itself"
            if was is not None and state is None:
                return f"{where}, which is gone"
            if was != state:
                return f"{changed_in(was, state)} of {where}"
        for cls, was, forward in zip(self._forwards, before[1], now[1], strict=True):
            if was is not forward:
                return f"the forward of {cls.__name__}"
        for (_, name), was, value in zip(self._names, before[2], now[2], strict=True):
            if was != value:
                return f"'{name}', which its code names"
        if before[3] != now[3]:
            return "the code of one of its functions, or a variable that one sees"
        return None if before == now else "the hooks of all modules"

    def _values_now(self) -> tuple:
        return (
            states_of(module() for module in self._modules),
            [forward_of(cls) for cls in self._forwards],
            [frozen(holder.get(name), DEPTH_OUTSIDE) for holder, name in self._names],
            [frozen_function(function(), DEPTH_OUTSIDE) for function in self._functions],
            [len(hooks) for hooks in HOOKS_OF_ALL],
        )

    def _objects_now(self) -> Objects:
        objects = Objects()
        for module in (module() for module in self._modules):
            if module is not None:  # an empty Sequential is not true
                objects.add_module(module)
        for cls, forward in self._forwards.items():
            objects.add_forward(cls, forward)
        for holder, name in self._names:
            objects.add_name(holder, name, DEPTH_OUTSIDE)
        for function in filter(None, (function() for function in self._functions)):
            objects.add_function(function, DEPTH_OUTSIDE)
            if function.__closure__:
                objects.add_closure(function, DEPTH_OUTSIDE)
        for hooks in HOOKS_OF_ALL:
            objects.add_length(hooks)
        return objects


def forward_of(cls: type) -> object:
    """The forward that instances of a module class run, as it stands in the class."""
    forward = cls.forward
    if type(forward) is types.FunctionType:  # found as it stands, by a search that Python remembers
        return forward
    return next(vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))


def classes_behind(net: nn.Module) -> Iterator[type]:
    """The classes of the net's modules and their bases, but for torch's own."""
    seen = {cls for module in net.modules() for cls in type(module).__mro__}
    return (cls for cls in seen if cls is not object and not is_of_torch(cls))


def functions_in(value: object, depth: int = DEPTH) -> Iterator[types.FunctionType]:
    """The user's functions that a value is, or holds: of methods, of a class's descriptors, in lists and the like.

    Only what torch or Python define is asked for anything: an object of one's own may answer whatever it likes.
    """
    if is_a(value, types.FunctionType):
        if not is_of_torch(value):
            yield value
    elif is_a(value, property):
        yield from functions_in(value.fget, depth)
    elif is_a(value, (types.MethodType, staticmethod, classmethod)):
        yield from functions_in(value.__func__, depth)
    elif depth > 0 and not callable(value):
        for entry in entries_in(value):
            yield from functions_in(entry, depth - 1)


def entries_in(value: object) -> list:
    """What dicts and namespaces hold, and lists and tuples as far as they are looked at; nothing of anything else."""
    if is_a(value, dict):
        return list(dict.values(value))
    if is_a(value, (list, tuple)):
        return list(itertools.islice(value, MOST_ENTRIES))
    return list((attributes_of(value) or {}).values()) if is_a(value, NAMESPACES) else []


def functions_behind(net: nn.Module) -> list[types.FunctionType]:
    """What a forward may run that is not torch's: methods, functions among the attributes, and what these name."""
    attributes = (
        value for module in net.modules() for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE
    )
    waiting = [*attributes, *(value for cls in classes_behind(net) for value in vars(cls).values())]
    found: dict[int, types.FunctionType] = {}
    while waiting:
        for function in functions_in(waiting.pop()):
            if id(function) not in found:
                found[id(function)] = function
                waiting += [function.__globals__.get(name) for code in codes_of(function) for name in code.co_names]
                waiting += held_by(function)
    return list(found.values())


def held_by(function: types.FunctionType) -> list:
    """What a function sees without a name in its code: variables of its closure, and default arguments."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return [*map(contents_of, function.__closure__ or ()), *defaults]


def attributes_by_name(net: nn.Module) -> dict[str, list[tuple[object, int]]]:
    """Attributes of all modules and of the user's classes behind them by name, and how deep each is watched."""
    found: dict[str, list[tuple[object, int]]] = {}
    for module in net.modules():
        for name, value in module.__dict__.items():
            if name not in OF_EVERY_MODULE:
                found.setdefault(name, []).append((value, DEPTH))
    for cls in itertools.filterfalse(is_trusted, classes_behind(net)):
        for name, value in vars(cls).items():
            found.setdefault(name, []).append((value, DEPTH_OUTSIDE))
    return found


def functions_reached(net: nn.Module, method: str) -> list[types.FunctionType]:
    """The user's functions that a forward runs or may run, by the names in their code."""
    attributes = attributes_by_name(net)
    waiting: list[object] = [value for value, _ in attributes.get(method, ())]
    for module in net.modules():
        waiting += [module.__dict__.get("forward"), forward_of(type(module))]
    found: dict[int, types.FunctionType] = {}
    while waiting:
        for function in functions_in(waiting.pop()):
            if id(function) in found or is_trusted(function):
                continue
            found[id(function)] = function
            waiting += held_by(function)
            for code in codes_of(function):
                waiting += [function.__globals__.get(name) for name in names_of(code, "LOAD_GLOBAL", "LOAD_NAME")]
                waiting += [value for name in code.co_names for value, _ in attributes.get(name, ())]
    return list(found.values())


def names_of(code: types.CodeType, *instructions: str) -> list[str]:
    """Names that code looks up by such an instruction; `co_names` has them all, those of attributes too."""
    return [one.argval for one in dis.get_instructions(code) if one.opname in instructions]


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
    # of every class of a line of them all names, so that one that comes to stand before another is noticed
    classes = list(classes_behind(net))
    names = {name for cls in classes for name in vars(cls) if not name.startswith("__")}
    found = {(id(cls), name): (vars(cls), name) for cls in classes for name in names}
    for function in functions_behind(net):
        for code in codes_of(function):
            for name in code.co_names:
                value = function.__globals__.get(name)
                if not is_a(value, types.ModuleType):
                    found[id(function.__globals__), name] = (function.__globals__, name)
                elif not is_of_torch(value):
                    for inner in code.co_names:
                        if inner in vars(value):
                            found[id(vars(value)), inner] = (vars(value), inner)
    return list(found.values())


def is_of_torch(value: type | Callable | types.ModuleType) -> bool:
    home = value.__name__ if is_a(value, types.ModuleType) else value.__module__
    return (home or "").partition(".")[0] == "torch"


def is_trusted(value: type | types.FunctionType) -> bool:
    """torch's or ours."""
    return is_of_torch(value) or (value.__module__ or "").partition(".")[0] == __package__.partition(".")[0]


def numbers_of(net: nn.Module) -> frozenset[tuple[type, float]]:
    """Numbers of known origin, with int or float: those in the code behind the modules' forwards, and their attributes.

    A number from anywhere else (a global, a closure, computed from others) may change without being noticed.
    """
    found: set[tuple[type, float]] = set()
    for module in net.modules():
        for name, value in module.__dict__.items():
            if name not in OF_EVERY_MODULE:
                _collect_plain(frozen(value), found)
    for function in functions_behind(net):
        for code in codes_of(function):
            _collect_plain(tuple(c for c in code.co_consts if type(c) in (int, float)), found)
            if "LOAD_SMALL_INT" in dis.opmap:  # from Python 3.14 on such numbers stand in the instructions
                small = [one.arg for one in dis.get_instructions(code) if one.opname == "LOAD_SMALL_INT"]
                _collect_plain(tuple(small), found)
            if "sum" in code.co_names:
                found.add((int, 0))  # which Python's own starts with
        _collect_plain((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), found)
    return frozenset(found)


def _collect_plain(value: object, found: set[tuple[type, float]]) -> None:
    """The numbers among plain values, however nested."""
    if is_a(value, tuple):
        for entry in value:
            _collect_plain(entry, found)
    elif is_a(value, float):
        found.add((float, float(value)))
    elif type(value) is int:
        found.add((int, value))


def foreign_hook(net: nn.Module) -> str | None:
    """The layer with a hook that the fused kernels would never run; None if there is no such hook."""
    if any(HOOKS_OF_ALL):
        return "every module (torch.nn.modules.module.register_module_…_hook)"
    for path, module in net.named_modules():
        known = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _NORM_HOOKS)]
        others = any(getattr(module, name) for name in HOOKS if name != "_forward_pre_hooks")
        if others or len(known) != len(module._forward_pre_hooks):
            return f"layer '{path}' ({type(module).__name__})" if path else f"the {type(module).__name__} itself"
    return None
