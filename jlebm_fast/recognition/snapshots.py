"""How modules and namespaces were, to be compared with how they are: by value, which decides, and by object, at once.

    values    plain values however nested, identities of everything else but tensors (`frozen`, `states_of`)
    objects   the same places as a list that the compiled module walks through by address (`Objects`)

What a tensor holds is no part of either, nor which one it is: nothing that is read out of a forward may depend on it
(`tracing.py`), and a forward may leave another one behind each time, as old-style norms do with their weight.

Neither keeps a module alive. What an attribute holds may name the module itself, as a bound method or a closure does:
only plain values are held, everything else weakly, or by its address. Parameters by their address alone: torch
exchanges what a parameter holds only where nobody refers to it weakly (`torch.utils.swap_tensors`). Nor is an object
asked for an attribute that its class has not: a `__getattr__` of somebody's options may raise, or make what it lacks.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import operator
import types
import weakref
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..backends import _native

PLAIN = (bool, int, float, str, type(None))
OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_NO_ACCOUNT = OF_EVERY_MODULE - {"_modules", "_parameters", *HOOKS}
MOST_ENTRIES = 64  # entries looked at of a list or dict among a module's attributes
_DEPTH = 4
EMPTY_CELL = object()


class _Parts:
    """What a function runs, as the entry of a mapping: [function], or of a weak proxy of it, is its code, its defaults
    and those of keywords alone. All three may be exchanged in place, as IPython's autoreload does."""

    __getitem__ = staticmethod(
        operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
    )  # no frame of Python's


_PARTS = _Parts()


