"""Reads the weights of an MLP by running its forward on unit vectors, however the forward is written.

    rows       z = 0, e_1, …, e_dim: what the first activation is given there is b_1 and b_1 + the columns of W_1
    replace    what an activation makes gives way to rows 0, e_1, … as well, so the next one shows W_2 and b_2, …
    condition  the first layer's b_1 of each chain comes from one more run with all chains and z = 0
    beside     of a quadratic function of z alone that is added, the gradients at those z show all there is

`following.py` finds out once where the activations stand, the Plan; each call of a chain then costs one such run, and
sees the parameters, buffers, numbers and attributes of that moment. A run that makes other calls of torch than the
plan, or others of the numbers that shape an activation, is OtherPath. Calls that are the same but of other tensors are
seen by `agreeing.py`, which compares what was read with the forward's own value and gradient where a chain starts.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..latents import LatentLayout
from ..modes import copies_of_buffers, is_compiled, run_on_buffers
from ..problem import MLP, MLPSpec
from ..quadratic import Quadratic
from .recognised import Layer, converged_buffers
from .structure import LinearSite, Untraceable
from .tracing import computed_weight_kind

_CPU = torch.device("cpu")

# the number of a call of torch, and which of the tensors it gives
Place = tuple[int, int]


class Units(NamedTuple):
    """Units of one hidden layer that one activation makes.

    layer       1 … L
    of          where the pre-activation is made, [chains, …]
    activated   the call that gives what the activation makes of it
    width       how many
    """

    layer: int
    of: Place
    activated: int
    width: int


class Plan(NamedTuple):
    """Where the layers of an MLP stand in the calls of a forward.

    calls    function of every call, and the numbers given to those whose numbers matter
    units    of the hidden layers in their order
    logits   where the logits are made, [chains, J] or [chains]
    chosen   the call that takes one logit per chain, or None
    shift    added to every logit
    beside   where functions of z alone are made that were added to the network's value, and the factor of each
    """

    calls: tuple[tuple[Callable[..., Any], tuple | None], ...]
    units: tuple[Units, ...]
    spec: MLPSpec
    logits: Place
    chosen: int | None
    shift: float
    beside: tuple[tuple[Place, float], ...] = ()

    def first_units(self) -> list[int]:
        """Where in `units` those of the first layer stand."""
        return [i for i, units in enumerate(self.units) if units.layer == 1]


class OtherPath(Exception):
    """A forward that went another way than when its plan was made."""


def numbers_in(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Plain values among the arguments of a call."""
    plain = (int, float, str, np.generic, type(None))
    return tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, plain))


def unit_vectors(rows: int, n: int, like: Tensor, first: int = 1) -> Tensor:
    """[rows, n]: e_1, …, e_n from row `first` on, zeros elsewhere."""
    found = like.new_zeros(rows, n)
    found[first : first + n].fill_diagonal_(1.0)
    return found


class _Reader(TorchFunctionMode):
    """Follows a plan through one run: keeps what is made at the wanted places, replaces what activations make.

    Where a call is another than the plan's, the run goes on untouched to its end, so that whatever the forward sets up
    it also takes down; `failed` says so then.
    """

    def __init__(self, plan: Plan, wanted: Sequence[Place], replaced: dict[int, Tensor]) -> None:
        super().__init__()
        self._plan, self._replaced = plan, replaced
        self._wanted: dict[int, list[int]] = {}
        for call, leaf in wanted:
            self._wanted.setdefault(call, []).append(leaf)
        self._count = 0
        self._failed = False
        self.found: dict[Place, Tensor] = {}
        self.chosen: Tensor | None = None

    @property
    def failed(self) -> bool:
        """Whether the run was not that of the plan."""
        return self._failed or self._count != len(self._plan.calls)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call, calls = self._count, self._plan.calls
        self._count += 1
        numbers = calls[call][1] if call < len(calls) else None
        if call >= len(calls) or func != calls[call][0] or numbers not in (None, numbers_in(args, kwargs)):
            self._failed = True
        if self._failed:
            return func(*args, **kwargs)
        if call == self._plan.chosen:
            self.chosen = index_of(args, kwargs)
        result = func(*args, **kwargs)
        if call in self._replaced:
            if result.numel() != self._replaced[call].numel():
                self._failed = True
                return result
            units = self._replaced[call].view(result.shape)
            # one that works in place is seen through other names too
            result = result.copy_(units) if any(result is arg for arg in args) else units
        for leaf in self._wanted.get(call, ()):
            self.found[call, leaf] = [t for t in tree_leaves(result) if isinstance(t, Tensor)][leaf].clone()
        return result


