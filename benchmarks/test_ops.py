"""The three smaller operations on the published sizes, each beside plain torch."""

from __future__ import annotations

import functools

import pytest
import torch

from jlebm_fast import ops
from jlebm_fast.bench import parity
from jlebm_fast.bench.cases import CASES, mlp_of
from jlebm_fast.bench.sections import MANY
from jlebm_fast.problem import Update

BACKENDS = {backend.NAME: backend for backend in parity.backends_with_kernels()}
CONTENDERS = [*BACKENDS, "plain torch"]

contenders = pytest.mark.parametrize("name", CONTENDERS)
cases = pytest.mark.parametrize("case", [CASES[name] for name in ("HS", "FID", "LEBM")], ids=("HS", "FID", "LEBM"))


@contenders
@cases
def test_langevin_noise(benchmark, passed_parity, case, name):
    if name in BACKENDS:
        passed_parity(parity.noise(BACKENDS[name], 3, 101, case.dim))
        run = functools.partial(ops.langevin_noise, 1, 1, MANY, case.dim, backend=name)
    else:
        run = functools.partial(torch.randn, 1, MANY, case.dim)
    benchmark.group = f"langevin_noise, {case.name}"
    benchmark(run)


@contenders
@cases
def test_langevin_step(benchmark, passed_parity, case, name):
    z, gradient = torch.randn(2, MANY, case.dim, generator=torch.Generator().manual_seed(0))
    s = case.step_size
    update = Update(torch.tensor([[s * s / 2, s * s / 2, s]]), prior_precision=torch.ones(case.dim), noise_key=1)
    if name in BACKENDS:
        passed_parity(parity.step(BACKENDS[name], 101, case.dim))
        run = functools.partial(ops.langevin_step, z, gradient, update, backend=name)
    else:

        def run():
            return z + s * s / 2 * (gradient - z) + s * torch.randn_like(z)

    benchmark.group = f"langevin_step, {case.name}"
    benchmark(run)


@contenders
@cases
def test_mlp_energy_grad(benchmark, passed_parity, case, name):
    network = case.network()
    z = torch.cat(case.initial(MANY), dim=1)
    if name in BACKENDS:
        passed_parity(parity.energy_grad(case, network, BACKENDS[name], 1000))
        run = functools.partial(ops.mlp_energy_grad, z, mlp_of(network, case.spec), backend=name)
    else:
        z.requires_grad_(True)

        def run():
            f = network(z)
            return f, torch.autograd.grad(f.sum(), z)[0]

    benchmark.group = f"mlp_energy_grad, {case.name}"
    benchmark(run)
    benchmark.extra_info["gflops"] = case.spec.flops_per_chain_step * MANY / benchmark.stats["median"] / 1e9
