"""Whether what was read out of a forward has its value and gradient: where a chain starts, and very far out.

Of random latents alone nobody sees a wall that stands ten or a thousand standard deviations away. So `examining.py`
compares on latents of all sizes, in float64, once; and `energy_source.py` each reading of a plan at its user's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends import eager
from ..checks import dtype_name
from ..latents import LatentLayout
from ..modes import chain_mode
from ..problem import MLP
from ..quadratic import Quadratic
from .observing import InFloat64
from .probing import Conditions, Forward, OtherPath, Plan, Probed, read
from .recognised import Recognised
from .structure import Structure, Untraceable
from .twins import FORWARD_ERRORS, copy_of

# rows on which a reading is compared with the forward's own value and gradient
_MOST_COMPARED = 4096
_CLOSE, _CLOSE_ON_A_GPU = 2e-4, 2e-2  # there products may be tf32
_ASIDE = 1e-2  # how far a second look is taken where a kink may have lain within rounding
# latents far out: eight sizes for each power of ten, to where nothing but a leading term is left
_SIZES = tuple(10 ** (k / 8) for k in range(-8, 49))
_ROWS_OF_A_SIZE = 6
_CLOSE_FAR_OUT = 1e-7  # of the largest at latents of that size, in float64
_OWN_TOLERANCE = 1e-2  # in the module's own type: of the largest value, generous to bfloat16's products on a GPU
_OWN_CHAINS = 3


def agrees(
    forward: Forward,
    layout: LatentLayout,
    mlp: MLP,
    quadratic: Quadratic | None,
    flat: Tensor,
    conditions: Conditions,
) -> bool:
    """Whether an MLP, and what is added to it, has the forward's own value and gradient at these latents, relative to
    the largest.

    A chain that is off is looked at a second time, a little aside.
    """
    if flat.shape[0] > _MOST_COMPARED:
        flat, conditions = flat[:_MOST_COMPARED], conditions.rows(range(_MOST_COMPARED))
        bias, logit = (None if t is None else t[:_MOST_COMPARED] for t in (mlp.context_bias, mlp.logit))
        mlp = mlp._replace(context_bias=bias, logit=logit)
    off = _off(forward, layout, mlp, quadratic, flat, conditions)
    if off is None or not bool(off.any()):
        return off is not None
    aside = torch.randn(flat.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    still = _off(forward, layout, mlp, quadratic, flat + _ASIDE * aside.to(flat.device, flat.dtype), conditions)
    return still is not None and not bool((off & still).any())


def _far_latents(dim: int, device: torch.device) -> Tensor:
    """Latents [n, dim] of all sizes in float64: of each size six rows one after another: to both sides, all
    coordinates alike, one alone, and in a random direction."""
    generator = torch.Generator("cpu").manual_seed(1)
    sizes = torch.tensor(_SIZES, dtype=torch.float64, device="cpu").view(-1, 1)
    alone = torch.nn.functional.one_hot(torch.arange(len(sizes), device="cpu") % dim, dim)
    towards = torch.randn(len(sizes), dim, generator=generator, dtype=torch.float64, device="cpu")
    one_side = torch.stack([sizes.expand(-1, dim), sizes * alone, sizes * towards], 1)
    return torch.cat([one_side, -one_side], 1).view(-1, dim).to(device)


def _agrees_far_out(
    forward: Forward,
    layout: LatentLayout,
    mlp: MLP,
    quadratic: Quadratic | None,
    flat: Tensor,
    conditions: Conditions,
) -> bool:
    """Whether they have the forward's own value and gradient at these of `_far_latents`, relative to the largest of a
    size.

    Where the forward's own is not finite, as where an activation that is written out overflows, nothing is asked.
    """
    own = _own(forward, layout, flat, conditions)
    if own is None:
        return False
    for theirs, ours in zip(own, _read_out(mlp, quadratic, flat), strict=True):
        theirs, ours = (t.reshape(flat.shape[0] // _ROWS_OF_A_SIZE, -1) for t in (theirs, ours))
        finite = theirs.isfinite()
        largest = torch.where(finite, theirs.abs(), 0.0).amax(dim=1, keepdim=True)
        # written so that NaN of ours is off
        if bool((finite & ~((ours - theirs).abs() <= _CLOSE_FAR_OUT * (1 + largest))).any()):
            return False
    return True


def _own(forward: Forward, layout: LatentLayout, flat: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor] | None:
    """The forward's own value [chains] and gradient [chains, dim]; None where it has none that depends on z."""
    with chain_mode(flat.device, gradients=True):
        z = flat.clone().requires_grad_()
        output = forward(forward.buffers(), layout.restore(z * 1), conditions.options)
        if not isinstance(output, Tensor) or output.numel() != flat.shape[0] or not output.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(output.sum(), z, allow_unused=True)
    return None if gradient is None else (output.detach().reshape(-1), gradient)