def index_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor of whole numbers that an indexing call is given last."""
    found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dtype == torch.int64]
    return found[-1] if found else None


class Conditions(NamedTuple):
    """What an energy is given besides z: options, chains, and which of their leaves have one row for each chain."""

    options: dict[str, Any]
    chains: int
    of_chains: tuple[bool, ...]

    @classmethod
    def of(cls, options: dict[str, Any], chains: int) -> Conditions:
        """A single number is of all chains, however many."""
        return cls(
            options,
            chains,
            tuple(
                isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == chains and leaf.numel() > 1
                for leaf in tree_leaves(options)
            ),
        )

    def rows(self, chosen: Sequence[int]) -> Conditions:
        """Those of these of the chains."""
        return self._with(lambda leaf: leaf[list(chosen)], len(chosen))

    def first(self, n: int) -> Conditions:
        """That of the first chain, n times; without an index, which a CUDA graph could not record."""
        return self._with(lambda leaf: leaf[:1].expand(n, *leaf.shape[1:]).contiguous(), n)

    def _with(self, change: Callable[[Tensor], Tensor], n: int) -> Conditions:
        flags = iter(self.of_chains)
        return Conditions(tree_map(lambda leaf: change(leaf) if next(flags) else leaf, self.options), n, self.of_chains)

    def double(self) -> Conditions:
        """In float64 what is a floating point tensor."""
        convert = lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
        return self._replace(options=tree_map(convert, self.options))

    @property
    def kind(self) -> tuple | None:
        """What a plan may depend on; None without any condition."""
        if not self.options:
            return None
        leaves = zip(tree_leaves(self.options), self.of_chains, strict=True)
        return (
            *self.options,
            *(
                (each, tuple(leaf.shape[1:]), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)
                for leaf, each in leaves
            ),
        )


NO_CONDITIONS = Conditions({}, 0, ())


class Forward:
    """How an energy is called: a module's forward or another of its methods, on buffers that it may change."""

    def __init__(self, net: nn.Module, method: str = "forward") -> None:
        self._net, self._method = weakref.ref(net), method
        self._compiled = any(is_compiled(m) or m._compiled_call_impl is not None for m in net.modules())
        self._norms: list[Layer] = []

    @property
    def norms(self) -> list[Layer]:
        """The layers that have a spectral norm now: nobody watches whether one is exchanged, or loses its norm.

        Raises:
            Untraceable: there is a norm whose converged value is not known.
        """
        net = self._net()
        known = {(layer.path, id(layer.owner())): layer for layer in self._norms}  # with where their iterations ended
        self._norms = [
            known.get((path, id(module))) or Layer(net, LinearSite(path, "spectral", "weight", "", None))
            for path, module in _spectral_norms(net)
        ]
        return self._norms

    def buffers(self) -> dict[str, Tensor]:
        """Those of the module, of spectral norms the converged ones; a run leaves the module's own as they are."""
        return copies_of_buffers(self._net()) | converged_buffers(self.norms)

    def __call__(self, buffers: dict[str, Tensor], z: Any, options: dict[str, Any]) -> Any:
        # what is compiled shows none of its calls
        with torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext():
            return self._run(buffers, z, options)

    def _run(self, buffers: dict[str, Tensor], z: Any, options: dict[str, Any]) -> Any:
        net = self._net()
        if self._method == "forward":
            return run_on_buffers(net, buffers, (z,), options)
        if not buffers:
            return getattr(net, self._method)(z, **options)
        named = {f"owner.{name}": buffer for name, buffer in buffers.items()}
        return run_on_buffers(MethodOf(net, self._method), named, (z,), options, owner=net)


class MethodOf(nn.Module):
    """A method of a module as a module of its own."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.owner, self._method = owner, method
        self.training = owner.training

    def forward(self, z: Any, **options: Any) -> Any:
        return getattr(self.owner, self._method)(z, **options)


def _spectral_norms(net: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for path, module in net.named_modules():
        if not module._forward_pre_hooks and "parametrizations" not in module._modules:
            continue  # most of them, at every call
        old = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
        new = nn.utils.parametrize.is_parametrized(module) and any(
            isinstance(p, _SpectralNorm) for chain in module.parametrizations.values() for p in chain
        )
        if not (old or new):
            continue
        if computed_weight_kind(module) != "spectral":
            raise Untraceable(f"layer '{path}' has a spectral norm whose converged value is not known")
        found.append((path, module))
    return found


def like_of(net: nn.Module) -> Tensor | None:
    """The parameter that tells the type of all; None where there is none."""
    found = None
    for module in net.modules():  # `net.parameters()` takes three times as long
        for parameter in module._parameters.values():
            floating = parameter is not None and parameter.is_floating_point()
            if floating and (found is None or parameter.dim() > found.dim()):
                found = parameter
    return found


class Probed:
    """A module known to be an MLP by its plan, and how to read its parameters: by running its forward."""

    plain = None  # nothing that a compiled graph could read
    n_terms = 1
    why: str | None = None  # what its code looks at, so that no other way to read it can be trusted

    def __init__(self, forward: Forward, layout: LatentLayout, plan: Plan, like: Tensor) -> None:
        self.forward, self._layout, self._plan = forward, layout, plan
        self.spec = plan.spec
        self._dtype, self._device = like.dtype, like.device

    def is_of(self, net: nn.Module) -> bool:
        """Whether the module's type and device are those that it was examined in."""
        like = like_of(net)
        return like is not None and like.dtype is self._dtype and like.device == self._device

    def of(self, forward: Forward) -> Probed:
        """The same of a copy's forward."""
        found = copy.copy(self)
        found.forward = forward
        return found

    @property
    def norms(self) -> list[Layer]:
        """The layers whose weights are divided by their spectral norm."""
        try:
            return self.forward.norms
        except Untraceable:
            raise OtherPath from None

    @property
    def rows(self) -> int:
        """Of the latents that one reading runs on."""
        return 1 + max(self.spec.widths[:-1])

    def mlp(self, conditions: Conditions = NO_CONDITIONS) -> tuple[MLP, Quadratic | None]:
        """The energy with the parameters of this moment: a network, and what it adds to that of z alone.

        Raises:
            OtherPath: the forward is not what it was.
        """
        try:
            with torch.no_grad():
                return read(self._plan, self.forward, self._layout, conditions, self._dtype, self._device)
        except Untraceable:
            raise OtherPath from None


