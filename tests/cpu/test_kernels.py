"""The compiled CPU kernels against the float64 oracle: activations, heads, shapes, options, threads and targets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import (
    assert_close,
    check_activation,
    check_chain,
    check_energy_grad,
    double,
    far_out,
    random_mlp,
    step_coefficients,
)

from jlebm_fast.backends import _native, cpu, eager
from jlebm_fast.problem import ACTIVATIONS, Record, Update

pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason()))


def latents(chains, dim, seed=0):
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_values(name):
    """phi and phi' within a few units in the last place of float64, densely and where exponentials overflow."""
    check_activation(
        name,
        torch.cat(
            [torch.linspace(-12, 12, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 200.0, -200.0])]
        ),
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_right_at_every_finite_number(name):
    check_activation(name, far_out())


def test_activation_of_nan_is_nan():
    a = torch.full((20,), float("nan"))
    for code, name in enumerate(ACTIVATIONS):
        h, d = torch.empty_like(a), torch.empty_like(a)
        _native.load().cpu_mlp_activation(
            activation=code, param=1.0, n=20, a=a.data_ptr(), h=h.data_ptr(), d=d.data_ptr(), n_threads=1
        )
        assert h.isnan().all(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_energy_and_gradient_for_every_activation(activation):
    check_energy_grad(latents(45, 12), random_mlp((12, 30, 21, 1), activation))


@pytest.mark.parametrize("parameter", [-0.3, 0.0, 1.0, 1.7])
def test_any_negative_slope(parameter):
    check_energy_grad(latents(45, 12), random_mlp((12, 30, 21, 1), "leaky_relu", parameter=parameter))


@pytest.mark.parametrize(
    ("head", "logits"),
    [("identity", 1), ("tanh", 1), ("sigmoid", 1), ("softplus", 1), ("logsumexp", 1), ("logsumexp", 20), ("logit", 7)],
)
def test_energy_and_gradient_for_every_head(head, logits):
    chains = 45
    mlp = random_mlp((12, 30, logits), "gelu", head, chains=chains, out_scale=-1.5)
    check_energy_grad(latents(chains, 12), mlp)
    check_chain(latents(chains, 12), mlp, Update(step_coefficients(4), noise_key=9), 4)


@pytest.mark.parametrize("n_hidden", [1, 2, 3, 4, 16])
def test_depths(n_hidden):
    check_energy_grad(latents(20, 6), random_mlp((6, *(11 for _ in range(n_hidden)), 1), "tanh"))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 13, 14, 15, 27, 28, 29, 43, 50, 100, 200, 255, 511, 1024])
