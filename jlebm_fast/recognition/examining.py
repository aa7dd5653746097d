"""Other people's energies: recognised as an MLP where they are one, tested before trusted, watched afterwards.

    trace      a float64 copy of the module runs once and `tracing.py` conjectures its structure
    follow     where that finds none, `following.py` conjectures where in the forward its layers stand
    test       value and gradient of that structure against the copy's own, on random inputs of two batch sizes and on
               latents of all sizes (`agreeing.py`); and against the module's in its own type, at latents of its user
               (`energy_source.py`)
    condition  a context beside z is part of the first layer's inputs, constant along a chain
    keep       the structure, per module and weakly; never a parameter: `recognised.py` reads those at every call, or
               `probing.py` by a run of the forward
    watch      modules, forwards, modes (train/eval), ties between parameters, attributes (plain values however nested,
               identities of the rest), globals, closures and methods that the code names: what differs from the
               trace's starts it anew. Where code looks at what cannot be watched (`blind_spots.py`) there is the plan
               alone, with which every run is compared
    refuse     what could change unseen: foreign hooks, values of tensors read by a forward, numbers of unknown origin

A module that is not recognised runs its own forward under autograd, on clones of its buffers, so that sampling leaves a
power iteration or running mean as it was.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ..backends import eager
from ..checks import has_memory
from ..energy import EnergyLinear
from ..latents import LatentLayout
from ..modes import ByIdentity, capturing, chain_mode
from ..ops import check_spec
from .agreeing import check_far_out, check_in_its_own_type
from .blind_spots import blind_spot
from .following import Follower, Seen
from .observing import InFloat64
from .probing import NO_CONDITIONS, Conditions, Forward, OtherPath, Plan, Probed, like_of, read
from .recognised import Layer, Recognised, assembled, effective_weights
from .structure import Label, Raising, Structure, Untraceable, structure_of
from .tracing import Tracer
from .twins import FORWARD_ERRORS, copy_of, replace_what_tests_nothing
from .watching import Guards, foreign_hook, numbers_of

_TEST_CHAINS = (3, 7)
_TEST_TOLERANCE = 1e-9
# a module that changed so often is read by a plan, which no change of an attribute makes void
_MOST_TRACES = 3


class Unrecognised(NamedTuple):
    """Why a module does not run in the fused kernels.

    lasting   False where another thread may be the cause, so that it is looked at again
    raised    whether its forward does not take random latents of such widths
    """

    reason: str
    lasting: bool = True
    raised: bool = False


def _trace(
    net: nn.Module,
    method: str,
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
    z = layout.restore(flat * 1)  # what the forward writes into it is not written into what the test compares with
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
            output = getattr(net, method)(z, **options) if method != "forward" else net(z, **options)
        structure, linears = structure_of(tracer.label_of(output), chains, dim, context_dim)
        check_spec(structure.spec)
        (expected_grad,) = torch.autograd.grad(output.sum(), flat, allow_unused=True)
    except Untraceable:
        raise
    except FORWARD_ERRORS as error:
        raise Raising(f"a float64 copy of it, run on {chains} random chains, raised {error}") from error
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


def _follow(
    twin: nn.Module,
    method: str,
    layout: LatentLayout,
    conditions: Conditions,
    n: int,
    scale: float,
    device: torch.device,
) -> Plan:
    """The plan of one followed run of a float64 copy on n chains, tested on the values of the run."""
    generator = torch.Generator("cpu").manual_seed(n)
    flat = scale * torch.randn(n, layout.dim, generator=generator, dtype=torch.float64, device="cpu").to(device)
    flat.requires_grad_()
    # conditions are those of the call: what is a label or a time is not ours to invent
    given = conditions.rows([i % max(conditions.chains, 1) for i in range(n)]).double()
    follower = Follower(twin, n, layout.dim)
    z = layout.restore(flat.detach().clone())
    for piece in [z] if isinstance(z, Tensor) else z:
        follower.put(piece, Seen("affine"))
    for leaf, of_chains in zip(tree_leaves(given.options), given.of_chains, strict=True):
        if of_chains:
            follower.put(leaf, Seen("condition"))
    try:
        forward = Forward(twin, method)
        buffers = forward.buffers()
        with InFloat64():
            with torch.no_grad(), follower:
                output = forward(buffers, z, given.options)
            plan = follower.plan(output)
            check_spec(plan.spec)
            with torch.no_grad():
                mlp, quadratic = read(plan, forward, layout, given, flat.dtype, device)
            expected = forward(forward.buffers(), layout.restore(flat * 1), given.options)
        (expected_grad,) = torch.autograd.grad(expected.sum(), flat, allow_unused=True)
    except Untraceable:
        raise
    except OtherPath:
        raise Untraceable("its forward takes another path when it runs again") from None
    except FORWARD_ERRORS as error:
        raise Raising(f"a float64 copy of it, run on {n} random chains, raised {error}") from error
    finally:
        follower.remove_hooks()
    with torch.no_grad():
        value, grad = eager.mlp_energy_grad(flat.detach(), mlp)
        if quadratic is not None:
            value, grad = value + quadratic.value(flat), grad + quadratic.gradient(flat)
    if expected_grad is None or not (_close(value, expected.reshape(-1)) and _close(grad, expected_grad)):
        if quadratic is not None:
            raise Untraceable(
                "what it adds to its network is no Gaussian in z, of independent coordinates and alike in all chains"
            )
        raise Untraceable("the MLP read out of its forward does not reproduce its value and gradient")
    return plan


def recognise(
    net: nn.Module,
    layout: LatentLayout,
    method: str = "forward",
    conditions: Conditions = NO_CONDITIONS,
    *,
    trace: bool = True,
) -> Recognised | Probed | Unrecognised:
    """Examine a module, leaving it, its buffers and torch's random state as they are: a draw is refused.

    method     that takes the latents, "forward" or another
    trace      False: look for a plan at once
    """
    if any(is_lazy(parameter) for parameter in net.parameters()):
        return Unrecognised("it has parameters without a shape yet; call it once")
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        if not has_memory(tensor):
            return Unrecognised(f"'{name}' is a {type(tensor).__name__}, whose memory the fused kernels cannot read")
    hooked = foreign_hook(net)
    if hooked is not None:
        return Unrecognised(f"{hooked} carries a hook, which the fused kernels would never run")
    tensor = next(net.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    try:
        twin = copy_of(net).to(torch.float64)
        replace_what_tests_nothing(twin)
    except FORWARD_ERRORS as error:
        return Unrecognised(f"it cannot be copied to be examined: {error}")
    spot = blind_spot(net, method)
    # code that names no module, nor an object of its own, cannot draw from Python's or numpy's generators, which other
    # threads may be drawing from meanwhile
    generators = None if spot is None else (random.getstate(), _numpy_state())
    drawn = False
    try:
        with chain_mode(device, gradients=True):
            found = _examine(net, twin, layout, method, conditions, device, trace and spot is None)
            if not capturing(device):
                try:
                    check_in_its_own_type(net, method, layout, conditions, found, _like(net))
                except Untraceable:
                    if isinstance(found, Probed):
                        raise
                    found = _examine(net, twin, layout, method, conditions, device, False)
                    check_in_its_own_type(net, method, layout, conditions, found, _like(net))
    except Untraceable as why:
        return Unrecognised(str(why), raised=isinstance(why, Raising))
    except OtherPath:
        return Unrecognised("its forward takes another path when it runs again")
    finally:
        if generators is not None and generators != (random.getstate(), _numpy_state()):
            drawn = True
            random.setstate(generators[0])
            _set_numpy_state(generators[1])
    if drawn:
        return Unrecognised("its forward draws from Python's or numpy's random generator", lasting=False)
    if isinstance(found, Probed):
        found.why = spot
    return found


def _examine(
    net: nn.Module,
    twin: nn.Module,
    layout: LatentLayout,
    method: str,
    conditions: Conditions,
    device: torch.device,
    trace: bool,
) -> Recognised | Probed:
    """What a module is, by two runs of its float64 copy: a forward that depends on the batch, or on the values in it,
    shows.

    Raises:
        Untraceable: it is no MLP.
    """
    runs = tuple(zip(_TEST_CHAINS, (1, 3), strict=True))
    context_dim = _traceable_context(conditions)
    if trace and context_dim is not None:
        numbers = numbers_of(net)
        try:
            first, second = (_trace(twin, method, layout, context_dim, n, scale, device, numbers) for n, scale in runs)
            if first == second:
                check_far_out(twin, method, layout, conditions, first, device)
                return Recognised(net, first)
        except Untraceable:
            pass  # `_follow` understands more, and says why if it does not
    first, second = (_follow(twin, method, layout, conditions, n, scale, device) for n, scale in runs)
    if first != second:
        raise Untraceable("its forward takes another path on another batch")
    check_far_out(twin, method, layout, conditions, first, device)
    return Probed(Forward(net, method), layout, first, _like(net))


def _like(net: nn.Module) -> Tensor:
    """The parameter that tells the type of all.

    Raises:
        Untraceable: there is none.
    """
    like = like_of(net)
    if like is None:
        raise Untraceable("it has no parameters")
    return like


def _numpy_state() -> tuple:
    """The state of numpy's global generator, comparable."""
    name, keys, *rest = np.random.get_state()
    return name, tuple(keys.tolist()), *rest


