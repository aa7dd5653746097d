"""Finds out whether a forward is an MLP however it is written, and where its layers stand: the Plan of `probing.py`.

A copy of the module runs in float64 on a small random batch. Of every tensor that descends from z it is known to be

    affine        in the units of one layer (in z before the first activation)
    elementwise   a smooth function of one affine tensor; an activation where it is one of the catalogue
    reduced       the logits' logsumexp, or one chosen of them, scaled and shifted
    condition     computed from a condition alone, other for each chain
    unknown       nothing that an MLP has, with the reason

Every operation that is not listed below makes it unknown: a test on random numbers cannot tell a clamp far away from
the identity. What the plan reads is then compared with the forward's own value and gradient (`examining.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends import eager
from ..problem import ACTIVATIONS, MLPSpec
from .observing import (
    ADDING,
    DROPOUTS,
    JOINING,
    KEEPING,
    REARRANGING,
    ForwardObserver,
    activation_of,
    draws,
    name_of,
)
from .probing import Place, Plan, Units, index_of, numbers_in
from .structure import WIDEST_SUM, Untraceable

# fmt: off
_NEGATING = frozenset(("neg", "negative"))
_MULTIPLYING = frozenset(("mul", "multiply", "rmul", "imul"))
_DIVIDING = frozenset(("div", "truediv", "true_divide", "divide", "itruediv"))
# affine in one operand, whatever the others are
_PRODUCTS = frozenset((
    "linear", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "einsum", "tensordot", "inner",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
))
_MOVING = REARRANGING | KEEPING | {
    "expand", "expand_as", "broadcast_to", "repeat", "tile", "flip", "roll", "sum", "mean", "gather", "take_along_dim",
    "float", "swapaxes", "vstack", "atleast_2d", "diagonal", "cumsum",
}
_SMOOTH = frozenset((
    "sigmoid", "tanh", "softplus", "exp", "expm1", "log", "log1p", "erf", "erfc", "square", "pow", "rpow", "reciprocal",
    "rtruediv", "rdiv", "silu", "gelu", "mish", "logsigmoid", "sqrt", "rsqrt", "cosh", "sinh", "logaddexp",
))
_SELECTING = frozenset(("gather", "take_along_dim", "getitem"))
# fmt: on
# of composed activations: what is matched against the values of one
_CATALOGUE = tuple(
    (name, 1.0 if name == "softplus" else 0.0)
    for name in ACTIVATIONS
    if name in ("gelu", "gelu_tanh", "silu", "mish", "tanh", "softplus")
)  # fmt: skip
_MATCHED = 1e-12
_OUT_OF_Z: Place = (-1, 0)


class Seen(NamedTuple):
    """What a tensor is.

    kind         "affine", "elementwise", "reduced", "condition" or "unknown"
    layer        the hidden layer in whose units it is affine; 0: in z
    made         where the tensor is made; of an elementwise one where its activation is
    root         the tensor that it is elementwise a function of
    factor       affine: times its root; reduced: times the logsumexp or the chosen logit
    activation   elementwise: name and parameter where it is known; reduced: the head
    of           elementwise and reduced: the tensor that the activation or head is given
    shift        reduced: added last
    n_logits     reduced
    chosen       reduced: the call that chose
    via          the calls of numbers that lie between it and its root
    why          unknown: in words
    """

    kind: str
    layer: int = 0
    made: Place = _OUT_OF_Z
    root: Place = _OUT_OF_Z
    factor: float = 1.0
    activation: tuple[str, float] | None = None
    of: Place = _OUT_OF_Z
    shift: float = 0.0
    n_logits: int = 1
    chosen: int | None = None
    via: tuple[int, ...] = ()
    why: str = ""


class _Call(NamedTuple):
    """A call of torch, and one of the tensors it gives.

    of_z         those of its arguments that depend on z
    conditions   how many of the others are of the condition
    constants    how many are neither
    """

    name: str
    place: Place
    args: tuple
    kwargs: dict[str, Any]
    of_z: list[tuple[Tensor, Seen]]
    conditions: int
    constants: int
    output: Tensor

    @property
    def with_tensors(self) -> bool:
        """Whether it is of anything but z and numbers."""
        return self.conditions + self.constants > 0

    @property
    def first(self) -> object:
        """The first argument, or what is given as `input`."""
        return self.args[0] if self.args else self.kwargs.get("input")

    @property
    def numbers(self) -> list[float]:
        """Numbers among its positional arguments."""
        return [arg for arg in self.args if isinstance(arg, (int, float))]


class Follower(ForwardObserver[Seen]):
    """Watches one run on so many chains; `plan` says what it was."""

    def __init__(self, net: nn.Module, chains: int, dim: int) -> None:
        super().__init__(net)
        self.chains, self.dim = chains, dim
        self.calls: list[tuple[Callable[..., Any], tuple | None]] = []
        self._values: dict[Place, Tensor] = {}
        self._numbers: dict[int, tuple] = {}
        self._units: dict[int, tuple[Units, tuple[str, float]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        leaves = tree_leaves((args, kwargs))
        if (drawn := draws(name, args, kwargs)) is not None:
            self._refuse(f"{drawn} in {self.where()}")
            raise Untraceable(self.refused)
        inputs = [(leaf, seen) for leaf in leaves if (seen := self.get(leaf)) is not None]
        of_z = [(leaf, seen) for leaf, seen in inputs if seen.kind != "condition"]
        call = len(self.calls)
        self.calls.append((func, None))
        if self.unseen_write(leaves):
            self._refuse(f"forward writes into a view of what {name} is given in {self.where()}")
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if inputs and not of_z and self._written(func, args):
            return result
        unknown = any(seen.kind == "unknown" for _, seen in of_z)
        misused = self.misuse(name, bool(inputs), unknown, result, len(outputs))
        if of_z and name == "requires_grad" and not outputs:
            misused = "forward asks whether gradients are wanted"
        if misused is not None:
            self._refuse(f"{misused} ({name}) in {self.where()}")
        if inputs:
            known = {id(leaf) for leaf, _ in inputs}
            others = sum(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in leaves)
            for place, output in enumerate(outputs):
                one = _Call(name, (call, place), args, kwargs, of_z, len(inputs) - len(of_z), others, output)
                self.put(output, self._seen(one, inputs))
        return result

    def _refuse(self, why: str) -> None:
        """Once and for all, whatever the forward makes of an exception."""
        self.refused = self.refused or why

    def _written(self, func: Callable[..., Any], args: tuple) -> bool:
        """Whether a condition is written into a tensor, which is of the condition then."""
        raw = getattr(func, "__name__", "")
        if raw != "__setitem__" and (not raw.endswith("_") or raw.startswith("__")):
            return False
        if args and isinstance(args[0], Tensor):
            if args[0]._base is not None:
                self._refuse(f"forward writes a condition into a view ({raw}) in {self.where()}")
            self.put(args[0], Seen("condition"))
        return True

    def _unknown(self, what: str) -> Seen:
        return Seen("unknown", why=f"{what} in {self.where()}")

    def _numbers_matter(self, call: _Call) -> None:
        number = call.place[0]
        self.calls[number] = (self.calls[number][0], numbers_in(call.args, call.kwargs))

    def _seen(self, call: _Call, inputs: list[tuple[Tensor, Seen]]) -> Seen:
        """What a call gives, of whose arguments these are known."""
        if not call.of_z:
            return inputs[0][1]
        unknown = next((seen for _, seen in call.of_z if seen.kind == "unknown"), None)
        if unknown is not None:
            return unknown
        if any(seen.kind == "reduced" for _, seen in call.of_z):
            self._numbers_matter(call)
            return self._of_reduced(call)
        if call.name in DROPOUTS or call.name == "batch_norm":
            self._numbers_matter(call)
        found = self._head(call)
        if found is None and not call.with_tensors:
            found = self._elementwise(call)
        if found is not None:
            self._numbers_matter(call)
            return found
        tensor, first = call.of_z[0]
        keeps = call.name in (REARRANGING | KEEPING) - JOINING and call.output.numel() == tensor.numel()
        if len(call.of_z) == 1 and first.kind == "elementwise" and keeps:
            return first
        return self._affine(call)

    def _of_reduced(self, call: _Call) -> Seen:
        seen, name, numbers = call.of_z[0][1], call.name, call.numbers
        if len(call.of_z) == 1 and not call.with_tensors and call.output.numel() == self.chains:
            first_is_number = not isinstance(call.first, Tensor)
            if name in _NEGATING:
                return seen._replace(factor=-seen.factor, shift=-seen.shift)
            if name in (REARRANGING | KEEPING | {"sum", "mean", "float"}) - JOINING:
                return seen
            if len(numbers) == 1 and name in _MULTIPLYING:
                return seen._replace(factor=seen.factor * numbers[0], shift=seen.shift * numbers[0])
            if len(numbers) == 1 and name in _DIVIDING and not first_is_number:
                return seen._replace(factor=seen.factor / numbers[0], shift=seen.shift / numbers[0])
            if len(numbers) == 1 and name in ADDING:
                backward = name == "rsub" or first_is_number
                sign = -1.0 if "sub" in name and backward else 1.0
                number = -numbers[0] if "sub" in name and not backward else numbers[0]
                return seen._replace(factor=sign * seen.factor, shift=sign * seen.shift + number)
        return self._unknown(f"{name} of the reduced logits")

    def _head(self, call: _Call) -> Seen | None:
        """A logsumexp over the logits, or one of them per chain."""
        logits, seen = call.of_z[0]
        if call.name != "logsumexp" and call.name not in _SELECTING:
            return None
        if len(call.of_z) != 1 or call.output.numel() != self.chains or logits.numel() == self.chains:
            return None
        if logits.shape[0] != self.chains or seen.kind != "affine" or seen.layer == 0:
            return None
        table = logits.reshape(self.chains, -1)
        if call.name == "logsumexp":
            head, chosen, expected = "logsumexp", None, table.logsumexp(1)
        else:
            index = index_of(call.args, call.kwargs)
            if index is None or self.get(index) is None or index.numel() != self.chains:
                return None  # the same of all chains
            head, chosen = "logit", call.place[0]
            expected = table.gather(1, index.reshape(-1, 1)).reshape(-1)
        if not _equal(call.output.reshape(-1), expected):
            return self._unknown(f"{call.name} of something else than the logits")
        return Seen("reduced", seen.layer, activation=(head, 0.0), of=seen.made, n_logits=table.shape[1], chosen=chosen)

    def _elementwise(self, call: _Call) -> Seen | None:
        """An activation, or a step of one that is written out."""
        tensor, first = call.of_z[0]
        if any(seen.root != first.root or leaf.shape != call.output.shape for leaf, seen in call.of_z):
            return None
        if len(call.of_z) == 1 and first.kind == "affine" and call.first is tensor:
            found = activation_of(call.name, call.args, call.kwargs)
            if found is not None:
                if first.made == _OUT_OF_Z:
                    return self._unknown(f"{call.name} of z itself")
                return Seen("elementwise", first.layer, call.place, first.root, activation=found, of=first.made)
        powers = len(call.of_z) == 2 and call.name in _MULTIPLYING | _DIVIDING
        of_activations = any(seen.kind == "elementwise" for _, seen in call.of_z)
        combined = powers or (of_activations and call.name in ADDING | _MULTIPLYING | _DIVIDING | _NEGATING)
        if combined and len(call.of_z) == 1 and first.activation is not None and first.activation[0] != "sigmoid":
            return None  # what follows an activation
        if not combined and call.name not in _SMOOTH:
            return None
        if first.root == _OUT_OF_Z:
            return self._unknown(f"{call.name} of z itself")
        via = tuple(sorted({number for _, seen in call.of_z for number in seen.via} | {call.place[0]}))
        for number in via[:-1] if via[-1] == call.place[0] else via:
            self.calls[number] = (self.calls[number][0], self._numbers[number])
        self._numbers[call.place[0]] = numbers_in(call.args, call.kwargs)
        values = self._values[first.root]
        matched = next((entry for entry in _CATALOGUE if _equal(call.output, eager.activation(*entry, values))), None)
        return Seen("elementwise", first.layer, call.place, first.root, activation=matched, of=first.root, via=via)

    def _affine(self, call: _Call) -> Seen:
        name, args, kwargs, place = call.name, call.args, call.kwargs, call.place
        adds = name in ADDING | JOINING
        scales = name in _MULTIPLYING or (name in _DIVIDING and self.get(call.first) is not None)
        normalises = name == "batch_norm" and not kwargs.get("training", args[5] if len(args) > 5 else False)
        if not (adds or scales or normalises or name in _PRODUCTS | _MOVING | _NEGATING | DROPOUTS):
            return self._unknown(f"{name} is not an operation of an MLP")
        if not adds and len(call.of_z) != 1:
            return self._unknown(f"{name} of two values that depend on z")
        if "out" in kwargs or kwargs.get("rounding_mode") is not None:
            return self._unknown(f"{name} with {', '.join(kwargs)}")
        if "rounding_mode" in kwargs:
            self._numbers_matter(call)
        if name.startswith("conv") and max((*call.of_z[0][0].shape[2:], *_kernel_of(args, kwargs))) > 1:
            return self._unknown(f"{name} over more than one place")
        seen = [self._closed(leaf, label) for leaf, label in call.of_z]
        unknown = next((label for label in seen if label.kind == "unknown"), None)
        if unknown is not None:
            return unknown
        layer = seen[0].layer
        if any(label.layer != layer for label in seen):
            return self._unknown(f"{name} joins values of different layers")
        if call.conditions and (layer > 0 or not adds):
            return self._unknown(f"{name} with a condition, other than added or joined before the first activation,")
        self._values[place] = call.output.detach().clone()
        if name in _NEGATING:
            return Seen("affine", layer, place, seen[0].root, -seen[0].factor, via=seen[0].via)
        if scales and len(call.numbers) == 1:
            number = call.numbers[0]
            factor = seen[0].factor / number if name in _DIVIDING else seen[0].factor * number
            self._numbers[place[0]] = numbers_in(args, kwargs)
            return Seen("affine", layer, place, seen[0].root, factor, via=(*seen[0].via, place[0]))
        return Seen("affine", layer, place, place)

    def _closed(self, tensor: Tensor, seen: Seen) -> Seen:
        """What an affine operation sees: an activation is a layer of units now."""
        if seen.kind != "elementwise":
            return seen
        if seen.activation is None or seen.activation[0] not in ACTIVATIONS:
            what = "a function that is no activation of the catalogue"
            return self._unknown(what if seen.activation is None else f"{seen.activation[0]} between layers")
        values = self._values.get(seen.of)
        if values is None or values.shape[0] != self.chains:
            return self._unknown("an activation of what has no row per chain")
        width = tensor.numel() // self.chains
        if values.numel() > self.chains * max(values.shape[1:], default=1) and width > WIDEST_SUM:
            return self._unknown(f"an activation of {width} units in several rows per chain, more than {WIDEST_SUM},")
        units = Units(seen.layer + 1, seen.of, seen.made[0], width)
        self._units[seen.made[0]] = (units, seen.activation)
        return Seen("affine", seen.layer + 1, seen.made, seen.made)

    def plan(self, output: object) -> Plan:
        """What the module is, that returned this.

        Raises:
            Untraceable: no MLP.
        """
        seen = self.get(output)
        if self.unseen_write([output]):
            self._refuse("forward writes into a view of what it returns")
        if self.refused is not None:
            raise Untraceable(self.refused)
        if seen is None or seen.kind == "condition":
            raise Untraceable("its output is not a tensor that torch operations computed from z")
        if seen.kind == "elementwise" and (seen.activation or ("", 0.0))[0] not in ("tanh", "sigmoid", "softplus"):
            seen = self._closed(output, seen)
        if seen.kind == "unknown":
            raise Untraceable(seen.why)
        if seen.layer == 0:
            raise Untraceable("it has no hidden layer")
        if output.numel() != self.chains:
            n, rest = divmod(output.numel(), self.chains)
            if seen.kind == "affine" and n > 1 and not rest:
                raise Untraceable(f"it returns {n} logits per chain without a head (logsumexp)")
            raise Untraceable(f"it returns {output.numel()} values for {self.chains} chains")
        head, scale, logits = "identity", 1.0, seen.made
        if seen.kind in ("elementwise", "reduced"):
            (head, parameter), scale, logits = seen.activation, seen.factor, seen.of
            if head == "softplus" and parameter != 1.0:
                raise Untraceable("its last layer is followed by softplus, which is no output form")
            if head != "logsumexp" and seen.shift:
                raise Untraceable(f"a number is added after {head}")
        if not scale:
            raise Untraceable("it is zero times a network")
        of_layers = [
            sorted((entry for entry in self._units.values() if entry[0].layer == layer), key=lambda e: e[0].of)
            for layer in range(1, seen.layer + 1)
        ]
        activations = []
        for entries in of_layers:
            if len({activation for _, activation in entries}) != 1:
                raise Untraceable("units of one layer have different activations")
            activations.append(entries[0][1])
        widths = [sum(units.width for units, _ in entries) for entries in of_layers]
        if any(len(entries) > 1 for entries in of_layers) and max(widths) > WIDEST_SUM:
            raise Untraceable(
                f"it is a sum of networks with {max(widths)} units side by side, where more than {WIDEST_SUM} would "
                "cost more than they save"
            )
        spec = MLPSpec(
            (self.dim, *widths, seen.n_logits),
            tuple(name for name, _ in activations),
            tuple(float(parameter) for _, parameter in activations),
            head,
            scale,
        )
        units = tuple(units for entries in of_layers for units, _ in entries)
        return Plan(tuple(self.calls), units, spec, logits, seen.chosen, seen.shift / scale)


def _kernel_of(args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The extent of a convolution's weight."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return tuple(weight.shape[2:])


def _equal(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and bool(((value - expected).abs() <= _MATCHED * (1 + expected.abs())).all())