def test_widths_around_every_tile(width):
    check_energy_grad(latents(35, 5), random_mlp((5, width, max(1, width // 2), 1), "silu"))


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 16, 50, 100, 257])
def test_dims(dim):
    check_chain(latents(19, dim), random_mlp((dim, 20, 1)), Update(step_coefficients(3), noise_key=4), 3)


@pytest.mark.parametrize("chains", [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 129])
@pytest.mark.parametrize("n_steps", [0, 1, 13])
def test_chain_counts_and_steps(chains, n_steps):
    z = latents(chains, 6)
    result = cpu.mlp_langevin_chain(
        z, random_mlp((6, 12, 1)), Update(step_coefficients(max(n_steps, 1)), noise_key=4), n_steps, Record()
    )
    assert result.z.shape == z.shape
    if n_steps == 0:
        assert torch.equal(result.z, z)
    elif chains:
        check_chain(z, random_mlp((6, 12, 1)), Update(step_coefficients(n_steps), noise_key=4), n_steps)


def test_wide_layers_through_the_matrix_library(monkeypatch):
    from jlebm_fast.backends import cpu_blas

    mlp = random_mlp((10, 1025, 530, 3), "gelu", "logsumexp", chains=50, context=True)
    check_energy_grad(latents(50, 10), mlp)
    update = Update(
        step_coefficients(4),
        chain_coefficients=torch.rand(50, 3) + 0.5,
        prior_mean=latents(50, 10, 3),
        prior_precision=torch.ones(10),
        frozen=torch.arange(10) < 2,
        noise_key=5,
        first_chain=7,
    )
    whole = check_chain(latents(50, 10), mlp, update, 4)
    monkeypatch.setattr(cpu_blas, "_WORKSPACE_FLOATS", 40_000)  # groups of a few chains
    grouped = check_chain(latents(50, 10), mlp, update, 4)
    assert torch.allclose(whole.z, grouped.z, atol=1e-5)


OPTIONS = {
    "plain": {},
    "prior": {"prior_precision": torch.full((6,), 0.25)},
    "prior per dim": {"prior_mean": torch.arange(6.0), "prior_precision": torch.arange(1.0, 7.0)},
    "prior per chain": {"prior_mean": latents(40, 6, 1), "prior_precision": latents(40, 6, 2).exp()},
    "coefficients per chain": {"chain_coefficients": latents(40, 3, 3).exp()},
    "frozen dims": {"frozen": torch.tensor([True, False, False, True, False, True])},
    "frozen per chain": {"frozen": latents(40, 6, 4) > 0},
    "noise from outside": {"noise": latents(7 * 40, 6, 5).view(7, 40, 6)},
    "offsets": {"first_step": 12, "first_chain": 1000, "noise_key": (1 << 64) - 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_update_options(options):
    update = Update(**{"step_coefficients": step_coefficients(7), "noise_key": 5, **options})
    result = check_chain(latents(40, 6), random_mlp((6, 15, 15, 1), "gelu"), update, 7)
    if update.frozen is not None:
        frozen = update.frozen.expand(40, 6)
        assert torch.equal(result.z[frozen], latents(40, 6)[frozen])


def test_coefficients_per_step():
    coefficients = torch.rand(9, 3, generator=torch.Generator().manual_seed(2)) * 0.2
    coefficients[4, 2] = 0.0
    check_chain(latents(40, 6), random_mlp((6, 15, 1)), Update(coefficients, noise_key=5), 9)


def test_extra_gradient():
    update = Update(step_coefficients(1), extra_grad=latents(40, 6, 8), prior_precision=torch.ones(6), noise_key=5)
    check_chain(latents(40, 6), random_mlp((6, 15, 1)), update, 1)


@pytest.mark.parametrize("thin", [1, 2, 3, 7, 8])
def test_thinning(thin):
    check_chain(
        latents(40, 6), random_mlp((6, 15, 1)), Update(step_coefficients(7), noise_key=5), 7, Record(True, True, thin)
    )


@pytest.mark.parametrize("frozen", [None, torch.tensor([True, False, False, True, False, True])])
def test_langevin_step(frozen):
    z, grad = latents(37, 6), latents(37, 6, 1)
    update = Update(step_coefficients(1), prior_precision=torch.ones(6), frozen=frozen, noise_key=5, first_step=3)
    given = update._replace(noise=eager.langevin_noise(5, 1, 37, 6, first_step=3))
    ours, plain = cpu.langevin_step(z, grad, update), eager.langevin_step(z, grad, given)
    assert_close(ours, plain, eager.langevin_step(z.double(), grad.double(), double(given)), "z")


def test_threads_and_splits_do_not_change_a_bit():
    """7 vectors on 1 to 5 threads: whole blocks, blocks split between workers in mid-chain, wide blocks."""
    z, mlp = latents(100, 16), random_mlp((16, 50, 50, 1))
    update = Update(step_coefficients(60), prior_precision=torch.ones(16), noise_key=5)
    record = Record(diagnostics=True, trajectory=True, thin=7)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 4, 5):
            torch.set_num_threads(n)
            results.append(cpu.mlp_langevin_chain(z, mlp, update, 60, record))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


def test_chains_split_and_steps_split():
    z, mlp = latents(100, 16), random_mlp((16, 50, 50, 1))
    update = Update(step_coefficients(60), prior_precision=torch.ones(16), noise_key=5)
    whole = cpu.mlp_langevin_chain(z, mlp, update, 60, Record()).z
    halves = [
        cpu.mlp_langevin_chain(z[i : i + 50], mlp, update._replace(first_chain=i), 60, Record()).z for i in (0, 50)
    ]
    assert torch.equal(torch.cat(halves), whole)
    half = update._replace(step_coefficients=step_coefficients(30))
    middle = cpu.mlp_langevin_chain(z, mlp, half, 30, Record()).z
    assert torch.equal(cpu.mlp_langevin_chain(middle, mlp, half._replace(first_step=30), 30, Record()).z, whole)


@pytest.mark.parametrize(
    ("widths", "activation"),
    [((16, 50, 50, 1), "leaky_relu"), ((5, 7, 6, 4, 1), "gelu"), ((4, 61, 1), "relu"), ((9, 130, 30, 1), "softplus")],
)
@pytest.mark.parametrize("context", [False, True])
def test_the_last_few_chains_are_the_same_in_every_bit(widths, activation, context):
    """Chains that fill no vector are computed in another layout (csrc/cpu/few_chains.h)."""
    steps, most = 12, 64
    z, mlp = latents(most, widths[0]), random_mlp(widths, activation, chains=most, context=context, out_scale=-1.0)
    update = Update(step_coefficients(steps), prior_precision=torch.ones(widths[0]), noise_key=5)
    record = Record(diagnostics=True, trajectory=True, thin=3)
    whole = cpu.mlp_langevin_chain(z, mlp, update, steps, record)
    for n in (1, 2, 3, 4, 5, 8, 9, 20, 36, 40):
        few = mlp._replace(context_bias=mlp.context_bias[:n] if context else None)
        part = cpu.mlp_langevin_chain(z[:n], few, update, steps, record)
        plain = cpu.mlp_langevin_chain(z[:n], few, update, steps, Record())
        assert torch.equal(plain.z, part.z)
        for name, ours in part._asdict().items():
            expected = getattr(whole, name)
            axis = {"z": 0, "first_bad_step": 0}.get(name, 1)
            assert torch.equal(ours, expected.narrow(axis, 0, n)), (n, name)


def test_nan_and_overflow_stay_in_their_chain():
    z, mlp = latents(100, 16), random_mlp((16, 50, 50, 1))
    update = Update(step_coefficients(10), prior_precision=torch.ones(16), noise_key=5)
    clean = cpu.mlp_langevin_chain(z, mlp, update, 10, Record(diagnostics=True))
    broken = z.clone()
    broken[3, 2] = float("nan")
    broken[70, 5] = 3e38
    broken[71, 5] = float("inf")
    result = cpu.mlp_langevin_chain(broken, mlp, update, 10, Record(diagnostics=True))
    others = torch.ones(100, dtype=torch.bool)
    others[[3, 70, 71]] = False
    assert torch.equal(result.z[others], clean.z[others])
    assert (result.first_bad_step[others] == -1).all()
    assert result.first_bad_step[3] == 0
    assert result.first_bad_step[71] == 0


def test_many_chains_use_little_memory():
    """Beyond input and output: less than 64 MB at a million chains."""
    code = (
        "import resource, torch\n"
        "from parity import random_mlp, step_coefficients\n"
        "from jlebm_fast.backends import cpu\n"
        "from jlebm_fast.problem import Record, Update\n"
        "z, mlp = torch.zeros(1_000_000, 16), random_mlp((16, 8, 1))\n"
        "cpu.mlp_langevin_chain(z[:1000], mlp, Update(step_coefficients(2), noise_key=5), 2, Record())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for n_steps in (2, 20):\n"
        "    update = Update(step_coefficients(n_steps), noise_key=5)\n"
        "    out = cpu.mlp_langevin_chain(z, mlp, update, n_steps, Record()).z\n"
        "    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - 2 * out.nbytes\n"
        "    assert grown < 64e6, grown\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_every_target(target):
    if target not in _native.load().cpu_targets().split(", "):
        pytest.skip(f"this processor does not run {target}")
    environment = {**os.environ, "JLEBM_CPU_TARGET": target}
    subprocess.run([sys.executable, str(Path(__file__).parent / "parity.py")], check=True, env=environment)


def test_an_unknown_target_is_an_error_with_the_choices():
    code = (
        "from jlebm_fast.backends import _native\n"
        "reason = _native.unavailable_reason()\n"
        "assert 'baseline' in reason and \"'avx9000'\" in reason, reason\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JLEBM_CPU_TARGET": "avx9000"})