def is_a(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Whether it is, by its class: `isinstance` asks the object too, and one that stands for another may raise."""
    return issubclass(type(value), kinds)


def attributes_of(value: object) -> dict | None:
    """The dict of an object's attributes; None where it has none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


# --- by value


def frozen(value: object, depth: int = _DEPTH) -> object:
    """What can be compared later of an attribute: plain values however nested, identities of everything else."""
    if is_a(value, PLAIN):
        return value
    if is_a(value, Tensor):
        return type(value)
    if is_a(value, types.MethodType):
        return id(value.__func__)
    if depth == 0 or is_a(value, nn.Module) or callable(value):
        return id(value)
    if is_a(value, dict):
        entries = itertools.islice(dict.items(value), MOST_ENTRIES)
        return tuple((frozen(key, 0), frozen(entry, depth - 1)) for key, entry in entries)
    if is_a(value, (list, tuple)):
        return tuple(frozen(entry, depth - 1) for entry in value[:MOST_ENTRIES])
    attributes = attributes_of(value)
    return id(value) if attributes is None else frozen(attributes, depth - 1)


def frozen_function(function: types.FunctionType | None, depth: int) -> tuple | None:
    """What can be compared later of what a function runs, and of what its closure holds; None of one that is gone."""
    if function is None:
        return None
    code, *defaults = _PARTS[function]
    cells = function.__closure__ or ()
    return code, frozen(tuple(defaults), depth + 2), [frozen(contents_of(cell), depth) for cell in cells]


def _options_of(name: str, value: object) -> dict[str, object] | None:
    """The entries of a namespace or dict of options such as `self.args`, of which all are looked at."""
    if is_a(value, (argparse.Namespace, types.SimpleNamespace)):
        return vars(value)
    return value if type(value) is dict and not name.startswith("_") else None


def _attributes_of(module: nn.Module) -> dict[str, object]:
    """The values of a module's attributes, but for what torch keeps in every module."""
    found = {}
    for name, value in module.__dict__.items():
        if type(value) in PLAIN:
            found[name] = value
        elif name not in OF_EVERY_MODULE:
            options = _options_of(name, value) or {}
            beyond = [(k, v) for k, v in itertools.islice(options.items(), MOST_ENTRIES, None) if type(v) in PLAIN]
            found[name] = (frozen(value), *beyond)
    return found


def shape_of(parameter: nn.Parameter | None) -> tuple[int, ...] | None:
    """None where there is none, and where it has no shape yet (`nn.LazyLinear`)."""
    return None if parameter is None or is_lazy(parameter) else parameter.shape


def states_of(modules: Iterable[nn.Module | None]) -> list[tuple | None]:
    """What a structure may depend on of each module itself; None of one that is gone."""
    places: dict[int, int] = {}  # of parameters: the first of those that are the same one

    def place_of(parameter: nn.Parameter | None) -> int | None:
        return None if parameter is None else places.setdefault(id(parameter), len(places))

    return [
        None
        if module is None
        else (
            type(module),
            _attributes_of(module),
            {name: id(child) for name, child in module._modules.items()},
            {name: (type(p), shape_of(p), place_of(p)) for name, p in module._parameters.items()},
            [len(module.__dict__[name]) for name in HOOKS],
        )
        for module in modules
    ]


def changed_in(was: tuple, state: tuple) -> str:
    """The first difference between two states of a module, in words."""
    for what, old, new in zip(("class", "attribute", "child", "parameter", "hooks"), was, state, strict=True):
        if old != new:
            if not isinstance(old, dict):
                return f"the {what}"
            # in the order of the later one, then what it no longer has
            name = next(n for n in (*new, *old) if n not in old or n not in new or old[n] != new[n])
            return f"{what} '{name}'"
    raise ValueError("the states of a module that changed were expected, got the same twice")


def contents_of(cell: types.CellType) -> object:
    """The value of a closure's variable; EMPTY_CELL before it was given one."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY_CELL


# --- by object


class Objects:
    """The very objects that lie in modules and namespaces, in the order in which csrc/bindings_objects.cpp asks.

    One letter and one thing each. Where a place leads to:
        M  a module, by a weak reference: then its class (c) and its attributes (d)
        N  a mapping and a name in it: then what is there, None if nothing
        C  a function, by a weak reference: then what each variable of its closure holds
        F  a class, and the forward that its instances run
        H  a collection itself: then its length (n)
    What should be found there:
        o  this very object                     d D  a dict of n entries (D: or more), then its keys and values
        w  the same, by a weak reference        l L  a list or tuple of n entries (L: or more), then these
        a  the same, by its address             v    an object, then its dict of attributes
        c  an object of this class              x    nothing that this could tell the same: values decide
        n  a collection of this length          e    a closure's variable without a value
    Between the keys of a dict:
        s  so many keys and values, whatever they are
    """

    def __init__(self) -> None:
        self._kinds, self._things = bytearray(), []
        self._shapes: list[tuple[weakref.ref, list[tuple[str, tuple[int, ...]]]]] = []  # weakly the module, and names

    def hold(self, *, shapes: bool = True) -> bool:
        """Whether all of it is still there; False also without the compiled module.

        shapes   False: where whoever reads the parameters compares their shapes too, which take longest here
        """
        if _native.unavailable_reason() is not None:
            return False
        if not _native.load().same_things(self._kinds, self._things):
            return False
        return not shapes or self._same_shapes()

    def _same_shapes(self) -> bool:
        for module, shapes in self._shapes:
            parameters = module()._parameters  # seen a moment ago, with these names
            for name, shape in shapes:
                if parameters[name].shape != shape:
                    return False
        return True

    def add_module(self, module: nn.Module) -> None:
        self._put("M", weakref.ref(module))
        self._put("c", type(module))
        self._put("d", len(module.__dict__))
        skipped = 0
        for name, value in module.__dict__.items():
            if type(value) not in PLAIN and name in _OF_NO_ACCOUNT:
                skipped += 1
                continue
            if skipped:
                self._put("s", skipped)
                skipped = 0
            self._put("o", name)
            if type(value) in PLAIN:
                self._put("o", value)
            elif name == "_modules":
                self._add(value, 2, options=value)  # all of them
            elif name == "_parameters":
                self._add_parameters(module, value)
            elif name in HOOKS:
                self._put("n", len(value))
            else:
                self._add(value, _DEPTH, _options_of(name, value))
        if skipped:
            self._put("s", skipped)

    def add_name(self, mapping: Mapping[str, object], name: str, depth: int) -> None:
        self._put("N", (mapping, name))
        self._add(mapping.get(name), depth)

    def add_closure(self, function: types.FunctionType, depth: int) -> None:
        self._put("C", weakref.ref(function))
        for cell in function.__closure__ or ():
            value = contents_of(cell)
            if value is EMPTY_CELL:
                self._put("e")
            else:
                self._add(value, depth)

    def add_function(self, function: types.FunctionType, depth: int) -> None:
        code, *defaults = _PARTS[function]
        self._put("N", (_PARTS, weakref.proxy(function)))
        self._put("l", 3)
        self._put("o", code)
        for value in defaults:
            self._add(value, depth + 1)

    def add_forward(self, cls: type, forward: object) -> None:
        self._put("F", (cls, forward))

    def add_length(self, collection: object) -> None:
        self._put("H", collection)
        self._put("n", len(collection))

    def _put(self, kind: str, thing: object = None) -> None:
        self._kinds += kind.encode()
        self._things.append(thing)

    def _add(self, value: object, depth: int, options: dict | None = None) -> None:
        """What `frozen` looks at, of options all entries."""
        if is_a(value, PLAIN):
            self._put("o", value)
        elif is_a(value, Tensor):
            self._put("c", type(value))
        elif depth == 0 or is_a(value, (types.MethodType, nn.Module)) or callable(value):
            self._add_weakly(value)
        elif is_a(value, dict):
            most = len(value) if value is options else MOST_ENTRIES
            self._put("D" if len(value) > most else "d", min(len(value), most))
            for key, entry in itertools.islice(dict.items(value), most):
                self._add(key, 0)
                self._add(entry, depth - 1)
        elif is_a(value, (list, tuple)):
            self._put("L" if len(value) > MOST_ENTRIES else "l", min(len(value), MOST_ENTRIES))
            for entry in value[:MOST_ENTRIES]:
                self._add(entry, depth - 1)
        elif (attributes := attributes_of(value)) is None:
            self._add_weakly(value)
        elif type(type(value).__getattribute__) is types.WrapperDescriptorType:
            self._put("v")
            self._add(attributes, depth - 1, options)
        else:  # code of its own would run at every look
            self._put("x")

    def _add_weakly(self, value: object) -> None:
        try:
            self._put("w", weakref.ref(value))
        except TypeError:  # its class has no weak references: a torch.device, a list that lies too deep
            if gc.is_tracked(value):
                self._put("a", id(value))
            else:  # it holds no other object
                self._put("o", value)

    def _add_parameters(self, module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
        self._put("d", len(parameters))
        shapes = []
        for name, parameter in parameters.items():
            self._put("o", name)
            if parameter is None:
                self._put("o", None)
            elif is_lazy(parameter):
                self._put("x")
            else:
                # another one at the address of one that is gone is as good, if its shape is the same
                self._put("a", id(parameter))
                shapes.append((name, parameter.shape))
        if shapes:
            self._shapes.append((weakref.ref(module), shapes))