def _read_out(mlp: MLP, quadratic: Quadratic | None, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Value [chains] and gradient [chains, dim] by what was read."""
    with torch.no_grad():
        value, gradient = eager.mlp_energy_grad(flat, mlp)
        if quadratic is not None:
            value, gradient = value + quadratic.value(flat), gradient + quadratic.gradient(flat)
        return value, gradient


def _off(
    forward: Forward,
    layout: LatentLayout,
    mlp: MLP,
    quadratic: Quadratic | None,
    flat: Tensor,
    conditions: Conditions,
) -> Tensor | None:
    """Which chains [chains] have another value or gradient; None where the forward has none that depends on z."""
    own = _own(forward, layout, flat, conditions)
    if own is None:
        return None
    value, gradient = _read_out(mlp, quadratic, flat)
    close = _CLOSE if flat.is_cpu else _CLOSE_ON_A_GPU
    return _far(value.view(-1, 1), own[0].view(-1, 1).to(value.dtype), close) | _far(gradient, own[1], close)


def _far(value: Tensor, own: Tensor, close: float) -> Tensor:
    """Which chains [chains] are farther off than that; where the own is not finite nothing is asked."""
    finite = own.isfinite()
    largest = torch.where(finite, own.abs(), 0.0).amax() if own.numel() else own.new_zeros(())
    near = (value - own).abs() <= close * largest + 1e-7
    return (finite & ~near).any(dim=1)


# --- of what was found of a module


def check_far_out(
    twin: nn.Module,
    method: str,
    layout: LatentLayout,
    conditions: Conditions,
    found: Structure | Plan,
    device: torch.device,
) -> None:
    """What holds of the latents of two runs need not hold of others, where a chain may come to.

    Raises:
        Untraceable: it does not.
    """
    flat = _far_latents(layout.dim, device)
    try:
        if _holds_at(flat, twin, method, layout, conditions, found):
            return
    except (OtherPath, *FORWARD_ERRORS):
        pass  # so many chains at once may be what it is not made for
    try:
        agreed = all(_holds_at(few, twin, method, layout, conditions, found) for few in flat.split(_ROWS_OF_A_SIZE))
    except OtherPath:
        raise Untraceable("its forward takes another path far from 0") from None
    except FORWARD_ERRORS as error:
        raise Untraceable(
            f"a float64 copy of it, run on {_ROWS_OF_A_SIZE} chains far from 0, raised {error}"
        ) from error
    if not agreed:
        raise Untraceable("far from 0 it has another value or gradient than what was read out of its forward")


def _holds_at(
    flat: Tensor, twin: nn.Module, method: str, layout: LatentLayout, conditions: Conditions, found: Structure | Plan
) -> bool:
    """Whether what was found is the copy's forward at these of the latents far out."""
    given = conditions.rows([i % max(conditions.chains, 1) for i in range(flat.shape[0])]).double()
    with InFloat64():
        forward = Forward(twin, method)
        if isinstance(found, Plan):
            with torch.no_grad():
                mlp, quadratic = read(found, forward, layout, given, flat.dtype, flat.device)
        else:
            mlp, quadratic = Recognised(twin, found).mlp(1.0, given.options.get("context")), None
        return _agrees_far_out(forward, layout, mlp, quadratic, flat, given)


def check_in_its_own_type(
    net: nn.Module, method: str, layout: LatentLayout, conditions: Conditions, found: Recognised | Probed, like: Tensor
) -> None:
    """A forward may look at the type of its tensors, which a float64 copy cannot show.

    Raises:
        Untraceable: it does.
    """
    n = _OWN_CHAINS
    given = conditions.rows([i % max(conditions.chains, 1) for i in range(n)])
    flat = torch.randn(n, layout.dim, generator=torch.Generator("cpu").manual_seed(n), device="cpu")
    flat = flat.to(like.device, like.dtype)
    try:
        # a copy, so that attributes that it writes stay as they are, and no other thread changes a parameter
        twin = copy_of(net)
        own = Forward(twin, method)
        if isinstance(found, Probed):
            found.mlp(given)  # a copy draws from copies of generators
            mlp, quadratic = found.of(own).mlp(given)
        else:
            mlp, quadratic = Recognised(twin, found.structure).mlp(1.0, given.options.get("context")), None
        with torch.no_grad():
            value = own(own.buffers(), layout.restore(flat), given.options).reshape(-1).double()
            expected = eager.mlp_forward(flat, mlp)[0].double()
            if quadratic is not None:
                expected = expected + quadratic.value(flat).double()
    except OtherPath:
        raise Untraceable(f"its forward takes another path in {dtype_name(like.dtype)}") from None
    except FORWARD_ERRORS:
        return  # the user's to see, when it runs
    finite = bool(value.isfinite().all()) and bool(expected.isfinite().all())
    if finite and not bool(((value - expected).abs() <= _OWN_TOLERANCE * (1 + expected.abs().max())).all()):
        raise Untraceable(f"its forward computes something else in {dtype_name(like.dtype)} than in float64")