def _set_numpy_state(state: tuple) -> None:
    np.random.set_state((state[0], np.array(state[1], dtype=np.uint32), *state[2:]))


def _traceable_context(conditions: Conditions) -> int | None:
    """Coordinates of a context [chains, n] that `tracing.py` can follow, 0 without any condition; else None."""
    options, chains = conditions.options, conditions.chains
    if not options:
        return 0
    context = options.get("context")
    fits = len(options) == 1 and isinstance(context, Tensor) and context.dim() == 2 and context.is_floating_point()
    return context.shape[1] if fits and context.shape[0] == chains and context.shape[1] else None


class Examined(NamedTuple):
    """What is known about a module, how often it was examined, and what had changed before the latest time.

    counts   numbers of chains at which it agreed with the forward's own value and gradient
    """

    guards: Guards
    found: Recognised | Probed | Unrecognised
    times: int
    change: str | None
    counts: set[int]


_examined: ByIdentity[dict[Any, Examined]] = ByIdentity(dict)
# layouts and modes of one module that are remembered side by side
_MAX_REMEMBERED = 8


def recognised(
    net: nn.Module,
    layout: LatentLayout,
    method: str = "forward",
    conditions: Conditions = NO_CONDITIONS,
    *,
    anew: bool = False,
    plain: bool = False,
) -> Recognised | Probed | Unrecognised:
    """`recognise`, remembered per module, layout, mode and kind of conditions for as long as nothing that matters
    changes.

    anew    a plan that was found does not hold any more
    plain   its parameters go to a kernel that compares their shapes with the structure's
    """
    remembered = _examined[net]
    key = (layout, net.training, method, conditions.kind)
    entry = remembered.get(key)
    if entry is None and any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        return Unrecognised("a scripted or traced module cannot be watched; pass the nn.Module it was made from")
    if entry is not None and not anew and _is_settled(entry) and _holds(entry, net, plain):
        return entry.found
    times, change = (
        (0, None) if entry is None else (entry.times, entry.guards.change() or _other_than_watched(entry, net))
    )
    if len(remembered) >= _MAX_REMEMBERED:
        remembered.clear()
    # the snapshot comes first: a change while tracing would be noticed at the next call
    guards = Guards(net, method)
    found = recognise(net, layout, method, conditions, trace=times < _MOST_TRACES)
    if type(found) is Unrecognised and times >= _MOST_TRACES:
        found = recognise(net, layout, method, conditions)
    remembered[key] = Examined(guards, found, times + 1, change, set())
    return found


