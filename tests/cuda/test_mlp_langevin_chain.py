"""Whole chains by the CUDA kernel, run on the host: against float64 with the same noise, bit for bit where a result
must not depend on geometry, order of threads or split, and with each barrier left out once."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import host_build
import mlp_host
import pytest
import torch
from mlp_host import H100_SHARED, assert_as_good_as_torch, cast, coefficients, make_mlp, plain_chain

from jlebm_fast.backends import eager
from jlebm_fast.problem import Record, Update

KEY = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def host() -> mlp_host.Host:
    return mlp_host.host()


def start(chains: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(100 + seed))


def normal_update(dim: int, n_steps: int, **changes) -> Update:
    return Update(coefficients(n_steps), prior_precision=torch.ones(dim), noise_key=KEY)._replace(**changes)


def check(host, mlp, z, update, n_steps, precision, record=Record(True, True), **where):
    got = host.run_chain(z, mlp, update, n_steps, precision, record, **where)
    oracle = eager.mlp_langevin_chain(
        z.double(), cast(mlp, torch.float64), cast(update, torch.float64), n_steps, record
    )
    assert_as_good_as_torch(got.z, plain_chain(z, mlp, update, n_steps, precision), oracle.z, "z")
    if precision == "fp32":
        plain = eager.mlp_langevin_chain(z, mlp, update, n_steps, record)
        for name in ("energy", "grad_norm", "displacement", "trajectory"):
            if getattr(oracle, name) is not None:
                assert_as_good_as_torch(getattr(got, name), getattr(plain, name), getattr(oracle, name), name)
    if record.diagnostics:
        assert torch.equal(got.first_bad_step, oracle.first_bad_step)
    return got


# widths, activations, chains, precision,
# (regime, chain tiles, warps, groups, z in shared memory, layers with resident weights, blocks of a cluster)
SHAPES = [
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 100, "fp32", ("resident", 1, 4, 1, 1)),
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 100, "bf16", ("resident", 4, 1, 4, 1)),
    ([50, 100, 100, 1], "leaky_relu", 9, "tf32", ("resident", 1, 4, 2, 0)),
    ([50, 100, 100, 1], "leaky_relu", 33, "fp32", ("resident", 4, 2, 1, 1)),
    ([100, 200, 200, 1], "gelu", 65, "bf16", ("resident", 4, 4, 2, 0)),
    ([100, 200, 200, 1], "gelu", 8, "fp32", ("streamed", 1, 8)),
    ([100, 200, 200, 1], "gelu", 8, "fp32", ("streamed", 1, 8, 1, 0, 1)),
    ([99, 17, 130, 64, 5], ["silu", "gelu", "elu"], 17, "bf16", ("streamed", 2, 8, 1, 0, 2)),
    ([100, 200, 200, 1], "gelu", 7, "bf16", ("resident", 1, 8, 1, 1)),
    ([2, 200, 8], "gelu", 17, "tf32", ("streamed", 2, 8)),
    ([1, 3, 1], "tanh", 1, "fp32", ("resident", 1, 1, 1, 0)),
    ([99, 17, 130, 64, 1], ["silu", "gelu", "elu"], 9, "fp32", ("resident", 1, 8, 1, 0)),
    ([100, 512, 1], "gelu", 8, "bf16", ("streamed", 1, 8)),
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 100, "tf32", ("lean", 1, 4)),
    ([100, 200, 200, 1], "gelu", 9, "fp32", ("lean", 1, 8)),
    ([99, 17, 130, 64, 5], ["silu", "gelu", "elu"], 17, "bf16", ("lean", 1, 8)),
    ([50, 100, 100, 1], "leaky_relu", 100, "fp32", ("lean", 2, 8)),
    ([100, 200, 200, 1], "gelu", 65, "bf16", ("lean", 4, 8)),
    ([100, 200, 200, 1], "gelu", 9, "fp32", ("cluster", 1, 4, 1, 1, 3, 4)),
    ([100, 200, 200, 1], "gelu", 7, "bf16", ("cluster", 1, 2, 1, 0, 1, 8)),
    ([50, 100, 100, 1], "leaky_relu", 100, "tf32", ("cluster", 4, 2, 1, 1, 0, 2)),
    ([99, 17, 130, 64, 5], ["silu", "gelu", "elu"], 17, "bf16", ("cluster", 2, 1, 1, 1, 4, 4)),
    ([100, 512, 1], "gelu", 8, "bf16", ("cluster", 1, 4, 1, 1, 2, 8)),
    ([2, 200, 8], "gelu", 17, "fp32", ("cluster", 2, 1, 1, 0, 0, 4)),
]


@pytest.mark.parametrize(("widths", "activations", "chains", "precision", "plan"), SHAPES)
def test_shape(host, widths, activations, chains, precision, plan):
    head = "identity" if widths[-1] == 1 else "logsumexp"
    mlp = make_mlp(widths, activations, head=head, chains=chains, seed=11)
    n_steps = 3 if max(widths) >= 100 else 6
    record = Record() if max(widths) >= 200 else Record(True, True, thin=2)
    check(host, mlp, start(chains, widths[0]), normal_update(widths[0], n_steps), n_steps, precision, record, plan=plan)


def per_chain(chains: int, dim: int) -> Update:
    generator = torch.Generator().manual_seed(12)
    return normal_update(
        dim,
        4,
        chain_coefficients=torch.rand(chains, 3, generator=generator) + 0.5,
        prior_mean=torch.randn(chains, dim, generator=generator),
        prior_precision=torch.rand(chains, dim, generator=generator) + 0.5,
        frozen=torch.rand(chains, dim, generator=generator) < 0.3,
    )


@pytest.mark.parametrize(
    "plan",
    [
        ("resident", 1, 4, 2, 1), ("resident", 4, 2, 1, 0), ("streamed", 1, 4), ("lean", 1, 4),
        ("cluster", 1, 1, 1, 1, 3, 2), ("cluster", 4, 1, 1, 0, 1, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dim", [14, 16])
def test_everything_per_chain(host, dim, plan):
    mlp = make_mlp([dim, 40, 30, 1], "gelu", chains=21, context=True, seed=13)
    z, update = start(21, dim), per_chain(21, dim)
    got = check(host, mlp, z, update, 4, "fp32", plan=plan)
    assert torch.equal(got.z[update.frozen], z[update.frozen])


def test_per_dimension_and_external_noise(host):
    generator = torch.Generator().manual_seed(14)
    mlp = make_mlp([6, 40, 1], "tanh", seed=15)
    update = normal_update(
        6,
        4,
        prior_mean=torch.randn(6, generator=generator),
        prior_precision=torch.rand(6, generator=generator) + 0.5,
        frozen=torch.tensor([False, True, False, False, False, True]),
        noise=torch.randn(4, 10, 6, generator=generator),
    )
    check(host, mlp, start(10, 6), update, 4, "fp32")
    check(host, mlp, start(10, 6), update._replace(prior_precision=None, prior_mean=None, frozen=None), 4, "fp32")


def test_posterior_step(host):
    mlp = make_mlp([10, 40, 40, 1], "gelu", seed=16)
    update = normal_update(10, 1, extra_grad=torch.randn(12, 10, generator=torch.Generator().manual_seed(17)))
    check(host, mlp, start(12, 10), update, 1, "fp32")


def test_without_noise(host):
    mlp = make_mlp([10, 40, 40, 1], "gelu", seed=18)
    steps = coefficients(5)
    steps[:, 2] = 0
    update = normal_update(10, 5, step_coefficients=steps)
    check(host, mlp, start(12, 10), update, 5, "fp32")


def test_no_steps(host):
    mlp, z = make_mlp([10, 40, 1], "gelu"), start(12, 10)
    for in_shared in (0, 1):
        got = host.run_chain(z, mlp, normal_update(10, 1), 0, "fp32", plan=("resident", 1, 2, 1, in_shared))
        assert torch.equal(got.z, z)


@pytest.mark.parametrize("dim", [2, 16, 50])
def test_noise_is_that_of_the_contract_in_every_bit(host, dim):
    mlp = make_mlp([dim, 20, 1], "tanh")
    update = Update(torch.tensor([[0.0, 0.0, 1.0]] * 3), noise_key=KEY, first_step=2**32 - 2, first_chain=2**32 - 5)
    record = Record(trajectory=True)
    z = torch.zeros(9, dim)
    expected = eager.langevin_noise(KEY, 3, 9, dim, first_step=2**32 - 2, first_chain=2**32 - 5)
    for step in (1, 2):
        expected[step] += expected[step - 1]
    for precision, plan in (
        ("fp32", ("resident", 1, 2, 1)),
        ("bf16", ("resident", 4, 1, 1)),
        ("tf32", ("streamed", 2)),
        *([("fp32", ("cluster", 1))] if dim > 16 else []),  # a block has one row tile of 16 at least
    ):
        got = host.run_chain(z, mlp, update, 3, precision, record, plan=plan)
        assert torch.equal(got.trajectory, expected)
    # the key in device memory wins: a replayed graph reads it anew
    key = torch.tensor([KEY - 2**64])
    got = host.run_chain(z, mlp, update._replace(noise_key=1), 3, "fp32", record, key_at=key)
    assert torch.equal(got.trajectory, expected)


@pytest.mark.parametrize("precision", mlp_host.PRECISIONS)
def test_bits_do_not_depend_on_geometry_order_or_record(host, precision):
    mlp = make_mlp([18, 40, 70, 33, 1], ["gelu", "tanh", "leaky_relu"], out_scale=-0.3, chains=41, seed=19)
    z, update = start(41, 18), normal_update(18, 4)
    full = Record(True, True)
    first = host.run_chain(z, mlp, update, 4, precision, full, plan=("resident", 1, 1, 1, 1))
    plans = [
        ("resident", 1, 4, 2, 1),
        ("resident", 2, 2, 3, 0),
        ("resident", 4, 4, 1, 1),
        ("resident", 4, 2, 2, 0),
        ("streamed", 1, 8),
        ("streamed", 2, 4),
        ("streamed", 4, 8),
        ("streamed", 1, 4, 1, 1, 1),
        ("streamed", 2, 8, 1, 0, 2),
        ("streamed", 4, 8, 1, 1, 3),
        ("lean", 1, 8),
        ("lean", 1, 4),
        ("lean", 2, 8),
        ("lean", 4, 4),
        ("cluster", 1, 1, 1, 1, 4, 2),
        ("cluster", 2, 1, 1, 0, 2, 4),
        ("cluster", 4, 2, 1, 1, 0, 2),
        ("cluster", 4, 1, 1, 1, 4, 4),
    ]
    for seed, plan in enumerate(plans):
        other = host.run_chain(z, mlp, update, 4, precision, full, plan=plan, seed=seed)
        for name, a, b in zip(first._fields, first, other):
            assert torch.equal(a, b), (name, plan)
        assert torch.equal(host.run_chain(z, mlp, update, 4, precision, plan=plan, seed=seed + 50).z, first.z), plan


@pytest.mark.parametrize("precision", mlp_host.PRECISIONS)
@pytest.mark.parametrize("multiprocessors", [1, 2, 5])
@pytest.mark.parametrize("z_in_shared", [0, 1])
@pytest.mark.parametrize("chain_tiles", [1, 2])
def test_lean_blocks_take_one_batch_after_the_other(host, precision, multiprocessors, z_in_shared, chain_tiles):
    """41 chains are six batches of 8 or three of 16: in one, two or five blocks, whose slopes are all the memory they
    have.
    """
    mlp = make_mlp([18, 40, 70, 33, 1], ["gelu", "tanh", "leaky_relu"], chains=41, context=True, seed=23)
    z, update, full = start(41, 18), normal_update(18, 4), Record(True, True)
    expected = host.run_chain(z, mlp, update, 4, precision, full, plan=("streamed", 1))
    for seed in range(4):
        got = host.run_chain(
            z, mlp, update, 4, precision, full, plan=("lean", chain_tiles, 4, 1, z_in_shared),
            limits=(multiprocessors, mlp_host.CONSUMER_SHARED), seed=seed,
        )  # fmt: skip
        for name, a, b in zip(expected._fields, expected, got):
            assert torch.equal(a, b), (name, seed)
    before = host.run_energy_grad(z, mlp, precision, plan=("streamed", 1))
    after = host.run_energy_grad(
        z, mlp, precision, plan=("lean", chain_tiles), limits=(multiprocessors, mlp_host.CONSUMER_SHARED)
    )
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    for a, b in zip(before[2] + before[3], after[2] + after[3], strict=True):
        assert torch.equal(a, b)


def test_bits_do_not_depend_on_a_split(host):
    mlp = make_mlp([18, 40, 70, 1], "gelu", seed=20)
    z, update = start(30, 18), normal_update(18, 6, first_step=7, first_chain=9)
    whole = host.run_chain(z, mlp, update, 6, "bf16").z
    halves = [
        host.run_chain(z[:13].clone(), mlp, update, 6, "bf16").z,
        host.run_chain(z[13:].clone(), mlp, update._replace(first_chain=22), 6, "bf16", plan=("resident", 2)).z,
    ]
    assert torch.equal(torch.cat(halves), whole)
    later = update._replace(step_coefficients=update.step_coefficients[2:], first_step=9)
    middle = host.run_chain(z, mlp, update, 2, "bf16").z
    assert torch.equal(host.run_chain(middle, mlp, later, 4, "bf16").z, whole)


@pytest.mark.parametrize(
    "plan",
    [
        ("resident", 1, 4, 1, 1),
        ("resident", 4, 2, 1, 0),
        ("streamed", 2, 4),
        ("lean", 1, 4),
        ("cluster", 1, 1, 1, 0, 3, 4),
    ],
)
def test_nan_stays_in_its_chain_and_is_dated(host, plan):
    mlp = make_mlp([18, 40, 70, 1], "gelu", seed=21)
    z, update = start(20, 18), normal_update(18, 5)
    record = Record(diagnostics=True)
    clean = host.run_chain(z, mlp, update, 5, "bf16", record, plan=plan)
    assert (clean.first_bad_step == -1).all()
    noise = eager.langevin_noise(KEY, 5, 20, 18)
    noise[0, 4, 7], noise[3, 11, 0] = math.nan, math.inf
    got = host.run_chain(z, mlp, update._replace(noise=noise), 5, "bf16", record, plan=plan)
    bad = torch.tensor([chain in (4, 11) for chain in range(20)])
    assert got.first_bad_step[4] == 0
    assert got.first_bad_step[11] == 3
    assert (got.first_bad_step[~bad] == -1).all()
    assert torch.equal(got.z[~bad], clean.z[~bad])
    assert not got.z[bad].isfinite().all(dim=1).any()
    assert torch.equal(got.energy[:, ~bad], clean.energy[:, ~bad])


# name in `After` of mlp_layers.h: number, head
BARRIERS = {
    "forward": (1, "identity"),
    "logits": (2, "identity"),
    "head": (3, "logsumexp"),
    "top": (4, "logsumexp"),
    "top-plain": (4, "identity"),
    "backward": (5, "identity"),
    "grad": (6, "identity"),
    "update": (7, "identity"),
    "diagnostics": (8, "identity"),
    "moved": (9, "identity"),  # of a cluster: before a block sends its z to the others
}


@pytest.mark.parametrize(
    ("precision", "regime", "after"),
    [("fp32", "resident", after) for after in BARRIERS if after != "moved"]
    + [("bf16", "resident", after) for after in BARRIERS if after != "moved"]
    # nothing lies over the sums of the diagnostics there, and no barrier comes after them
    + [("fp32", "lean", after) for after in BARRIERS if after not in ("diagnostics", "moved")]
    + [(precision, "cluster", after) for precision in ("fp32", "bf16") for after in BARRIERS],
)
def test_a_missing_barrier_is_caught(host, precision, regime, after):
    barrier, head = BARRIERS[after]
    mlp = make_mlp([18, 70, 70, 70, 4 if head == "logsumexp" else 1], "tanh", head=head, seed=22)
    z, update, record = start(8, 18), normal_update(18, 4), Record(diagnostics=True)

    plan = (regime, 1, 2 if regime == "cluster" else 4, 1)

    def run(seed):
        return host.run_chain(z, mlp, update, 4, precision, record, plan=plan, seed=seed)

    def ran(seed):
        """The result, or None where the faults of the host build end it: a block then counts what is not for it yet."""
        try:
            return run(seed)
        except RuntimeError:
            if regime != "cluster":
                raise
            return None

    right = run(0)
    host.module.leave_out_barrier(barrier)
    try:
        results = [ran(seed) for seed in range(1, 9)]
    finally:
        host.module.leave_out_barrier(0)

    def differs(a, b):
        return any(not torch.equal(x, y) for x, y in zip(a, b) if x is not None)

    assert any(result is None or differs(result, right) for result in results)
    assert not differs(run(9), right)


def test_lean_blocks_have_slopes_of_their_own(host):
    """The host runs one block after the other, so that blocks in each other's memory would give the right result."""
    mlp, blocks = make_mlp([6, 40, 70, 1], "tanh", seed=24), 3
    host.run_chain(start(41, 6), mlp, normal_update(6, 2), 2, "fp32", plan=("lean", 1, 4), limits=(blocks, H100_SHARED))
    (workspace,) = host.workspaces
    of_block = 48 * 8 * 4  # the last layer's slopes are at once its delta
    slopes = workspace[-blocks * of_block :].view(torch.float32).view(blocks, -1)
    assert slopes.isfinite().all()
    assert not torch.equal(slopes[0], slopes[1])
    assert not torch.equal(slopes[1], slopes[2])


