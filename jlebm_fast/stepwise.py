"""Chains whose gradient needs autograd: any energy, and posterior chains with a log-likelihood.

    any energy    per step: one forward and backward of the user's energy, then the fused `langevin_step`; also an MLP
                  with a quadratic part, where diagnostics are asked for, with the fused `mlp_energy_grad`
    posterior     per step: the gradient of the log-likelihood, then `mlp_langevin_chain` with n_steps = 1

On a GPU the step is captured once in a CUDA graph and replayed (`captured.py`).
Both keep the meaning of `ChainResult` exactly, step for step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .captured import Capture, Step, captured_chain
from .checks import describe
from .latents import LatentLayout
from .modes import chain_mode, transformed
from .problem import MLP, ChainResult, Record, Update
from .quadratic import Quadratic


def _gradient(name: str, value: Tensor, z: Tensor) -> Tensor:
    """Gradient of the sum of `value` in z [chains, dim]; parameters and their .grad are left alone."""
    if not value.requires_grad:
        raise ValueError(
            f"{name} returned a tensor without a gradient in z; build it from z with differentiable operations "
            "(zero is z.sum(dim=1) * 0) and outside torch.no_grad()"
        )
    if value.dim() == 1 and value.is_floating_point():
        # the gradient of the sum, without a node for the sum
        (grad,) = torch.autograd.grad(value, z, torch.ones_like(value), allow_unused=True)
    else:
        (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
    if grad is None:
        raise ValueError(f"the output of {name} does not depend on z")
    return grad.contiguous()


def check_likelihood(log_likelihood: object) -> None:
    if log_likelihood is not None and not callable(log_likelihood):
        raise ValueError(f"log_likelihood must be a callable or None, got {type(log_likelihood).__name__}")


def _leaf(name: str, flat: Tensor) -> Tensor:
    """The latents as autograd starts from them."""
    if transformed():
        raise ValueError(
            f"{name} needs autograd at every step, which torch.func (vmap, grad, functionalize and others) does not "
            "allow inside: call outside the transform, or with an energy that is recognised as an MLP (`explain`) and "
            "no log_likelihood"
        )
    return flat.detach().requires_grad_()


class AnyEnergy(NamedTuple):
    """A user's energy as (value [chains], gradient [chains, dim]) of sign · energy on flat latents."""

    energy: nn.Module | Callable[..., Tensor]
    layout: LatentLayout
    context: Tensor | None
    y: Tensor | int | None
    sign: float

    def __call__(self, flat: Tensor, with_value: bool = True) -> tuple[Tensor | None, Tensor]:
        with chain_mode(flat.device, gradients=True):
            z = _leaf("energy", flat)
            options = {name: v for name, v in (("context", self.context), ("y", self.y)) if v is not None}
            value = self.energy(self.layout.restore(z), **options)
            chains = flat.shape[0]
            # of one chain a scalar too: what .squeeze() makes of [1]
            if not isinstance(value, Tensor) or value.numel() != chains or value.shape[:1] not in ((chains,), ()):
                raise ValueError(
                    f"energy must return one value per chain, [{chains}], [{chains}, 1] or [{chains}, 1, 1, 1], got "
                    f"{describe(value)}; several logits need a head such as logsumexp(dim=1)"
                )
            if value.is_complex():
                raise ValueError(f"energy must return real numbers, got {describe(value)}")
            grad = _gradient("energy", value, z)
        grad = grad if self.sign == 1.0 else self.sign * grad
        if not with_value:
            return None, grad
        value = value.detach().reshape(chains).to(flat.dtype)
        return value if self.sign == 1.0 else self.sign * value, grad


class WithQuadratic(NamedTuple):
    """An MLP and what is added to it of z alone, as (value [chains], gradient [chains, dim])."""

    mlp: MLP
    quadratic: Quadratic
    backend: str

    def __call__(self, flat: Tensor, with_value: bool = True) -> tuple[Tensor, Tensor]:
        value, grad = ops.mlp_energy_grad(flat, self.mlp, backend=self.backend)
        return value + self.quadratic.value(flat), grad + self.quadratic.gradient(flat)


