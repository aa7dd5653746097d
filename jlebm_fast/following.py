"""Finds out whether a forward is an MLP however it is written, and where its layers stand: the Plan of `probing.py`.

A copy of the module runs in float64 on a small random batch. Of every tensor that descends from z it is known to be

    affine        in the units of one layer (in z before the first activation)
    elementwise   a smooth function of one affine tensor; an activation where it is one of the catalogue
    reduced       the logits' logsumexp, or one chosen of them, scaled and shifted
    condition     computed from a condition alone, other for each chain
    unknown       nothing that an MLP has, with the reason

Every operation that is not listed below makes it unknown: a test on random numbers cannot tell a clamp far away from
the identity. What the plan reads is then compared with the forward's own value and gradient (`recognition.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .backends import eager
from .observing import (
    ADDING,
    DROPOUTS,
    HOOKING,
    JOINING,
    KEEPING,
    READING,
    REARRANGING,
    ForwardObserver,
    activation_of,
    draws,
    name_of,
)
from .probing import Place, Plan, Units, index_of, numbers_in
from .problem import ACTIVATIONS, MLPSpec
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
    why: str = ""


class Follower(ForwardObserver[Seen]):
    """Watches one run on so many chains; `plan` says what it was."""

    def __init__(self, net: nn.Module, chains: int, dim: int) -> None:
        super().__init__(net)
        self.chains, self.dim = chains, dim
        self.calls: list[tuple[Callable[..., Any], tuple | None]] = []
        self._values: dict[Place, Tensor] = {}
        self._units: dict[int, tuple[Units, tuple[str, float]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        drawn = draws(name, args, kwargs)
        if drawn is not None:
            raise Untraceable(f"{drawn} in {self.where()}")
        inputs = [(leaf, seen) for leaf in tree_leaves((args, kwargs)) if (seen := self.get(leaf)) is not None]
        of_z = [(leaf, seen) for leaf, seen in inputs if seen.kind != "condition"]
        call = len(self.calls)
        self.calls.append((func, None))
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if of_z and ((name in READING and not outputs) or name in HOOKING):
            raise Untraceable(f"forward reads values of z ({name}) in {self.where()}")
        for place, output in enumerate(outputs if inputs else ()):
            self.put(output, self._seen(name, (call, place), args, kwargs, inputs, of_z, output))
        return result

    def _unknown(self, what: str) -> Seen:
        return Seen("unknown", why=f"{what} in {self.where()}")

    def _numbers_matter(self, place: Place, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls[place[0]] = (self.calls[place[0]][0], numbers_in(args, kwargs))

    def _seen(
        self,
        name: str,
        place: Place,
        args: tuple,
        kwargs: dict[str, Any],
        inputs: list[tuple[Tensor, Seen]],
        of_z: list[tuple[Tensor, Seen]],
        output: Tensor,
    ) -> Seen:
        if not of_z:
            return inputs[0][1]
        unknown = next((seen for _, seen in of_z if seen.kind == "unknown"), None)
        if unknown is not None:
            return unknown
        others = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and self.get(t) is None]
        conditions = len(inputs) - len(of_z)
        if any(seen.kind == "reduced" for _, seen in of_z):
            self._numbers_matter(place, args, kwargs)
            return self._of_reduced(name, args, of_z, bool(others or conditions), output)
        if name in DROPOUTS or name == "batch_norm":
            self._numbers_matter(place, args, kwargs)
        for found in (
            self._head(name, place, args, kwargs, of_z, output),
            None if others or conditions else self._elementwise(name, place, args, kwargs, of_z, output),
        ):
            if found is not None:
                self._numbers_matter(place, args, kwargs)
                return found
        keeps = name in (REARRANGING | KEEPING) - JOINING and output.numel() == of_z[0][0].numel()
        if len(of_z) == 1 and of_z[0][1].kind == "elementwise" and keeps:
            return of_z[0][1]
        return self._affine(name, place, args, kwargs, of_z, conditions, output)

    def _of_reduced(
        self, name: str, args: tuple, of_z: list[tuple[Tensor, Seen]], with_tensors: bool, output: Tensor
    ) -> Seen:
        seen = of_z[0][1]
        numbers = [arg for arg in args if isinstance(arg, (int, float))]
        if len(of_z) == 1 and not with_tensors and output.numel() == self.chains:
            if name in _NEGATING:
                return seen._replace(factor=-seen.factor, shift=-seen.shift)
            if name in (REARRANGING | KEEPING | {"sum", "mean", "float"}) - JOINING:
                return seen
            if len(numbers) == 1 and name in _MULTIPLYING:
                return seen._replace(factor=seen.factor * numbers[0], shift=seen.shift * numbers[0])
            if len(numbers) == 1 and name in _DIVIDING and isinstance(args[0], Tensor):
                return seen._replace(factor=seen.factor / numbers[0], shift=seen.shift / numbers[0])
            if len(numbers) == 1 and name in ADDING:
                backward = name == "rsub" or not isinstance(args[0], Tensor)
                sign = -1.0 if "sub" in name and backward else 1.0
                number = -numbers[0] if "sub" in name and not backward else numbers[0]
                return seen._replace(factor=sign * seen.factor, shift=sign * seen.shift + number)
        return self._unknown(f"{name} of the reduced logits")

    def _head(
        self,
        name: str,
        place: Place,
        args: tuple,
        kwargs: dict[str, Any],
        of_z: list[tuple[Tensor, Seen]],
        output: Tensor,
    ) -> Seen | None:
        """A logsumexp over the logits, or one of them per chain."""
        logits, seen = of_z[0]
        if name != "logsumexp" and name not in _SELECTING:
            return None
        if len(of_z) != 1 or output.numel() != self.chains or logits.numel() == self.chains * 1:
            return None
        if logits.shape[0] != self.chains or seen.kind != "affine" or seen.layer == 0:
            return None
        table = logits.reshape(self.chains, -1)
        if name == "logsumexp":
            head, chosen, expected = "logsumexp", None, table.logsumexp(1)
        else:
            index = index_of(args, kwargs)
            if index is None or self.get(index) is None or index.numel() != self.chains:
                return None  # the same of all chains
            head, chosen = "logit", place[0]
            expected = table.gather(1, index.reshape(-1, 1)).reshape(-1)
        if not _equal(output.reshape(-1), expected):
            return self._unknown(f"{name} of something else than the logits")
        return Seen("reduced", seen.layer, activation=(head, 0.0), of=seen.made, n_logits=table.shape[1], chosen=chosen)

    def _elementwise(
        self,
        name: str,
        place: Place,
        args: tuple,
        kwargs: dict[str, Any],
        of_z: list[tuple[Tensor, Seen]],
        output: Tensor,
    ) -> Seen | None:
        """An activation, or a step of one that is written out."""
        tensor, first = of_z[0]
        if any(seen.root != first.root or leaf.shape != output.shape for leaf, seen in of_z):
            return None
        if len(of_z) == 1 and first.kind == "affine" and args and args[0] is tensor:
            found = activation_of(name, args, kwargs)
            if found is not None:
                if first.made == _OUT_OF_Z:
                    return self._unknown(f"{name} of z itself")
                return Seen("elementwise", first.layer, place, first.root, activation=found, of=first.made)
        kinds = {seen.kind for _, seen in of_z}
        powers = len(of_z) == 2 and name in _MULTIPLYING | _DIVIDING
        combined = powers or (name in ADDING | _MULTIPLYING | _DIVIDING | _NEGATING and "elementwise" in kinds)
        if combined and len(of_z) == 1 and first.activation is not None and first.activation[0] != "sigmoid":
            return None  # what follows an activation
        if not combined and name not in _SMOOTH:
            return None
        if first.root == _OUT_OF_Z:
            return self._unknown(f"{name} of z itself")
        values = self._values[first.root]
        matched = next((entry for entry in _CATALOGUE if _equal(output, eager.activation(*entry, values))), None)
        return Seen("elementwise", first.layer, place, first.root, activation=matched, of=first.root)

    def _affine(
        self,
        name: str,
        place: Place,
        args: tuple,
        kwargs: dict[str, Any],
        of_z: list[tuple[Tensor, Seen]],
        conditions: int,
        output: Tensor,
    ) -> Seen:
        numbers = [arg for arg in args if isinstance(arg, (int, float))]
        adds = name in ADDING | JOINING
        scales = name in _MULTIPLYING or (name in _DIVIDING and self.get(args[0]) is not None)
        normalises = name == "batch_norm" and not kwargs.get("training", args[5] if len(args) > 5 else False)
        if not (adds or scales or normalises or name in _PRODUCTS | _MOVING | _NEGATING | DROPOUTS):
            return self._unknown(f"{name} is not an operation of an MLP")
        if not adds and len(of_z) != 1:
            return self._unknown(f"{name} of two values that depend on z")
        if "out" in kwargs or kwargs.get("rounding_mode") is not None:
            return self._unknown(f"{name} with {', '.join(kwargs)}")
        seen = [self._closed(leaf, label) for leaf, label in of_z]
        unknown = next((label for label in seen if label.kind == "unknown"), None)
        if unknown is not None:
            return unknown
        layer = seen[0].layer
        if any(label.layer != layer for label in seen):
            return self._unknown(f"{name} joins values of different layers")
        if conditions and (layer > 0 or not adds):
            return self._unknown(f"{name} with a condition, other than added or joined before the first activation,")
        self._values[place] = output.detach().clone()
        if name in _NEGATING:
            return Seen("affine", layer, place, seen[0].root, -seen[0].factor)
        if scales and len(numbers) == 1:
            factor = seen[0].factor / numbers[0] if name in _DIVIDING else seen[0].factor * numbers[0]
            return Seen("affine", layer, place, seen[0].root, factor)
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
        units = Units(seen.layer + 1, seen.of, seen.made[0], tensor.numel() // self.chains)
        self._units[seen.made[0]] = (units, seen.activation)
        return Seen("affine", seen.layer + 1, seen.made, seen.made)

    def plan(self, output: object) -> Plan:
        """What the module is, that returned this.

        Raises:
            Untraceable: no MLP.
        """
        seen = self.get(output)
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


def _equal(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and bool(((value - expected).abs() <= _MATCHED * (1 + expected.abs())).all())
