"""Step sizes, noise scales and priors of the papers, turned into coefficients. The only place with s²/2.

    paper    z <- z + s²/2 (∇f(z) + (mean − z)/std² + ∇ log-likelihood) + s · noise_scale · eps
    ops      z <- z + c_grad ∇f + c_prior ((mean − z) · precision + extra_grad) + c_noise eps

Source: Cui, Wu, Han, "Learning Hierarchical Features with Joint Latent Space Energy-Based Prior", ICCV 2023, eq. 8;
Pang et al., "Learning Latent Space Energy-Based Prior Model", NeurIPS 2020, eq. 7.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from .checks import describe

_LEAST_STD = 1e-18


def _as_float(name: str, wanted: str, value: object) -> float:
    """float(value), of a number or of an array or tensor that holds one."""
    of_complex = value.is_complex() if isinstance(value, Tensor) else isinstance(value, numbers.Complex)
    if not isinstance(value, (str, bytes)) and (isinstance(value, numbers.Real) or not of_complex):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass  # no number, or none that a float holds: said below
    raise ValueError(f"{name} {wanted}, got {describe(value) if isinstance(value, Tensor) else repr(value)}")


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianPrior:
    """The Gaussian p0(z) = N(mean, std²) that an energy tilts: p(z) ∝ exp(f(z)) p0(z).

    Its drift term is (mean − z)/std². Tensors are copied: what becomes of them later does not matter.

    Args:
        mean: float, or tensor [dim], [chains, 1] or [chains, dim]
        std: the same; positive

    Raises:
        ValueError: not finite, or std not positive; at the call, a shape that does not fit z.

    Example:
        >>> GaussianPrior(std=0.5)
        GaussianPrior(mean=0.0, std=0.5)
        >>> per_dimension = GaussianPrior(mean=torch.zeros(16), std=torch.ones(16))
    """

    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if not isinstance(value, (numbers.Real, Tensor)) or (isinstance(value, Tensor) and value.is_complex()):
                raise ValueError(f"{name} of the prior must be a float or a tensor, got {describe(value)}")
            if not isinstance(value, Tensor):
                value = _as_float(f"{name} of the prior", "must be a float", value)
                object.__setattr__(self, name, value)
            if isinstance(value, Tensor):
                value = value.detach().clone()
                object.__setattr__(self, name, value)
            if not (torch.isfinite(value).all() if isinstance(value, Tensor) else math.isfinite(value)):
                raise ValueError(f"{name} of the prior must be finite")
        if not ((self.std > 0).all() if isinstance(self.std, Tensor) else self.std > 0):
            raise ValueError(f"std of the prior must be positive, got {self.std}")
        if not ((self.std >= _LEAST_STD).all() if isinstance(self.std, Tensor) else self.std >= _LEAST_STD):
            raise ValueError(f"std of the prior must be at least {_LEAST_STD:g}, where 1 / std² is a float32")

    def terms(self, z: Tensor) -> tuple[Tensor | None, Tensor]:
        """(mean or None where it is zero, precision 1/std²), each [dim] or [chains, dim] like z [chains, dim]."""
        if isinstance(self.mean, (float, int)) and self.mean == 0:
            mean = None
        else:
            mean = _broadcast("mean of the prior", self.mean, z).to(z.dtype)
        if isinstance(self.std, (float, int)) and self.std == 1:  # the usual prior, without three operations
            return mean, torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
        precision = _broadcast("std of the prior", self.std, z)
        return mean, precision.to(torch.float64).pow(-2).to(z.dtype)


STANDARD_NORMAL = GaussianPrior()


def check_prior(prior: object) -> None:
    if prior is not None and not isinstance(prior, GaussianPrior):
        raise ValueError(f"prior must be a GaussianPrior or None, got {describe(prior)}")


def check_maximize(maximize: object) -> None:
    if not isinstance(maximize, bool):
        raise ValueError(f"maximize must be True or False, got {maximize!r}")


def _broadcast(name: str, value: float | Tensor, z: Tensor) -> Tensor:
    chains, dim = z.shape
    if not isinstance(value, Tensor) or value.dim() == 0:
        return torch.full((dim,), float(value), dtype=torch.float64, device=z.device)
    value = value.detach()
    if value.device != z.device or tuple(value.shape) not in ((dim,), (chains, 1), (chains, dim)):
        raise ValueError(
            f"{name} must be a float or a tensor [{dim}], [{chains}, 1] or [{chains}, {dim}] on {z.device}, "
            f"got {describe(value)}"
        )
    return value.contiguous() if value.dim() == 1 else value.expand(chains, dim).contiguous()


def check_schedule(
    name: str, value: float | Sequence[float] | Tensor, n_steps: int
) -> float | tuple[float, ...] | Tensor:
    """A float, a tuple of n_steps floats, or a copy of a per-chain tensor [chains]: finite and not negative."""
    if type(value) is float and 0.0 <= value < math.inf:  # the usual case, at once
        return value
    wanted = f"must be a float, a sequence of {n_steps} or a tensor [chains]"
    if isinstance(value, Tensor) and value.dim() == 1:
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating point tensor [chains], got {describe(value)}")
        if not (torch.isfinite(value) & (value >= 0)).all():
            raise ValueError(f"{name} must be finite and not negative in every chain")
        return value.detach().clone()
    if isinstance(value, Tensor) and value.dim() > 1:
        raise ValueError(f"{name} {wanted}, got {describe(value)}")
    if isinstance(value, (str, bytes, bytearray, Set, Mapping)) or value is None:
        raise ValueError(f"{name} {wanted}, got {value!r}")
    # an array of no dimensions has a __len__ that raises
    if hasattr(value, "__len__") and hasattr(value, "__iter__") and getattr(value, "ndim", 1):
        entries = result = tuple([_as_float(f"{name}[{i}]", "must be a float", v) for i, v in enumerate(value)])
        if len(entries) != n_steps:
            raise ValueError(
                f"{name} as a sequence must have n_steps = {n_steps} entries, got {len(entries)} "
                "(one value per chain is given as a tensor)"
            )
    else:
        entries: tuple[float, ...] = (_as_float(name, wanted, value),)
        result: float | tuple[float, ...] = entries[0]
    if not all(math.isfinite(v) and v >= 0 for v in entries):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return result


def step_rows(
    step_size: float | tuple[float, ...] | Tensor, noise_scale: float | tuple[float, ...] | Tensor, n_steps: int
) -> Tensor:
    """The factors (c_grad, c_prior, c_noise) of each step, float64 [n_steps, 3]; a per-chain schedule contributes 1."""
    s, scale = (
        torch.tensor(1.0 if isinstance(value, Tensor) else value, dtype=torch.float64, device="cpu").expand(n_steps)
        for value in (step_size, noise_scale)
    )
    # the one half of a per-chain step size stands in the per-chain factor
    drift = s if isinstance(step_size, Tensor) else s * s / 2
    return torch.stack([drift, drift, s * scale], dim=1)


def step_numbers(step_size: float | Tensor) -> tuple[float, float]:
    """(c_grad, c_noise) of one step as numbers, for samplers that weigh densities; 1 each where the step sizes stand in
    `chain_coefficients`."""
    return (1.0, 1.0) if isinstance(step_size, Tensor) else (step_size * step_size / 2, step_size)


def chain_coefficients(step_size: object, noise_scale: object, z: Tensor) -> Tensor | None:
    """The per-chain factors [chains, 3] in z's dtype, computed in float64 and rounded once; None without any."""
    if not isinstance(step_size, Tensor) and not isinstance(noise_scale, Tensor):
        return None
    factors = torch.ones(z.shape[0], 3, dtype=torch.float64, device=z.device)
    if isinstance(step_size, Tensor):
        s = _per_chain("step_size", step_size, z)
        factors[:, 0] = s * s / 2
        factors[:, 1] = factors[:, 0]
        factors[:, 2] = s
    if isinstance(noise_scale, Tensor):
        factors[:, 2] *= _per_chain("noise_scale", noise_scale, z)
    return factors.to(z.dtype)


def _per_chain(name: str, value: Tensor, z: Tensor) -> Tensor:
    if value.dim() != 1 or value.shape[0] != z.shape[0] or value.device != z.device:
        raise ValueError(
            f"{name} as a tensor must be [{z.shape[0]}] (one per chain) on {z.device}, got {describe(value)}"
        )
    return value.detach().to(torch.float64)
