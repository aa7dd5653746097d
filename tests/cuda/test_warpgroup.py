"""Chains by warpgroups (csrc/cuda/mlp_warpgroup.h) on the host: against float64, and in every bit against the resident
regime, whose products add up in the same order. Whether a chip's two matrix instructions do is for a GPU to say."""

from __future__ import annotations

import math

import mlp_host
import pytest
import torch
from host_build import on_host
from mlp_host import H100_SHARED, assert_as_good_as_torch, cast, make_mlp, plain_chain, plain_energy_grad
from test_mlp_langevin_chain import KEY, normal_update, per_chain, start

from jlebm_fast import precision
from jlebm_fast.backends import eager
from jlebm_fast.problem import MLPSpec, Record, Update

WARPGROUP, RESIDENT = ("warpgroup",), ("resident", 1)


@pytest.fixture(scope="module")
def host() -> mlp_host.Host:
    return mlp_host.host()


def exact(z, mlp, update, n_steps, record=Record()):
    return eager.mlp_langevin_chain(z.double(), cast(mlp, torch.float64), cast(update, torch.float64), n_steps, record)


def check(host, mlp, z, update, n_steps, record=Record(), **where):
    """As good as torch in bf16, and the resident regime's bits."""
    got = host.run_chain(z, mlp, update, n_steps, "bf16", record, plan=WARPGROUP, **where)
    oracle = exact(z, mlp, update, n_steps, record)
    assert_as_good_as_torch(got.z, plain_chain(z, mlp, update, n_steps, "bf16"), oracle.z, "z")
    other = host.run_chain(z, mlp, update, n_steps, "bf16", record, plan=RESIDENT, **where)
    assert torch.equal(got.z, other.z)
    if record.trajectory:
        assert torch.equal(got.trajectory, other.trajectory)
    if record.diagnostics:
        assert torch.equal(got.first_bad_step, other.first_bad_step)
        # summed in another order
        torch.testing.assert_close(got.grad_norm, other.grad_norm, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.displacement, other.displacement, rtol=1e-6, atol=1e-6)
    return got


SHAPES = [
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 100),
    ([50, 100, 100, 1], "leaky_relu", 130),
    ([100, 200, 200, 1], "gelu", 65),
    ([112, 208, 208, 1], "gelu", 1),
    ([32, 64, 64, 1], "gelu", 193),
    ([1, 3, 1], "tanh", 1),
    ([33, 17, 65, 40, 1], ["silu", "gelu", "elu"], 63),
    ([5, 30, 30, 1], ["softplus", "mish"], 9),
    ([99, 130, 1], "gelu_tanh", 8),
    ([18, 40, 1], "relu", 7),
    ([20, *[24] * 10, 1], "gelu", 20),
]


@pytest.mark.parametrize(("widths", "activations", "chains"), SHAPES)
def test_shape(host, widths, activations, chains):
    mlp = make_mlp(widths, activations, out_scale=-0.3, seed=31)
    n_steps = 2 if max(widths) > 100 else 4
    check(host, mlp, start(chains, widths[0]), normal_update(widths[0], n_steps), n_steps)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_records(host, groups):
    mlp = make_mlp([18, 40, 33, 1], "gelu", seed=32)
    record = Record(True, True, thin=2)
    z, update = start(150, 18), normal_update(18, 5)
    got = check(host, mlp, z, update, 5, record)
    same = host.run_chain(z, mlp, update, 5, "bf16", record, plan=("warpgroup", 8, 4, groups), seed=groups)
    for a, b in zip(got, same):
        assert torch.equal(a, b)
    # and neither does what is recorded change a bit of z
    assert torch.equal(host.run_chain(z, mlp, update, 5, "bf16", plan=WARPGROUP).z, got.z)


@pytest.mark.parametrize(("widths", "out_scale"), [([18, 40, 33, 1], -0.3), ([50, 100, 1], 1.0), ([100, 200, 1], 2.5)])
def test_energies_are_those_of_the_points_before_each_step(host, widths, out_scale):
    mlp = make_mlp(widths, "gelu", out_scale=out_scale, seed=38)
    z = start(70, widths[0])
    got = host.run_chain(z, mlp, normal_update(widths[0], 3), 3, "bf16", Record(True, True), plan=WARPGROUP)
    for energy, point in zip(got.energy, (z, *got.trajectory[:-1]), strict=True):
        oracle = eager.mlp_energy_grad(point.double(), cast(mlp, torch.float64))[0]
        assert_as_good_as_torch(energy, plain_energy_grad(point, mlp, "bf16")[0], oracle, "energy")


@pytest.mark.parametrize("dim", [14, 16, 17])
def test_everything_per_chain(host, dim):
    mlp = make_mlp([dim, 40, 30, 1], "gelu", chains=71, context=True, bias=False, seed=33)
    z, update = start(71, dim), per_chain(71, dim)
    got = check(host, mlp, z, update, 4, Record(True, True))
    assert torch.equal(got.z[update.frozen], z[update.frozen])


