"""Reads the weights of an MLP by running its forward on unit vectors, however the forward is written.

    rows       z = 0, e_1, …, e_dim: what the first activation is given there is b_1 and b_1 + the columns of W_1
    replace    what an activation makes gives way to rows 0, e_1, … as well, so the next one shows W_2 and b_2, …
    condition  the first layer's b_1 of each chain comes from one more run with all chains and z = 0, up to there

`following.py` finds out once where the activations stand, the Plan; each call of a chain then costs one such run, and
sees the parameters, buffers, numbers and attributes of that moment. A run that makes other calls of torch than the
plan, or others of the numbers that shape an activation, is OtherPath.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..latents import LatentLayout
from ..modes import chain_mode, is_compiled, run_on_buffers
from ..problem import MLP, MLPSpec
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
    """

    calls: tuple[tuple[Callable[..., Any], tuple | None], ...]
    units: tuple[Units, ...]
    spec: MLPSpec
    logits: Place
    chosen: int | None
    shift: float

    def first_units(self) -> list[int]:
        """Where in `units` those of the first layer stand."""
        return [i for i, units in enumerate(self.units) if units.layer == 1]


class OtherPath(Exception):
    """A forward that went another way than when its plan was made."""


class _AllRead(Exception):
    """Nothing more is wanted of a forward."""


