"""The tests that come before any number: what is timed must compute what it claims to compute.

    reference      the formulas through autograd in float64, with the noise of the contract
    plain torch    the same in float32
    passes         error ≤ 2 · error of plain torch + 1e-6, both against the reference; noise: equal in every bit

The error of a set of chains is the 95 % quantile over chains of the largest deviation within a chain: where a LeakyReLU
is crossed within float32's rounding, plain torch and any kernel may take either side, each in a few chains of its own.
No chain at all may be off by more than `_WORST`.
"""

from __future__ import annotations

import copy
import dataclasses
from types import ModuleType

import torch
from torch import Tensor, nn

from jlebm_fast import FastLangevin, backends, ops
from jlebm_fast.backends import eager_noise
from jlebm_fast.bench.cases import Case, mlp_of
from jlebm_fast.bench.rivals import Run
from jlebm_fast.problem import Update

_NOISE_KEY = 20231002
_MOST_STEPS = 100  # of a chain that is checked: longer ones repeat the same operation
_ENDS = 64  # chains looked at, at either end of the batch
_WORST = 0.05


@dataclasses.dataclass(frozen=True)
class Parity:
    """Outcome of one check; errors are dimensionless like z."""

    op: str
    backend: str
    passed: bool
    error: float
    error_of_torch: float

    def sentence(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        errors = f"error {self.error:.1e}, torch float32 {self.error_of_torch:.1e}"
        return f"parity of {self.op} on {self.backend} {verdict}: {errors}"


def _compare(
    op: str, backend: str, got: Tensor, torch_float32: Tensor, reference: Tensor, slack: float = 2.0
) -> Parity:
    deviations = [(z.double() - reference).abs().flatten(1).amax(dim=1) for z in (got, torch_float32)]
    error, error_of_torch = (float(torch.quantile(d, 0.95)) for d in deviations)
    # written so that NaN fails
    passed = error <= slack * error_of_torch + 1e-6 and float(deviations[0].max()) <= _WORST
    return Parity(op, backend, passed, error, error_of_torch)


def _ends(chains: int) -> list[slice]:
    """The first and the last chains of a batch: enough to see a wrong tail without a float64 run of all."""
    return [slice(0, chains)] if chains <= 2 * _ENDS else [slice(0, _ENDS), slice(chains - _ENDS, chains)]


def _noise(n_steps: int, chains: slice, dim: int) -> Tensor:
    return eager_noise.langevin_noise(
        _NOISE_KEY, n_steps, chains.stop - chains.start, dim, first_step=0, first_chain=chains.start
    )


def _loop(network: nn.Module, z: Tensor, noise: Tensor | None, n_steps: int, s: float) -> Tensor:
    """The formula itself, in z's dtype, through autograd."""
    for k in range(n_steps):
        z = z.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(network(z).sum(), z)
        z = z.detach() + 0.5 * s * s * (gradient - z.detach())
        if noise is not None:
            z = z + s * noise[k].to(z.dtype)
    return z


def chain(case: Case, network: nn.Module, sampler: FastLangevin, chains: int) -> Parity:
    """A sampler's whole chain, list of latents in and out, on its own backend."""
    n_steps = min(case.n_steps, _MOST_STEPS)
    z0 = case.initial(chains)
    z = torch.cat(dataclasses.replace(sampler, n_steps=n_steps)(z0, noise_key=_NOISE_KEY), dim=1)
    start = torch.cat(z0, dim=1)
    double = copy.deepcopy(network).double()
    parts = _ends(chains)
    noises = [_noise(n_steps, part, case.dim) for part in parts]
    plain = [_loop(network, start[part], eps, n_steps, case.step_size) for part, eps in zip(parts, noises)]
    reference = [_loop(double, start[part].double(), eps, n_steps, case.step_size) for part, eps in zip(parts, noises)]
    ours = torch.cat([z[part] for part in parts])
    return _compare("mlp_langevin_chain", sampler.backend, ours, torch.cat(plain), torch.cat(reference))


def energy_grad(case: Case, network: nn.Module, backend: ModuleType, chains: int) -> Parity:
    """`mlp_energy_grad`: value and gradient side by side."""
    z0 = torch.cat(case.initial(chains), dim=1)
    f, gradient = ops.mlp_energy_grad(z0, mlp_of(network, case.spec), backend=backend.NAME)

    def through_autograd(network: nn.Module, z: Tensor) -> Tensor:
        z = z.clone().requires_grad_(True)
        value = network(z)
        return torch.cat([value.detach(), torch.autograd.grad(value.sum(), z)[0]], dim=1)

    reference = through_autograd(copy.deepcopy(network).double(), z0.double())
    ours = torch.cat([f[:, None], gradient], dim=1)
    return _compare("mlp_energy_grad", backend.NAME, ours, through_autograd(network, z0), reference)


def step(backend: ModuleType, chains: int, dim: int) -> Parity:
    """`langevin_step` with a given gradient."""
    generator = torch.Generator().manual_seed(1)
    z, gradient = torch.randn(2, chains, dim, generator=generator)
    s = 0.4
    update = Update(
        step_coefficients=torch.tensor([[s * s / 2, s * s / 2, s]]),
        prior_precision=torch.ones(dim),
        noise_key=_NOISE_KEY,
    )
    eps = _noise(1, slice(0, chains), dim)[0]

    def formula(z: Tensor, gradient: Tensor, eps: Tensor) -> Tensor:
        return z + s * s / 2 * (gradient - z) + s * eps

    ours = ops.langevin_step(z, gradient, update, backend=backend.NAME)
    reference = formula(z.double(), gradient.double(), eps.double())
    return _compare("langevin_step", backend.NAME, ours, formula(z, gradient, eps), reference)


def noise(backend: ModuleType, n_steps: int, chains: int, dim: int) -> Parity:
    """`langevin_noise`: every bit equal to the noise contract written in plain torch."""
    got = ops.langevin_noise(_NOISE_KEY, n_steps, chains, dim, backend=backend.NAME)
    wanted = _noise(n_steps, slice(0, chains), dim)
    return Parity("langevin_noise", backend.NAME, torch.equal(got, wanted), float((got - wanted).abs().max()), 0.0)


def rival(case: Case, network: nn.Module, name: str, run: Run, chains: int) -> Parity:
    """A rival's chain without noise: the whole run, with the slack that another compiler's arithmetic needs."""
    part = slice(0, min(chains, 2 * _ENDS))
    z0 = case.initial(chains)
    z = torch.cat(run(z0, 0.0), dim=1)[part]
    start = torch.cat(z0, dim=1)[part]
    plain = _loop(network, start, None, case.n_steps, case.step_size)
    reference = _loop(copy.deepcopy(network).double(), start.double(), None, case.n_steps, case.step_size)
    return _compare("chain without noise", name, z, plain, reference, slack=10.0)


def backends_with_kernels() -> list[ModuleType]:
    """Every backend that can run float32 chains on the CPU in this process, except eager, the oracle."""
    here = {"device": torch.device("cpu"), "dtype": torch.float32}
    names = [name for name in backends.NAMES if name != "eager"]
    return [backends.load(name) for name in names if backends.reason_against(name, "langevin_step", **here) is None]
