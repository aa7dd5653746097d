"""Finds out whether a forward is an MLP however it is written, and where its layers stand: the Plan of `probing.py`.

A copy of the module runs in float64 on a small random batch. Of every tensor that descends from z it is known to be

    affine        in the units of one layer (in z before the first activation)
    elementwise   a smooth function of one affine tensor; an activation where it is one of the catalogue
    reduced       the logits' logsumexp, or one chosen of them, scaled and shifted; or a network's value with what is
                  added to it of z alone
    of z alone    a function of z beside the network, quadratic by the way it is computed; that its coordinates are
                  independent is tested like all the rest
    condition     computed from a condition alone, other for each chain
    unknown       nothing that an MLP has, with the reason

Every operation that is not listed in `calls.py` makes it unknown: a test on random numbers cannot tell a clamp far away
from the identity. What the plan reads is then compared with the forward's own value and gradient (`examining.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends import eager
from ..problem import ACTIVATIONS, MLPSpec
from .calls import (
    DIVIDING,
    MOVING,
    MULTIPLYING,
    NEGATING,
    NORM,
    NORMS,
    OF_Z_ALONE,
    OUT_OF_Z,
    PRODUCTS,
    SELECTING,
    SMOOTH,
    Call,
    Seen,
    degree_of,
)
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
    validates_a_sample,
)
from .probing import Place, Plan, Units, index_of, numbers_in
from .structure import WIDEST_SUM, Untraceable

# of composed activations: what is matched against the values of one
_CATALOGUE = tuple(
    (name, 1.0 if name == "softplus" else 0.0)
    for name in ACTIVATIONS
    if name in ("gelu", "gelu_tanh", "silu", "mish", "tanh", "softplus")
)  # fmt: skip
_MATCHED = 1e-12


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
        if validates_a_sample():  # of a distribution: it raises, or changes nothing
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
                one = Call(name, (call, place), args, kwargs, of_z, len(inputs) - len(of_z), others, output)
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

    def _numbers_matter(self, call: Call) -> None:
        number = call.place[0]
        self.calls[number] = (self.calls[number][0], numbers_in(call.args, call.kwargs))

    def _seen(self, call: Call, inputs: list[tuple[Tensor, Seen]]) -> Seen:
        """What a call gives, of whose arguments these are known."""
        if not call.of_z:
            return inputs[0][1]
        unknown = next((seen for _, seen in call.of_z if seen.kind == "unknown"), None)
        if unknown is not None:
            return unknown
        if any(seen.kind == "of z alone" for _, seen in call.of_z):
            return self._with_z_alone(call)
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
            of_layer_0 = found.kind == "elementwise" and found.layer == 0
            return found._replace(degree=degree_of(call, self.chains)) if of_layer_0 else found
        tensor, first = call.of_z[0]
        keeps = call.name in (REARRANGING | KEEPING) - JOINING and call.output.numel() == tensor.numel()
        if len(call.of_z) == 1 and first.kind == "elementwise" and keeps:
            return first
        return self._affine(call)

    def _no_network(self, call: Call, why: str) -> Seen:
        """What no network does: unknown, unless it is of z alone."""
        label = self._unknown(why)
        alone = all(seen.layer == 0 and seen.kind != "reduced" for _, seen in call.of_z)
        if not alone or call.conditions or call.name not in OF_Z_ALONE or call.kwargs.get("out") is not None:
            return label
        if call.name in NORMS | {"pow"}:
            self._numbers_matter(call)
        earlier = next((seen.why for _, seen in call.of_z if seen.kind == "of z alone"), label.why)
        degree = degree_of(call, self.chains)
        if degree is None:
            return self._unknown(f"{why}, which is no Gaussian in z either,")
        return Seen("of z alone", made=call.place, degree=degree, why=earlier)

    def _with_z_alone(self, call: Call) -> Seen:
        """An operation on a function of z alone, perhaps its sum with the value of a network."""
        alone = [(leaf, seen) for leaf, seen in call.of_z if seen.kind == "of z alone"]
        others = [(leaf, seen) for leaf, seen in call.of_z if seen.kind != "of z alone"]
        if all(seen.layer == 0 and seen.kind == "affine" for _, seen in others):
            return self._no_network(call, f"{call.name} is not an operation of an MLP")
        sizes = {leaf.numel() for leaf, _ in call.of_z} | {call.output.numel()}
        adds = call.name in ADDING and not call.kwargs and alone[0][1].degree != NORM
        if len(alone) != 1 or len(others) != 1 or not adds or sizes != {self.chains}:
            return self._unknown(
                f"{call.name} of a network's values and a function of z that is none ({alone[0][1].why})"
            )
        network = self._value_of(*others[0])
        if network.kind == "unknown":
            return network
        self._numbers_matter(call)
        signs = {"rsub": (-1.0, 1.0)}.get(call.name, (1.0, -1.0) if "sub" in call.name else (1.0, 1.0))
        of_network, of_z = signs if call.first is others[0][0] else signs[::-1]
        network = network.times(of_network)
        return network._replace(beside=(*network.beside, (alone[0][1].made, of_z)))

    def _value_of(self, tensor: Tensor, seen: Seen) -> Seen:
        """A network's value per chain as a reduced one."""
        if seen.kind == "reduced":
            return seen
        if seen.kind == "elementwise" and seen.activation in (("tanh", 0.0), ("sigmoid", 0.0), ("softplus", 1.0)):
            return Seen("reduced", seen.layer, activation=seen.activation, of=seen.of)
        seen = self._closed(tensor, seen)
        return (
            seen if seen.kind == "unknown" else Seen("reduced", seen.layer, activation=("identity", 0.0), of=seen.made)
        )

    def _of_reduced(self, call: Call) -> Seen:
        seen, name, numbers = call.of_z[0][1], call.name, call.numbers
        if len(call.of_z) == 1 and not call.with_tensors and call.output.numel() == self.chains:
            first_is_number = not isinstance(call.first, Tensor)
            if name in NEGATING:
                return seen.times(-1.0)
            if name in (REARRANGING | KEEPING | {"sum", "mean", "float"}) - JOINING:
                return seen
            if len(numbers) == 1 and name in MULTIPLYING:
                return seen.times(numbers[0])
            if len(numbers) == 1 and name in DIVIDING and not first_is_number:
                return seen.times(1.0 / numbers[0])
            if len(numbers) == 1 and name in ADDING:
                backward = name == "rsub" or first_is_number
                sign = -1.0 if "sub" in name and backward else 1.0
                number = -numbers[0] if "sub" in name and not backward else numbers[0]
                seen = seen.times(sign)
                return seen._replace(shift=seen.shift + number)
        return self._unknown(f"{name} of the reduced logits")

    def _head(self, call: Call) -> Seen | None:
        """A logsumexp over the logits, or one of them per chain."""
        logits, seen = call.of_z[0]
        if call.name != "logsumexp" and call.name not in SELECTING:
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

    def _elementwise(self, call: Call) -> Seen | None:
        """An activation, or a step of one that is written out."""
        tensor, first = call.of_z[0]
        if any(seen.root != first.root or leaf.shape != call.output.shape for leaf, seen in call.of_z):
            return None
        if len(call.of_z) == 1 and first.kind == "affine" and call.first is tensor:
            found = activation_of(call.name, call.args, call.kwargs)
            if found is not None:
                if first.made == OUT_OF_Z:
                    return self._no_network(call, f"{call.name} of z itself")
                return Seen("elementwise", first.layer, call.place, first.root, activation=found, of=first.made)
        powers = len(call.of_z) == 2 and call.name in MULTIPLYING | DIVIDING
        of_activations = any(seen.kind == "elementwise" for _, seen in call.of_z)
        combined = powers or (of_activations and call.name in ADDING | MULTIPLYING | DIVIDING | NEGATING)
        if combined and len(call.of_z) == 1 and first.activation is not None and first.activation[0] != "sigmoid":
            return None  # what follows an activation
        if not combined and call.name not in SMOOTH:
            return None
        if first.root == OUT_OF_Z:
            return self._no_network(call, f"{call.name} of z itself")
        via = tuple(sorted({number for _, seen in call.of_z for number in seen.via} | {call.place[0]}))
        for number in via[:-1] if via[-1] == call.place[0] else via:
            self.calls[number] = (self.calls[number][0], self._numbers[number])
        self._numbers[call.place[0]] = numbers_in(call.args, call.kwargs)
        values = self._values[first.root]
        matched = next((entry for entry in _CATALOGUE if _equal(call.output, eager.activation(*entry, values))), None)
        return Seen("elementwise", first.layer, call.place, first.root, activation=matched, of=first.root, via=via)

    def _affine(self, call: Call) -> Seen:
        name, args, kwargs, place = call.name, call.args, call.kwargs, call.place
        adds = name in ADDING | JOINING
        scales = name in MULTIPLYING or (name in DIVIDING and self.get(call.first) is not None)
        normalises = name == "batch_norm" and not kwargs.get("training", args[5] if len(args) > 5 else False)
        if not (adds or scales or normalises or name in PRODUCTS | MOVING | NEGATING | DROPOUTS):
            return self._no_network(call, f"{name} is not an operation of an MLP")
        if not adds and len(call.of_z) != 1:
            return self._no_network(call, f"{name} of two values that depend on z")
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
        if any(label.kind == "of z alone" for label in seen):
            of_z = [(leaf, label) for (leaf, _), label in zip(call.of_z, seen, strict=True)]
            return self._with_z_alone(call._replace(of_z=of_z))
        layer = seen[0].layer
        if any(label.layer != layer for label in seen):
            return self._unknown(f"{name} joins values of different layers")
        if call.conditions and (layer > 0 or not adds):
            return self._unknown(f"{name} with a condition, other than added or joined before the first activation,")
        self._values[place] = call.output.detach().clone()
        if name in NEGATING:
            return Seen("affine", layer, place, seen[0].root, -seen[0].factor, via=seen[0].via)
        if scales and len(call.numbers) == 1:
            number = call.numbers[0]
            factor = seen[0].factor / number if name in DIVIDING else seen[0].factor * number
            self._numbers[place[0]] = numbers_in(args, kwargs)
            return Seen("affine", layer, place, seen[0].root, factor, via=(*seen[0].via, place[0]))
        return Seen("affine", layer, place, place)

    def _closed(self, tensor: Tensor, seen: Seen) -> Seen:
        """What an affine operation sees: an activation is a layer of units now."""
        if seen.kind != "elementwise":
            return seen
        if seen.activation is None or seen.activation[0] not in ACTIVATIONS:
            what = "a function that is no activation of the catalogue"
            unknown = self._unknown(what if seen.activation is None else f"{seen.activation[0]} between layers")
            alone = seen.layer == 0 and seen.degree is not None
            return Seen("of z alone", made=seen.made, degree=seen.degree, why=unknown.why) if alone else unknown
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
        if seen.kind in ("unknown", "of z alone"):
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
            if head not in ("logsumexp", "identity") and seen.shift:
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
        return Plan(tuple(self.calls), units, spec, logits, seen.chosen, seen.shift / scale, seen.beside)


def _kernel_of(args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The extent of a convolution's weight."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return tuple(weight.shape[2:])


def _equal(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and bool(((value - expected).abs() <= _MATCHED * (1 + expected.abs())).all())