def read(
    plan: Plan,
    forward: Forward,
    layout: LatentLayout,
    conditions: Conditions,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[MLP, Quadratic | None]:
    """The MLP that a forward is, by its plan, and the quadratic function of z that is added to it.

    Raises:
        OtherPath: the forward is not what it was.
    """
    spec = plan.spec
    rows = 1 + max(spec.widths[:-1])
    like = torch.empty(0, dtype=dtype, device=device)
    buffers = forward.buffers()
    replaced, seen = {}, [0] * (spec.n_hidden + 1)
    for units in plan.units:
        replaced[units.activated] = unit_vectors(rows, units.width, like, 1 + seen[units.layer])
        seen[units.layer] += units.width
    wanted = [*(units.of for units in plan.units), plan.logits, *(place for place, _ in plan.beside)]
    reader = _Reader(plan, wanted, replaced)
    flat, alike = unit_vectors(rows, spec.dim, like), conditions.first(rows).options
    with torch.set_grad_enabled(bool(plan.beside)):
        if plan.beside:
            flat.requires_grad_()
        # what the forward writes into it stays its own
        z = layout.restore(flat * 1 if plan.beside else flat)
        with reader:
            forward(buffers, z, alike)
        if reader.failed:
            raise OtherPath
        quadratic = _quadratic([factor * reader.found[place] for place, factor in plan.beside], flat)
    made = [reader.found[units.of].reshape(rows, -1) for units in plan.units]
    made.append(reader.found[plan.logits].reshape(rows, -1))
    of_layer = [[m for m, units in zip(made, plan.units) if units.layer == layer] for layer in range(1, len(seen))]
    weights, biases = [], []
    for layer, pieces in enumerate([*of_layer, [made[-1]]]):
        together = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        together = together.detach()
        if together.shape[1] != spec.widths[layer + 1]:
            raise OtherPath
        weights.append((together[1 : 1 + spec.widths[layer]] - together[:1]).t().contiguous())
        biases.append(together[0].contiguous())
    if plan.shift:
        biases[-1] = biases[-1] + plan.shift
    if not any(conditions.of_chains):
        return MLP(spec, tuple(weights), tuple(biases)), quadratic
    first = [plan.units[i].of for i in plan.first_units()]
    reader, chains = _Reader(plan, first, {}), conditions.chains
    z, buffers = layout.restore(like.new_zeros(chains, spec.dim)), forward.buffers()
    with reader:
        forward(buffers, z, conditions.options)
    if reader.failed:
        raise OtherPath
    base = torch.cat([reader.found[place].reshape(chains, -1) for place in first], 1)
    chosen = reader.chosen
    if chosen is not None:  # counted from the end where they are negative
        chosen = chosen.reshape(-1)
        chosen = torch.where(chosen < 0, chosen + spec.n_logits, chosen)
    return MLP(spec, tuple(weights), (None, *biases[1:]), base, chosen), quadratic


def _quadratic(parts: list[Tensor], flat: Tensor) -> Quadratic | None:
    """The sum of these functions of latents [rows, dim], each [rows], at 0, e_1, …, e_dim; None of none.

    Whether it is quadratic at all, with independent coordinates, is not looked at here.
    """
    if not parts:
        return None
    value = sum(part.reshape(-1) for part in parts)
    if not value.requires_grad:
        raise OtherPath
    (gradient,) = torch.autograd.grad(value.sum(), flat)
    linear = gradient[0]
    return Quadratic(value[0].detach(), linear, linear - gradient[1 : 1 + flat.shape[1]].diagonal())