SANITIZED = """
import torch, mlp_host, host_build
from mlp_host import coefficients, make_mlp
from jlebm_fast.problem import Record, Update
host = mlp_host.Host(host_build.load({module!r}))
for widths, head, plan in (
    ([18, 40, 21, 1], "identity", ("resident", 1, 4, 2)),
    ([18, 40, 21, 5], "logsumexp", ("resident", 4, 1, 1, 0)),
    ([7, 33, 1], "identity", ("streamed", 2, 2)),
    ([18, 40, 21, 5], "logsumexp", ("streamed", 1, 2, 1, 0, 1)),
    ([18, 40, 21, 1], "identity", ("lean", 1, 2)),
    ([18, 40, 21, 1], "identity", ("lean", 4, 2)),
    ([18, 40, 21, 5], "logsumexp", ("cluster", 2, 1, 1, 0, 1, 2)),
):
    for precision in mlp_host.PRECISIONS:
        mlp = make_mlp(widths, "gelu", head=head, chains=9, context=True)
        z = torch.randn(9, widths[0])
        update = Update(coefficients(2), prior_precision=torch.ones(widths[0]), noise_key=7)
        assert host.run_chain(z, mlp, update, 2, precision, Record(True, True), plan=plan).z.isfinite().all()
        if plan[0] != "cluster":
            assert host.run_energy_grad(z, mlp, precision, plan=plan)[1].isfinite().all()
mlp = make_mlp([17, 40, 21, 1], "gelu", chains=67, context=True)
update = Update(coefficients(2), prior_precision=torch.ones(17), noise_key=7)
z = torch.randn(67, 17)
assert host.run_chain(z, mlp, update, 2, "bf16", Record(True, True), plan=("warpgroup",)).z.isfinite().all()
print("clean")
"""


def test_under_the_address_and_undefined_behaviour_sanitizers():
    library = subprocess.run(
        [host_build.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("needs the compiler's sanitizer library")
    module = host_build.build_module("sanitized", ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    environment = dict(os.environ, LD_PRELOAD=library, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(module=str(module))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"
