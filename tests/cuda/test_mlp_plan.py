"""Which regime, how many chains a group and how much memory the CUDA kernels choose (csrc/cuda/mlp_plan.cpp)."""

from __future__ import annotations

import mlp_host
import pytest
import torch
from mlp_host import H100_SHARED, make_mlp
from test_mlp_langevin_chain import normal_update


@pytest.fixture(scope="module")
def host() -> mlp_host.Host:
    return mlp_host.host()


@pytest.mark.parametrize(
    ("widths", "activation", "precision", "shared", "regime"),
    [
        ([16, 50, 50, 50, 50, 1], "leaky_relu", "fp32", mlp_host.CONSUMER_SHARED, "resident"),
        ([50, 100, 100, 1], "leaky_relu", "fp32", mlp_host.CONSUMER_SHARED, "resident"),
        ([50, 100, 100, 1], "leaky_relu", "bf16", mlp_host.CONSUMER_SHARED, "resident"),
        ([100, 200, 200, 1], "gelu", "bf16", mlp_host.A100_SHARED, "resident"),
        ([100, 200, 200, 1], "gelu", "bf16", mlp_host.H100_SHARED, "resident"),
        ([100, 200, 200, 1], "gelu", "fp32", mlp_host.H100_SHARED, "streamed"),
        ([100, 1000, 1000, 1], "gelu", "bf16", mlp_host.H100_SHARED, "streamed"),
        ([100, 1000, 1000, 1], "gelu", "bf16", mlp_host.CONSUMER_SHARED, "streamed"),
        ([100, 1000, 1000, 1], "gelu", "fp32", mlp_host.H100_SHARED, "streamed"),
        ([100, 1000, 1000, 1], "gelu", "fp32", mlp_host.A100_SHARED, "streamed"),
        ([100, 1000, 1000, 1], "gelu", "fp32", mlp_host.CONSUMER_SHARED, "lean"),
    ],
)
def test_regime_of_the_published_sizes(host, widths, activation, precision, shared, regime):
    mlp = make_mlp(widths, activation)
    plan = host.plan(mlp, 100, precision, shared=shared)
    assert plan["found"]
    assert plan["regime"] == mlp_host.REGIMES.index(regime)
    assert plan["text"].startswith(f"{regime}, ")
    assert plan["shared_bytes"] <= shared
    assert plan["chains"] == 8
    assert plan["warps"] >= 4
    assert (plan["stream_bytes"] > 0) != (regime == "resident")
    assert host.plan(mlp, 1_000_000, precision, shared=shared)["chains"] >= 8
    assert host.unsupported_reason(mlp, precision, shared) == ""


def test_layers_that_fit_are_not_streamed(host):
    """LEBM in fp32: the middle layer stands in shared memory, the first one comes from L2 in both directions."""
    mlp = make_mlp([100, 200, 200, 1], "gelu")
    fragment, steps = 512, {100: 13, 200: 25}  # of 16 rows by 8; steps of 8 along the contraction
    first_layer = (13 * steps[100] + 7 * steps[200]) * fragment
    plan = host.plan(mlp, 100, "fp32", shared=H100_SHARED)
    assert plan["text"].startswith("streamed, 1 of the layers in shared memory, fp32")
    assert plan["stream_bytes"] == first_layer
    whole = host.plan(mlp, 100, "fp32", shared=H100_SHARED, plan=("streamed",))
    assert whole["text"].startswith("streamed, fp32")
    assert whole["stream_bytes"] == first_layer + 2 * 13 * steps[200] * fragment
    assert plan["cycles"] < 0.7 * whole["cycles"]


@pytest.mark.parametrize(("precision", "chains"), [("fp32", 16), ("bf16", 32)])
def test_many_chains_of_a_wide_net_share_what_is_streamed(host, precision, chains):
    """Without slopes in shared memory twice as many fit in a block, and each needs half of the traffic."""
    mlp = make_mlp([100, 1000, 1000, 1], "gelu")
    plan, streamed = (
        host.plan(mlp, 1_000_000, precision, shared=H100_SHARED, plan=which) for which in ((), ("streamed",))
    )
    assert (mlp_host.REGIMES[plan["regime"]], plan["chains"], streamed["chains"]) == ("lean", chains, chains // 2)
    assert plan["cycles"] < 0.7 * streamed["cycles"]
    assert mlp_host.REGIMES[host.plan(mlp, 100, precision, shared=H100_SHARED)["regime"]] == "streamed"


def test_slopes_in_device_memory_do_not_grow_with_the_chains(host):
    mlp = make_mlp([100, 1000, 1000, 1], "gelu")
    plans = [
        host.plan(mlp, chains, "fp32", shared=mlp_host.CONSUMER_SHARED, energies=True)
        for chains in (8, 132 * 8, 1_000_000)
    ]
    slopes = [plan["workspace_bytes"] - plan["stream_bytes"] for plan in plans]
    assert slopes[0] == 2 * 1008 * 8 * 4  # phi' of both layers where f is asked for, of 8 chains
    assert slopes[1:] == [132 * slopes[0]] * 2


def test_reasons(host):
    assert host.unsupported_reason(make_mlp([100, 1024, 1024, 1], "gelu"), "fp32", mlp_host.CONSUMER_SHARED) == ""
    reason = host.unsupported_reason(make_mlp([100, 4096, 4096, 1], "gelu"), "fp32", mlp_host.H100_SHARED)
    assert "the widest of 4096" in reason
    assert "232448" in reason
    assert "bf16" in reason
    assert "eager" in reason
    with pytest.raises(ValueError, match="bytes of shared memory"):
        host.run_chain(
            torch.zeros(1, 8), make_mlp([8, 4096, 1], "relu"), normal_update(8, 1), 1, "fp32", limits=(132, 100_000)
        )