def _holds(entry: Examined, net: nn.Module, plain: bool) -> bool:
    """Whether what was found still is so; of a plan every run tells, but not in what type."""
    found = entry.found
    if type(found) is Probed:
        return found.is_of(net)
    return entry.guards.hold(shapes=not (plain and type(found) is Recognised and found.shapes_are_compared))


def _other_than_watched(entry: Examined, net: nn.Module) -> str:
    """What changed, where nothing did that is watched."""
    found = entry.found
    return "its type or device" if type(found) is Probed and not found.is_of(net) else "its path"


def _is_settled(entry: Examined) -> bool:
    """Whether another look at an unchanged module would find nothing else."""
    return type(entry.found) is not Unrecognised or entry.found.lasting or entry.times >= _MOST_TRACES


def examined(net: nn.Module, layout: LatentLayout, method: str, conditions: Conditions) -> Examined | None:
    """What is known about a module; None if it was never examined for such latents and conditions."""
    return _examined[net].get((layout, net.training, method, conditions.kind))


def give_up_on(net: nn.Module, layout: LatentLayout, method: str, conditions: Conditions, reason: str) -> None:
    """Remember that what was found of a module does not hold, until something about it changes."""
    key = (layout, net.training, method, conditions.kind)
    _examined[net][key] = _examined[net][key]._replace(found=Unrecognised(reason))
