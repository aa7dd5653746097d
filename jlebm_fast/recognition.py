"""Other people's energies: recognised as an MLP where they are one, tested before trusted, watched afterwards.

    trace      a float64 copy of the module runs once and `tracing.py` conjectures its structure
    test       value and gradient of that structure against the copy's own, on random inputs of two batch sizes
    condition  a context beside z is part of the first layer's inputs, constant along a chain
    keep       the structure, per module and weakly; never a parameter: `recognised.py` reads those at every call
    watch      modules, forwards, modes (train/eval), ties between parameters, attributes (plain values however nested,
               identities of the rest), globals, closures and methods that the code names: what differs from the
               trace's starts it anew
    refuse     what could change unseen: foreign hooks, values of tensors read by a forward, numbers of unknown origin

A module that is not recognised runs its own forward under autograd, on clones of its buffers, so that sampling leaves a
power iteration or running mean as it was.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .backends import eager
from .checks import SUPPORTED_DTYPES, describe, dtype_name, has_memory
from .energy import EnergyLinear, EnergyMLP
from .latents import LatentLayout
from .modes import chain_mode
from .ops import check_spec
from .problem import MLP
from .recognised import Layer, Recognised, assembled, effective_weights
from .structure import Label, Structure, Untraceable, structure_of
from .tracing import Tracer
from .watching import HOOKS_OF_ALL, Guards, foreign_hook, numbers_of

# what a forward in float64 on a foreign batch may legitimately raise; anything else is the user's to see
_FORWARD_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    NotImplementedError,
    ArithmeticError,
)
_TEST_CHAINS = (3, 7)
_TEST_TOLERANCE = 1e-9
_LARGEST_TESTED = 1e6  # of a parameter: beyond, what is tested may overflow or cancel
_CPU = torch.device("cpu")
_DISTRIBUTED = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class Unrecognised(NamedTuple):
    """Why a module does not run in the fused kernels."""

    reason: str


def _float64_copy(net: nn.Module) -> nn.Module:
    # attributes computed by a forward (the weight of an old-style norm) are no leaves and refuse to be copied
    memo = {
        id(value): value.detach().clone()
        for module in net.modules()
        for value in module.__dict__.values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(net, memo).to(torch.float64)


def _replace_what_tests_nothing(net: nn.Module) -> None:
    """Random values for parameters whose entries are all the same, not finite or huge: a last layer of zeros would pass
    any test, one of NaN none. A structure never depends on them (`tracing.py`)."""
    generator = torch.Generator("cpu").manual_seed(1)
    for parameter in net.parameters():
        if parameter.numel() < 2 or not parameter.is_floating_point():
            continue
        values = parameter.detach()
        # written so that NaN is replaced
        if not (values.abs().max() <= _LARGEST_TESTED and values.min() < values.max()):
            fresh = torch.randn(values.shape, generator=generator, dtype=values.dtype, device="cpu")
            parameter.data = (fresh / math.sqrt(values.shape[-1])).to(values.device)


def _trace(
    net: nn.Module,
    layout: LatentLayout,
    context_dim: int,
    chains: int,
    scale: float,
    device: torch.device,
    numbers: frozenset[tuple[type, float]],
) -> Structure:
    """One traced run of a float64 copy, its structure tested on the values of the run."""
    generator = torch.Generator("cpu").manual_seed(chains)
    dim, width = layout.dim, layout.dim + context_dim
    both = scale * torch.randn(chains, width, generator=generator, dtype=torch.float64, device="cpu").to(device)
    flat, context = both[:, :dim].clone().requires_grad_(), both[:, dim:].clone()
    z = layout.restore(flat)
    entries = torch.arange(chains * width, device=device).view(chains, width)
    of_z = layout.restore(entries[:, :dim].contiguous())
    tracer = Tracer(net, chains, dim, context_dim, device, numbers)
    pieces = [(z, of_z)] if isinstance(z, Tensor) else zip(z, of_z, strict=True)
    for piece, numbers in pieces:
        tracer.put(piece, Label(entries=numbers))
    options = {}
    if context_dim:
        tracer.put(context, Label(entries=entries[:, dim:].contiguous()))
        options["context"] = context
    try:
        with tracer:
            output = net(z, **options)
        structure, linears = structure_of(tracer.label_of(output), chains, dim, context_dim)
        check_spec(structure.spec)
        (expected_grad,) = torch.autograd.grad(output.sum(), flat, allow_unused=True)
    except _FORWARD_ERRORS as error:
        raise Untraceable(f"a float64 copy of it, run on {chains} random chains, raised {error}") from error
    finally:
        tracer.remove_hooks()
    with torch.no_grad():
        mlp = assembled(
            structure.spec,
            [(term.columns_on(device), term.scale) for term in structure.terms],
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            context if context_dim else None,
        )
        value, grad = eager.mlp_energy_grad(flat, mlp)
        if expected_grad is None or not (_close(value, output.reshape(-1)) and _close(grad, expected_grad)):
            raise Untraceable("the MLP read out of its forward does not reproduce its value and gradient")
        layers = [Layer(net, linear.site) for linear in linears]
        for linear, layer, weight in zip(linears, layers, effective_weights(layers), strict=True):
            if layer.kind == "spectral" and not isinstance(layer.owner(), EnergyLinear):
                # an unconverged norm differs by a factor, and only by that; an EnergyMLP's is always converged
                weight = weight * ((weight * linear.weight).sum() / (weight * weight).sum())
            if not _close(weight, linear.weight):
                raise Untraceable(f"the weight of layer '{linear.site.path}' cannot be computed outside its forward")
    return structure


def _close(value: Tensor, expected: Tensor) -> bool:
    return bool(((value - expected).abs() <= _TEST_TOLERANCE * (1 + expected.abs())).all())


def recognise(net: nn.Module, layout: LatentLayout, context_dim: int = 0) -> Recognised | Unrecognised:
    """Trace and test a module, leaving it, its buffers and torch's random state as they are: a draw is refused."""
    if any(is_lazy(parameter) for parameter in net.parameters()):
        return Unrecognised("it has parameters without a shape yet; call it once")
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        if not has_memory(tensor):
            return Unrecognised(f"'{name}' is a {type(tensor).__name__}, whose memory the fused kernels cannot read")
    hooked = foreign_hook(net)
    if hooked is not None:
        return Unrecognised(f"{hooked} carries a forward hook, which the fused kernels would never run")
    tensor = next(net.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    numbers = numbers_of(net)
    try:
        twin = _float64_copy(net)
        _replace_what_tests_nothing(twin)
    except _FORWARD_ERRORS as error:
        return Unrecognised(f"it cannot be copied to be examined: {error}")
    with chain_mode(device, gradients=True):
        try:
            # two runs: a forward that depends on the batch, or on the values in it, shows
            first, second = (
                _trace(twin, layout, context_dim, n, scale, device, numbers)
                for n, scale in zip(_TEST_CHAINS, (1, 3), strict=True)
            )
        except Untraceable as why:
            return Unrecognised(str(why))
    if first != second:
        return Unrecognised("its forward takes another path on another batch")
    return Recognised(net, first)


class Examined(NamedTuple):
    """What is known about a module, how often it was examined, and what had changed before the latest time."""

    guards: Guards
    found: Recognised | Unrecognised
    times: int
    change: str | None


_examined: weakref.WeakKeyDictionary[nn.Module, dict[Any, Examined]] = weakref.WeakKeyDictionary()
# layouts and modes of one module that are remembered side by side
_MAX_REMEMBERED = 8


def recognised(net: nn.Module, layout: LatentLayout, context_dim: int = 0) -> Recognised | Unrecognised:
    """`recognise`, remembered per module, layout and mode for as long as nothing that matters changes."""
    remembered = _examined.setdefault(net, {})
    key = (layout, net.training, context_dim)
    entry = remembered.get(key)
    if entry is None and any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        return Unrecognised("a scripted or traced module cannot be watched; pass the nn.Module it was made from")
    if entry is None or not entry.guards.hold():
        times, change = (0, None) if entry is None else (entry.times, entry.guards.change())
        if len(remembered) >= _MAX_REMEMBERED:
            remembered.clear()
        # the snapshot comes first: a change while tracing would be noticed at the next call
        entry = Examined(Guards(net), recognise(net, layout, context_dim), times + 1, change)
        remembered[key] = entry
    return entry.found


class EnergySource:
    """Where the sampler finds its energy: an EnergyMLP, a recognised module, or a callable for autograd."""

    def __init__(self, energy: nn.Module | Callable[..., Tensor]) -> None:
        self.energy = energy
        self._known: list[tuple] = []
        self.was_mlp = True  # until a call finds that it is none: whether `plain_mlp` is worth asking

    def __reduce__(self) -> tuple:
        return EnergySource, (self.energy,)

    def known(self, layout: LatentLayout, training: bool) -> tuple | None:
        """(spec, columns, sites) of a module that an earlier call recognised, for `in_graph.py`; None if none did."""
        for dims, listed, mode, structure in self._known:
            if dims == layout.dims and listed == (layout.container is not Tensor) and mode == training:
                return structure
        return None

    def _remember(self, found: Recognised, layout: LatentLayout, training: bool) -> None:
        if self._known and self._known[-1][-1] is found.plain:
            return
        key = (layout.dims, layout.container is not Tensor, training)
        self._known = [entry for entry in self._known if entry[:3] != key] + [(*key, found.plain)]

    @property
    def net(self) -> nn.Module | Callable[..., Tensor]:
        """The module itself, out of wrappers that only distribute or compile it."""
        net = self.energy
        while True:
            if _is_compiled(net):
                net = net._orig_mod
            elif isinstance(net, _DISTRIBUTED):
                net = net.module
            else:
                return net

    def name(self) -> str:
        return getattr(self.energy, "__name__", type(self.energy).__name__)

    def callable(self, changed: dict[str, Tensor] | None = None) -> Callable[..., Tensor]:
        """The energy for autograd; a module runs on clones of its buffers, made once per chain, or on changed ones."""
        energy = self.energy
        if not isinstance(energy, nn.Module):
            return energy
        while isinstance(energy, _DISTRIBUTED):
            energy = energy.module
        buffers = {name: buffer.clone() for name, buffer in energy.named_buffers()} | (changed or {})
        if not buffers:
            return energy
        return lambda z, **options: torch.func.functional_call(energy, buffers, (z,), options)

    def found(
        self, layout: LatentLayout, options: dict[str, object], flat: Tensor | None = None
    ) -> Recognised | Unrecognised:
        """What is known about an energy that is no EnergyMLP; a context needs the latents that it goes with."""
        net = self.net
        if not isinstance(net, nn.Module):
            return Unrecognised("it is a plain callable; pass the nn.Module itself to have it examined")
        if options.get("y") is not None:
            return Unrecognised("y can be fused for an EnergyMLP only")
        context = options.get("context")
        if context is None:
            return recognised(net, layout)
        wanted = (flat.shape[0], flat.dtype, flat.device)
        if (
            not isinstance(context, Tensor)
            or context.dim() != 2
            or not context.shape[1]
            or (context.shape[0], context.dtype, context.device) != wanted
        ):
            return Unrecognised(
                f"a context can be fused if it is [{wanted[0]}, context_dim] {dtype_name(wanted[1])} on {wanted[2]}, "
                f"got {describe(context)}"
            )
        return recognised(net, layout, context.shape[1])

    def reason(self, flat: Tensor, layout: LatentLayout, context: object, y: object) -> str:
        found = self.found(layout, {"context": context, "y": y}, flat)
        return found.reason if isinstance(found, Unrecognised) else ""

    def n_terms(self, flat: Tensor, layout: LatentLayout, context: object) -> int:
        """Of how many networks a recognised module is the sum."""
        if is_plain_energy_mlp(self.net):
            return 1
        found = self.found(layout, {"context": context}, flat)
        return len(found.terms) if isinstance(found, Recognised) else 1

    def examinations(self, layout: LatentLayout, context: object) -> tuple[int, str | None]:
        """How often the module was examined for such latents, and what had changed before the latest time."""
        net = self.net
        context_dim = context.shape[1] if isinstance(context, Tensor) and context.dim() == 2 else 0
        known = _examined.get(net, {}) if isinstance(net, nn.Module) else {}
        entry = known.get((layout, net.training, context_dim)) if known else None
        return (0, None) if entry is None else (entry.times, entry.change)

    def mlp(
        self, flat: Tensor, layout: LatentLayout, context: Tensor | None, y: Tensor | int | None, sign: float
    ) -> MLP | None:
        """sign · energy as the operations take it, with the parameters of this moment; None for autograd.

        Raises:
            ValueError: z, context or y does not fit the energy.
        """
        net = self.energy if type(self.energy) is EnergyMLP else self.net
        self.was_mlp = False
        if is_plain_energy_mlp(net):
            mlp = self._energy_mlp(net, flat, layout, context, y, sign)
            self.was_mlp = True
            return mlp
        found = self.found(layout, {"context": context, "y": y}, flat)
        if isinstance(found, Unrecognised):
            return None
        if context is None:
            self._remember(found, layout, net.training)
        mlp = found.mlp(sign, context)
        self.was_mlp = True
        weight = mlp.weights[0]
        if weight.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"parameters of the energy must be float32 or float64, got {dtype_name(weight.dtype)}")
        if weight.dtype != flat.dtype or weight.device != flat.device:
            raise ValueError(
                f"z must be [chains, {mlp.spec.dim}] {dtype_name(weight.dtype)} on {weight.device}, "
                f"got {describe(flat)}"
            )
        return mlp

    def plain_mlp(self, layout: LatentLayout, sign: float, widest: int) -> MLP | None:
        """`mlp` on the CPU without context or chosen logit, in any mode of the caller's; None where it takes more than
        that, or has a layer wider than `widest`. Not yet compared with z; its tensors are for `cpu_plain.py`, which
        reads no more than their memory."""
        net = self.energy if type(self.energy) is EnergyMLP else self.net
        if _runs_energy_mlp_forward(net):
            if net.context_dim or net.spec.widest > widest or net.spec.head == "logit":
                return None
            if layout.container is not Tensor and layout.dims != net.latent_dims:
                return None
            parameters = net.parameters_as_they_are()
            if parameters is not None:
                return MLP(net.spec if sign == 1.0 else net.spec.negated, *parameters)
            if is_plain_energy_mlp(net):
                with chain_mode(_CPU):
                    mlp = net.mlp(None)
                return mlp if sign == 1.0 else mlp._replace(spec=mlp.spec.negated)
        found = self.found(layout, {})
        if isinstance(found, Unrecognised):
            self.was_mlp = False
            return None
        if found.spec.widest > widest:
            return None
        self._remember(found, layout, net.training)
        return found.plain_mlp(sign)

    def _energy_mlp(
        self,
        net: EnergyMLP,
        flat: Tensor,
        layout: LatentLayout,
        context: Tensor | None,
        y: Tensor | int | None,
        sign: float,
    ) -> MLP:
        if layout.container is not Tensor and layout.dims != net.latent_dims:
            raise ValueError(f"z must be layers of widths {net.latent_dims}, got {layout.dims}")
        net.check_z(flat)
        # the parameters themselves where possible: a chain runs outside autograd
        mlp = net.mlp(flat, context, y)
        return mlp if sign == 1.0 else mlp._replace(spec=mlp.spec.negated)


def is_plain_energy_mlp(net: object) -> bool:
    """An EnergyMLP whose forward is EnergyMLP's: no subclass that changes it, no hook, no foreign normalisation."""
    # a parametrised layer is of a class of its own
    return _runs_energy_mlp_forward(net) and set(map(type, net._modules["layers"]._modules.values())) == {EnergyLinear}


def _runs_energy_mlp_forward(net: object) -> bool:
    if not isinstance(net, EnergyMLP) or type(net).forward is not EnergyMLP.forward or "forward" in net.__dict__:
        return False
    return not (net._forward_hooks or net._forward_pre_hooks or any(HOOKS_OF_ALL))


def _is_compiled(net: object) -> bool:
    """Whether it is what torch.compile makes of a module."""
    # the module that defines it takes seconds to import, and was imported if anything was compiled
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(net, compiler.OptimizedModule)
