"""Chains whose units are shared out among the blocks of a cluster (csrc/cuda/cluster_exchange.h), on the host, where
stores to other blocks come late and out of order: in every bit what one block alone computes."""

from __future__ import annotations

import itertools

import mlp_host
import pytest
import torch
from host_build import on_host
from mlp_host import CONSUMER_SHARED, H100_SHARED, make_mlp
from test_mlp_langevin_chain import normal_update, per_chain, start

from jlebm_fast import precision
from jlebm_fast.problem import Record


@pytest.fixture(scope="module")
def host() -> mlp_host.Host:
    return mlp_host.host()


def assert_same(got, expected, what):
    for name, a, b in zip(expected._fields, expected, got, strict=True):
        if a is not None:
            assert torch.equal(a, b), (name, what)


# Layers of fewer row tiles of 16 than blocks: a block then has no share of some products, and sends nothing after them.
NARROW = [
    ([4, 64, 1], "identity", 4),
    ([64, 5, 1], "identity", 4),
    ([3, 128, 7, 1], "identity", 8),
    ([2, 5, 64, 9, 20], "logsumexp", 4),
    ([17, 20, 1], "identity", 2),
]


@pytest.mark.parametrize(("widths", "head", "blocks"), NARROW)
@pytest.mark.parametrize("diagnostics", [False, True])
def test_blocks_without_a_share_of_some_layer(host, widths, head, blocks, diagnostics):
    mlp = make_mlp(widths, "gelu", head=head, chains=11, seed=41)
    z, update, record = start(11, widths[0]), normal_update(widths[0], 7), Record(diagnostics=diagnostics)
    expected = host.run_chain(z, mlp, update, 7, "fp32", record, plan=("resident", 1, 1))
    for seed, warps in itertools.product(range(6), (1, 2)):
        plan = ("cluster", 1, warps, 1, -1, -1, blocks)
        if warps * blocks // 2 < max(-(-w // 16) for w in widths[:-1]):
            assert_same(host.run_chain(z, mlp, update, 7, "fp32", record, plan=plan, seed=seed), expected, (plan, seed))


@pytest.mark.parametrize("name", mlp_host.PRECISIONS)
@pytest.mark.parametrize("n_resident", [0, 1, 2, 3, 4])
def test_kept_and_streamed_layers(host, name, n_resident):
    activations = ["tanh", "leaky_relu", "silu"]
    mlp = make_mlp([40, 70, 33, 50, 3], activations, head="logsumexp", chains=19, context=True, seed=42)
    z, update, record = start(19, 40), per_chain(19, 40), Record(True, True, thin=2)
    expected = host.run_chain(z, mlp, update, 4, name, record, plan=("resident", 1, 2))
    for chain_tiles, blocks in ((1, 4), (2, 2), (4, 2)):
        plan = ("cluster", chain_tiles, 1, 1, -1, n_resident, blocks)
        assert_same(host.run_chain(z, mlp, update, 4, name, record, plan=plan, seed=n_resident), expected, plan)


def test_no_steps(host):
    z, mlp = start(12, 40), make_mlp([40, 70, 1], "gelu")
    plan = ("cluster", 1, 1, 1, 1, 2, 4)
    assert torch.equal(host.run_chain(z, mlp, normal_update(40, 1), 0, "fp32", plan=plan).z, z)


def test_it_is_a_choice_for_few_chains_of_weights_that_do_not_fit(host):
    lebm, wide = (make_mlp([100, width, width, 1], "gelu") for width in (200, 1000))

    def chosen(mlp, chains=100, name="fp32", clusters=True, shared=H100_SHARED):
        plan = host.plan(mlp, chains, name, shared=shared, clusters=clusters)
        assert plan["shared_bytes"] <= shared
        return mlp_host.REGIMES[plan["regime"]], plan

    regime, plan = chosen(lebm)
    assert (regime, plan["cluster"], plan["stream_bytes"]) == ("cluster", 4, 0)
    assert plan["text"].startswith("cluster, fp32 (tf32 x 3), 8 chains a cluster of 4 blocks of 4 warps, ")
    assert plan["cycles"] < 0.6 * chosen(lebm, clusters=False)[1]["cycles"]
    for name in ("fp32", "bf16"):
        regime, plan = chosen(wide, name=name)
        assert (regime, plan["cluster"]) == ("cluster", 8)
        assert plan["cycles"] < 0.2 * chosen(wide, name=name, clusters=False)[1]["cycles"]
    assert chosen(lebm, clusters=False)[0] == "streamed"
    assert chosen(lebm, chains=1_000_000)[0] == "streamed"
    assert chosen(make_mlp([50, 100, 100, 1], "gelu"))[0] == "resident"
    assert chosen(make_mlp([16, 50, 50, 50, 50, 1], "gelu"))[0] == "resident"
    assert chosen(wide, shared=CONSUMER_SHARED)[0] == "cluster"


def test_only_chains(host):
    """A single evaluation is for memory to wait for, and the losses of a training want h and delta."""
    spec = make_mlp([100, 1000, 1000, 1], "gelu").spec
    with precision.using("fp32"):
        kernels = on_host()
        chain = kernels.plan("mlp_langevin_chain", spec, 100, False, torch.device("cpu"))[1]
        energy = kernels.plan("mlp_energy_grad", spec, 100, True, torch.device("cpu"))[1]
    assert chain.startswith("cluster, ")
    assert energy.startswith("streamed, ")
