"""Whole chains of the published problems: every backend, the published eager loop and compiled eager."""

from __future__ import annotations

import functools

import pytest

from jlebm_fast.bench import parity, rivals
from jlebm_fast.bench.cases import CASES
from jlebm_fast.bench.sections import MANY, sampler_of

KERNELS = [backend.NAME for backend in parity.backends_with_kernels()]
RIVALS = {"published loop": rivals.eager, "compiled eager": rivals.compiled}
CONTENDERS = [*KERNELS, "eager", *RIVALS]
SMALL = ("HS", "FID", "LEBM")


def contender(name, case, network, chains):
    """(run, parity) of a backend's sampler or of a rival."""
    if name in RIVALS:
        run = RIVALS[name](case, network)
        return run, parity.rival(case, network, name, run, chains)
    sampler = sampler_of(case, network, name)
    return sampler, parity.chain(case, network, sampler, chains)


def measure(benchmark, passed_parity, name, case, chains):
    network, z0 = case.network(), case.initial(chains)
    run, check = contender(name, case, network, chains)
    passed_parity(check)
    benchmark.group = f"{case.name}, {chains:,} chains x {case.n_steps} steps"
    z = benchmark(functools.partial(run, z0))
    benchmark.extra_info["gflops"] = case.flops(chains) / benchmark.stats["median"] / 1e9
    assert [tuple(layer.shape) for layer in z] == [(chains, d) for d in case.latent_dims]


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_batch(benchmark, passed_parity, case, name):
    measure(benchmark, passed_parity, name, case, case.batch)


@pytest.mark.parametrize("name", [*KERNELS, *RIVALS])
@pytest.mark.parametrize("case", [CASES[name] for name in SMALL], ids=SMALL)
def test_many_chains(benchmark, passed_parity, case, name):
    measure(benchmark, passed_parity, name, case, MANY)
