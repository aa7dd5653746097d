"""The Langevin loops that the field copies from repository to repository, under their own names and signatures.

Changing one import makes an existing training script fast:

    from jlebm_fast.compat import langevin_prior              # joint energies: a list of latents, p ∝ exp(f) N(0, I)
    from jlebm_fast.compat import sample_langevin_prior_z     # LEBM: one latent, p ∝ exp(−E) N(0, sig²)

Two things differ from the copied loops, on purpose: the noise comes from the noise contract (one key drawn from torch's
generator per call), and a spectral norm is converged and frozen during a chain instead of iterated at every step. Where
the latter is wanted, exactly as published, pass `lambda z: netE(z)` instead of netE.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import describe
from .dynamics import GaussianPrior
from .sampler import FastLangevin, LangevinInfo

_LOG_EVERY = 5
_REQUIRED = object()
_logger = logging.getLogger(__name__)


def _option(args: object, name: str, default: object = _REQUIRED) -> Any:
    """args.name, or args["name"] for a mapping."""
    value = args.get(name, default) if isinstance(args, Mapping) else getattr(args, name, default)
    if value is _REQUIRED:
        raise ValueError(f"args must have {name}, got {type(args).__name__} without it")
    return value


def _number(args: object, name: str, default: object = _REQUIRED) -> float:
    value = _option(args, name, default)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def _steps(args: object) -> int:
    steps = _number(args, "e_l_steps")
    if not steps.is_integer():
        raise ValueError(f"e_l_steps must be an integer, got {steps!r}")
    return int(steps)


def _report(info: LangevinInfo, n_steps: int, write: Callable[[str], object]) -> None:
    for k, energy in enumerate(info.energy.sum(dim=1).tolist()):
        if k % _LOG_EVERY == 0 or k == n_steps - 1:
            write(f"Langevin prior {k + 1:3d}/{n_steps:3d}: energy={energy:8.3f}")


def langevin_prior(
    zs_init: list[Tensor],
    netE: nn.Module | Callable[[list[Tensor]], Tensor],
    args: object,
    should_print: bool = True,
) -> list[Tensor]:
    """Short-run prior chain of the joint latent energy model, z_i ← z_i + s²/2 (∂f/∂z_i − z_i) + s ε.

    Args:
        zs_init: latent layers [chains, d_l]
        netE: f, from the list to [chains] or [chains, 1]
        args: namespace or mapping with e_l_steps, e_l_step_size, and optionally e_l_with_noise (default true)
        should_print: log the summed energy of every fifth step through `logging`, at level INFO

    Returns:
        The layers at the end of the chain, detached.

    Raises:
        ValueError: an option is missing, or an input does not fit.

    Example:
        >>> from types import SimpleNamespace
        >>> from jlebm_fast import EnergyMLP
        >>> args = SimpleNamespace(e_l_steps=60, e_l_step_size=0.4)
        >>> zs = langevin_prior([torch.randn(8, 2), torch.randn(8, 10)], EnergyMLP((2, 10), 50, 4), args)
        >>> [tuple(z.shape) for z in zs]
        [(8, 2), (8, 10)]

    Source: Cui, Wu, Han, ICCV 2023, eq. 8, and its public training scripts.
    """
    n_steps = _steps(args)
    sampler = FastLangevin(
        netE,
        n_steps=n_steps,
        step_size=_number(args, "e_l_step_size"),
        noise_scale=1.0 if _option(args, "e_l_with_noise", True) else 0.0,
    )
    if not isinstance(zs_init, (list, tuple)):
        raise ValueError(f"zs_init must be a list of latent layers [chains, d_l], got {describe(zs_init)}")
    if not (should_print and _logger.isEnabledFor(logging.INFO)):
        return sampler.sample(list(zs_init))
    zs, info = sampler.sample(list(zs_init), return_info=True)
    _report(info, n_steps, _logger.info)
    return zs


class _EnergyForm(nn.Module):
    """E(z) from the score netE(z), in the output forms of the LEBM code."""

    def __init__(self, netE: nn.Module | Callable[[Tensor], Tensor], form: str) -> None:
        super().__init__()
        self.netE, self.form = netE, form

    def forward(self, z: Tensor) -> Tensor:
        return _in_form(self.netE(z), self.form)


def _in_form(score: Tensor, form: str) -> Tensor:
    if form == "tanh":
        return torch.tanh(-score)
    return torch.sigmoid(score) if form == "sigmoid" else F.softplus(score)


# by id(netE), for as long as netE lives: what is recognised of a form is remembered with it. The oldest gives way to a
# ninth, for one whose own attributes lead back to it would stay.
_MOST_FORMS = 8
_forms: dict[int, tuple[weakref.ref, dict[str, _EnergyForm]]] = {}


def _with_form(netE: nn.Module | Callable[[Tensor], Tensor], form: str) -> nn.Module | Callable[[Tensor], Tensor]:
    if form not in ("identity", "tanh", "sigmoid", "softplus"):
        raise ValueError(f"e_energy_form must be identity, tanh, sigmoid or softplus, got {form!r}")
    if form == "identity" or not callable(netE):
        return netE
    if not isinstance(netE, nn.Module):
        # still a plain callable: never recognised, so that its own forward runs at every step
        return lambda z: _in_form(netE(z), form)
    if isinstance(netE, torch.jit.ScriptModule) or any(vars(cls).get("__slots__") for cls in type(netE).__mro__):
        return _EnergyForm(netE, form)  # has state outside its __dict__
    entry = _forms.get(id(netE))
    if entry is None or entry[0]() is not netE:
        if len(_forms) >= _MOST_FORMS:
            _forms.pop(next(iter(_forms)))
        key = id(netE)
        entry = _forms[key] = (weakref.ref(netE, lambda _: _forms.pop(key, None)), {})
    if form not in entry[1]:
        entry[1][form] = _EnergyForm(_stand_in(netE), form)
    return entry[1][form]


def _stand_in(net: nn.Module) -> nn.Module:
    """A module that is `net` in all it has and does, for both have one __dict__, and that does not keep `net` alive."""
    twin = object.__new__(type(net))
    object.__setattr__(twin, "__dict__", vars(net))
    return twin


def sample_langevin_prior_z(
    z: Tensor, netE: nn.Module | Callable[[Tensor], Tensor], args: object, verbose: bool = False
) -> tuple[Tensor, Tensor]:
    """Short-run prior chain of the latent energy model, z ← z − s²/2 (∇E + z/sig²) + s ε.

    Args:
        z: [chains, dim] or [chains, dim, 1, 1]
        netE: the score network; E is its output in the form args.e_energy_form
        args: namespace or mapping with e_l_steps, e_l_step_size, and optionally e_prior_sig (default 1),
            e_l_with_noise (default true), e_energy_form (identity, tanh, sigmoid, softplus; tanh is of the negative)
        verbose: print the summed energy of every fifth step

    Returns:
        (z at the end of the chain, mean over the chains of ‖∇E‖ at the last step)

    Raises:
        ValueError: an option is missing, or an input does not fit.

    Example:
        >>> from types import SimpleNamespace
        >>> netE = nn.Sequential(nn.Linear(100, 200), nn.GELU(), nn.Linear(200, 200), nn.GELU(), nn.Linear(200, 1))
        >>> args = SimpleNamespace(e_l_steps=60, e_l_step_size=0.4, e_prior_sig=1.0, e_l_with_noise=True)
        >>> z, grad_norm = sample_langevin_prior_z(torch.randn(8, 100), netE, args)
        >>> z.shape, grad_norm.shape
        (torch.Size([8, 100]), torch.Size([]))

    Source: Pang et al., NeurIPS 2020, eq. 7, and its public training scripts.
    """
    n_steps = _steps(args)
    sampler = FastLangevin(
        _with_form(netE, _option(args, "e_energy_form", "identity")),
        n_steps=n_steps,
        step_size=_number(args, "e_l_step_size"),
        noise_scale=1.0 if _option(args, "e_l_with_noise", True) else 0.0,
        prior=GaussianPrior(std=_number(args, "e_prior_sig", 1.0)),
        maximize=False,
    )
    # what stays unsaid need not be recorded: of the norms only the last one goes to the caller
    z, info = sampler.sample(z, return_info=True, thin=1 if verbose else max(1, n_steps))
    if verbose:
        _report(info, n_steps, print)
    if not n_steps:
        return z, (z if isinstance(z, Tensor) else z[0]).new_tensor(math.nan)
    return z, info.grad_norm[-1].mean()