def test_given_noise_posterior_and_no_prior(host):
    generator = torch.Generator().manual_seed(34)
    mlp, z = make_mlp([6, 40, 1], "tanh", seed=35), start(70, 6)
    update = normal_update(
        6,
        4,
        prior_mean=torch.randn(6, generator=generator),
        frozen=torch.tensor([False, True, False, False, False, True]),
        noise=torch.randn(4, 70, 6, generator=generator),
        extra_grad=torch.randn(70, 6, generator=generator),
    )
    check(host, mlp, z, update, 4)
    check(host, mlp, z, update._replace(prior_precision=None, prior_mean=None, frozen=None), 4)
    quiet = update.step_coefficients.clone()
    quiet[:, 2] = 0
    check(host, mlp, z, update._replace(step_coefficients=quiet), 4)
    assert torch.equal(host.run_chain(z, mlp, update, 0, "bf16", plan=WARPGROUP).z, z)


@pytest.mark.parametrize("dim", [2, 16, 50])
def test_noise_is_that_of_the_contract_in_every_bit(host, dim):
    mlp, z = make_mlp([dim, 20, 1], "tanh"), torch.zeros(75, dim)
    where = {"first_step": 2**32 - 2, "first_chain": 2**32 - 5}
    update = Update(torch.tensor([[0.0, 0.0, 1.0]] * 3), noise_key=KEY, **where)
    expected = eager.langevin_noise(KEY, 3, 75, dim, **where)
    for step in (1, 2):
        expected[step] += expected[step - 1]
    record = Record(trajectory=True)
    got = host.run_chain(z, mlp, update, 3, "bf16", record, plan=WARPGROUP)
    assert torch.equal(got.trajectory, expected)
    key = torch.tensor([KEY - 2**64])
    got = host.run_chain(z, mlp, update._replace(noise_key=1), 3, "bf16", record, plan=WARPGROUP, key_at=key)
    assert torch.equal(got.trajectory, expected)


def test_bits_do_not_depend_on_a_split(host):
    mlp = make_mlp([18, 40, 60, 1], "gelu", seed=36)
    z, update = start(150, 18), normal_update(18, 4, first_step=7, first_chain=9)
    whole = host.run_chain(z, mlp, update, 4, "bf16", plan=WARPGROUP).z
    halves = [
        host.run_chain(z[:77].clone(), mlp, update, 4, "bf16", plan=WARPGROUP).z,
        host.run_chain(z[77:].clone(), mlp, update._replace(first_chain=86), 4, "bf16", plan=WARPGROUP).z,
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_nan_stays_in_its_chain_and_is_dated(host):
    mlp = make_mlp([18, 40, 60, 1], "gelu", seed=37)
    z, update, record = start(80, 18), normal_update(18, 5), Record(diagnostics=True)
    clean = host.run_chain(z, mlp, update, 5, "bf16", record, plan=WARPGROUP)
    noise = eager.langevin_noise(KEY, 5, 80, 18)
    noise[0, 4, 7], noise[3, 71, 0] = math.nan, math.inf
    got = host.run_chain(z, mlp, update._replace(noise=noise), 5, "bf16", record, plan=WARPGROUP)
    bad = torch.tensor([chain in (4, 71) for chain in range(80)])
    assert got.first_bad_step[bad].tolist() == [0, 3]
    assert (got.first_bad_step[~bad] == -1).all()
    assert torch.equal(got.z[~bad], clean.z[~bad])
    assert not got.z[bad].isfinite().all(dim=1).any()
    assert torch.equal(got.energy[:, ~bad], clean.energy[:, ~bad])


def test_it_is_a_choice_for_many_chains_in_bf16_where_it_is_allowed(host):
    lebm = make_mlp([100, 200, 200, 1], "gelu")

    def regime(mlp, chains=1_000_000, precision="bf16", warpgroups=True, shared=H100_SHARED):
        plan = host.plan(mlp, chains, precision, shared=shared, warpgroups=warpgroups)
        assert plan["shared_bytes"] <= shared
        return mlp_host.REGIMES[plan["regime"]]

    assert regime(lebm) == regime(lebm, 10_000) == "warpgroup"
    assert regime(lebm, 100) == "resident"
    assert regime(lebm, warpgroups=False) == "resident"
    assert regime(lebm, precision="tf32") != "warpgroup"
    assert regime(lebm, shared=mlp_host.CONSUMER_SHARED) != "warpgroup"
    assert regime(make_mlp([100, 209, 1], "gelu")) != "warpgroup"
    assert regime(make_mlp([113, 200, 1], "gelu")) != "warpgroup"
    assert regime(make_mlp([100, 200, 10], "gelu", head="logsumexp")) != "warpgroup"
    assert regime(make_mlp([100, 200, 1], "gelu", head="tanh")) != "warpgroup"


def test_only_chains(host):
    """A single evaluation is for memory to wait for, and the losses of a training want h and delta."""
    mlp = make_mlp([100, 200, 200, 1], "gelu")
    spec: MLPSpec = mlp.spec
    with precision.using("bf16"):
        kernels = on_host()
        chain = kernels.plan("mlp_langevin_chain", spec, 1_000_000, False, torch.device("cpu"))[1]
        energy = kernels.plan("mlp_energy_grad", spec, 1_000_000, True, torch.device("cpu"))[1]
    assert chain.startswith("warpgroup, bf16, 128 chains a block in 2 groups of 4 warps")
    assert energy.startswith("resident")