def numbers_in(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Plain values among the arguments of a call."""
    return tuple(leaf for leaf in tree_leaves((args, kwargs)) if leaf is None or isinstance(leaf, (int, float, str)))


def unit_vectors(rows: int, n: int, like: Tensor) -> Tensor:
    """[rows, n]: 0, e_1, …, e_n, zeros."""
    found = like.new_zeros(rows, n)
    found[1 : n + 1].fill_diagonal_(1.0)
    return found


class _Reader(TorchFunctionMode):
    """Follows a plan through one run: keeps what is made at the wanted places, replaces what activations make."""

    def __init__(self, plan: Plan, wanted: Sequence[Place], replaced: dict[int, Tensor], *, until: int | None) -> None:
        super().__init__()
        self._plan, self._replaced, self._until = plan, replaced, until
        self._wanted: dict[int, list[int]] = {}
        for call, leaf in wanted:
            self._wanted.setdefault(call, []).append(leaf)
        self.count = 0
        self.found: dict[Place, Tensor] = {}
        self.chosen: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call, calls = self.count, self._plan.calls
        self.count += 1
        if call >= len(calls) or func != calls[call][0]:
            raise OtherPath
        if calls[call][1] is not None and numbers_in(args, kwargs) != calls[call][1]:
            raise OtherPath
        if call == self._plan.chosen:
            self.chosen = index_of(args, kwargs)
        result = func(*args, **kwargs)
        if call in self._replaced:
            if result.numel() != self._replaced[call].numel():
                raise OtherPath
            units = self._replaced[call].view(result.shape)
            # one that works in place is seen through other names too
            result = result.copy_(units) if any(result is arg for arg in args) else units
        for leaf in self._wanted.get(call, ()):
            self.found[call, leaf] = [t for t in tree_leaves(result) if isinstance(t, Tensor)][leaf].clone()
        if call == self._until:
            raise _AllRead
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
        self.norms = [Layer(net, LinearSite(path, "spectral", "weight", "", None)) for path in _spectral_norms(net)]

    def buffers(self) -> dict[str, Tensor]:
        """Those of the module, of spectral norms the converged ones; a run leaves the module's own as they are."""
        return {name: buffer.clone() for name, buffer in self._net().named_buffers()} | self.converged_buffers()

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
        return run_on_buffers(MethodOf(net, self._method), named, (z,), options)

    def converged_buffers(self) -> dict[str, Tensor]:
        """Buffers (u, v) of spectral norms as after enough power iterations."""
        return converged_buffers(self.norms)


class MethodOf(nn.Module):
    """A method of a module as a module of its own."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.owner, self._method = owner, method
        self.training = owner.training

    def forward(self, z: Any, **options: Any) -> Any:
        return getattr(self.owner, self._method)(z, **options)


def _spectral_norms(net: nn.Module) -> list[str]:
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.nn.utils.spectral_norm import SpectralNorm

    found = []
    for path, module in net.named_modules():
        old = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
        new = nn.utils.parametrize.is_parametrized(module) and any(
            isinstance(p, _SpectralNorm) for chain in module.parametrizations.values() for p in chain
        )
        if not (old or new):
            continue
        if computed_weight_kind(module) != "spectral":
            raise Untraceable(f"layer '{path}' has a spectral norm whose converged value is not known")
        found.append(path)
    return found


class Probed:
    """A module known to be an MLP by its plan, and how to read its parameters: by running its forward."""

    plain = None  # nothing that a compiled graph could read
    n_terms = 1
    why: str | None = None  # what its code looks at, so that no other way to read it can be trusted

    def __init__(self, forward: Forward, layout: LatentLayout, plan: Plan, like: Tensor) -> None:
        self._forward, self._layout, self._plan = forward, layout, plan
        self.spec = plan.spec
        self._dtype, self._device = like.dtype, like.device
        self.converged_buffers = forward.converged_buffers

    @property
    def normed(self) -> bool:
        """Whether any weight is divided by its spectral norm."""
        return bool(self._forward.norms)

    @property
    def rows(self) -> int:
        """Of the latents that one reading runs on."""
        return 1 + max(self.spec.widths[:-1])

    def plain_mlp(self, sign: float) -> MLP:
        """`mlp` of an energy without condition, in any mode of the caller's."""
        with chain_mode(_CPU):
            return self.mlp(sign)

    def mlp(self, sign: float = 1.0, conditions: Conditions = NO_CONDITIONS) -> MLP:
        """The energy times sign, with the parameters of this moment.

        Raises:
            OtherPath: the forward is not what it was.
        """
        with torch.no_grad():
            mlp = read(self._plan, self._forward, self._layout, conditions, self._dtype, self._device)
        return mlp if sign == 1.0 else mlp._replace(spec=mlp.spec.negated)


def read(
    plan: Plan,
    forward: Forward,
    layout: LatentLayout,
    conditions: Conditions,
    dtype: torch.dtype,
    device: torch.device,
) -> MLP:
    """The MLP that a forward is, by its plan.

    Raises:
        OtherPath: the forward is not what it was.
    """
    spec = plan.spec
    rows = 1 + max(spec.widths[:-1])
    like = torch.empty(0, dtype=dtype, device=device)
    buffers = forward.buffers()
    replaced, seen = {}, [0] * (spec.n_hidden + 1)
    for units in plan.units:
        columns = like.new_zeros(rows, units.width)
        start = 1 + seen[units.layer]
        columns[start : start + units.width].fill_diagonal_(1.0)
        replaced[units.activated] = columns
        seen[units.layer] += units.width
    reader = _Reader(plan, [*(units.of for units in plan.units), plan.logits], replaced, until=None)
    z, alike = layout.restore(unit_vectors(rows, spec.dim, like)), conditions.first(rows).options
    with reader:
        forward(buffers, z, alike)
    if reader.count != len(plan.calls):
        raise OtherPath
    made = [reader.found[units.of].reshape(rows, -1) for units in plan.units]
    made.append(reader.found[plan.logits].reshape(rows, -1))
    of_layer = [[m for m, units in zip(made, plan.units) if units.layer == layer] for layer in range(1, len(seen))]
    weights, biases = [], []
    for layer, pieces in enumerate([*of_layer, [made[-1]]]):
        together = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        if together.shape[1] != spec.widths[layer + 1]:
            raise OtherPath
        weights.append((together[1 : 1 + spec.widths[layer]] - together[:1]).t().contiguous())
        biases.append(together[0].contiguous())
    if plan.shift:
        biases[-1] = biases[-1] + plan.shift
    if not any(conditions.of_chains):
        return MLP(spec, tuple(weights), tuple(biases))
    first = [plan.units[i].of for i in plan.first_units()]
    until = max(call for call, _ in first) if plan.chosen is None else plan.chosen
    reader = _Reader(plan, first, {}, until=until)
    chains = conditions.chains
    z, buffers = layout.restore(like.new_zeros(chains, spec.dim)), forward.buffers()
    with reader, contextlib.suppress(_AllRead):
        forward(buffers, z, conditions.options)
    base = torch.cat([reader.found[place].reshape(chains, -1) for place in first], 1)
    chosen = None if reader.chosen is None else reader.chosen.reshape(-1).contiguous()
    return MLP(spec, tuple(weights), (None, *biases[1:]), base, chosen)