class Likelihood(NamedTuple):
    """Gradient [chains, dim] of a user's log-likelihood on flat latents."""

    log_likelihood: Callable[..., Tensor]
    layout: LatentLayout

    def __call__(self, flat: Tensor) -> Tensor:
        with chain_mode(flat.device, gradients=True):
            z = _leaf("log_likelihood", flat)
            value = self.log_likelihood(self.layout.restore(z))
            chains = flat.shape[0]
            if not isinstance(value, Tensor) or tuple(value.shape) not in (
                (),
                (chains,),
                (chains, 1),
                (chains, 1, 1, 1),
            ):
                raise ValueError(f"log_likelihood must return [{chains}] or a scalar sum, got {describe(value)}")
            if value.is_complex():
                raise ValueError(f"log_likelihood must return real numbers, got {describe(value)}")
            return _gradient("log_likelihood", value, z).to(flat.dtype)


class _Recorder:
    """Collects ChainResult's fields over a Python loop."""

    def __init__(self, z: Tensor, n_steps: int, record: Record) -> None:
        chains, dim = z.shape
        n_kept = n_steps // record.thin
        self.record = record
        self.energy = self.grad_norm = self.displacement = self.first_bad_step = self.trajectory = None
        if record.diagnostics:
            self.energy, self.grad_norm, self.displacement = (z.new_empty(n_kept, chains) for _ in range(3))
            self.first_bad_step = torch.full((chains,), -1, dtype=torch.int64, device=z.device)
        if record.trajectory:
            self.trajectory = z.new_empty(n_kept, chains, dim)

    def keep(self, step: int, one: ChainResult) -> None:
        """Copies what step number `step` gave."""
        if self.record.diagnostics:
            self.first_bad_step.masked_fill_((one.first_bad_step >= 0) & (self.first_bad_step < 0), step)
        if (step + 1) % self.record.thin:
            return
        kept = (step + 1) // self.record.thin - 1
        if self.record.diagnostics:
            self.energy[kept], self.grad_norm[kept] = one.energy[0], one.grad_norm[0]
            self.displacement[kept] = one.displacement[0]
        if self.record.trajectory:
            self.trajectory[kept] = one.z

    def result(self, z: Tensor) -> ChainResult:
        return ChainResult(z, self.energy, self.grad_norm, self.displacement, self.first_bad_step, self.trajectory)


def _run(
    z: Tensor, step: Step, update: Update, n_steps: int, record: Record, backend: str, capture: Capture | None
) -> ChainResult:
    """n_steps of `step`, one after the other or captured once and replayed."""
    recorder = _Recorder(z, n_steps, record)
    ops.check_update(update, z, n_steps)
    if capture is not None:
        return recorder.result(captured_chain(z, step, update, n_steps, recorder.keep, capture, backend))
    if z.shape[0]:
        z = z.clone()  # what an energy writes into its argument is the chain's, never the caller's
        for k, now in enumerate(update.steps(n_steps)):
            one = step(z, now)
            recorder.keep(k, one)
            z = one.z
    return recorder.result(z)


def any_energy_chain(
    z: Tensor,
    energy: AnyEnergy | WithQuadratic,
    likelihood: Likelihood | None,
    update: Update,
    n_steps: int,
    record: Record,
    backend: str,
    capture: Capture | None = None,
) -> ChainResult:
    """n_steps of an energy's gradient, as a rule by autograd, and fused step."""

    def step(z: Tensor, update: Update) -> ChainResult:
        value, grad = energy(z, record.diagnostics)
        extra_grad = None if likelihood is None else likelihood(z)
        moved = ops.langevin_step(z, grad, update.with_gradient(extra_grad), backend=backend)
        if not record.diagnostics:
            return ChainResult(moved)
        total = grad if extra_grad is None else grad + extra_grad
        # 0 where this step left the chain not finite, else -1
        first_bad_step = torch.isfinite(moved).all(dim=1).to(torch.int64).neg()
        return ChainResult(moved, value[None], total.norm(dim=1)[None], (moved - z).norm(dim=1)[None], first_bad_step)

    return _run(z, step, update, n_steps, record, backend, capture)


def posterior_chain(
    z: Tensor,
    mlp: MLP,
    likelihood: Likelihood,
    update: Update,
    n_steps: int,
    record: Record,
    backend: str,
    capture: Capture | None = None,
) -> ChainResult:
    """n_steps with the MLP's fused gradient and a log-likelihood's gradient from autograd."""
    one_step = Record(diagnostics=record.diagnostics)

    def step(z: Tensor, update: Update) -> ChainResult:
        return ops.sampler_chain(z, mlp, update.with_gradient(likelihood(z)), 1, one_step, backend)

    return _run(z, step, update, n_steps, record, backend, capture)
