"""f and its gradient by the CUDA kernel, run on the host: every activation, head, precision, regime and geometry
against float64, at sizes around every tile."""

from __future__ import annotations

import mlp_host
import pytest
import torch
from mlp_host import assert_as_good_as_torch, cast, make_mlp, plain_energy_grad

from jlebm_fast.backends import eager
from jlebm_fast.problem import ACTIVATIONS


@pytest.fixture(scope="module")
def host() -> mlp_host.Host:
    return mlp_host.host()


def check(host, mlp, z, precision, **where):
    energy, grad, hidden, delta = host.run_energy_grad(z, mlp, precision, **where)
    wide = cast(mlp, torch.float64)
    energy_64, grad_64 = eager.mlp_energy_grad(z.double(), wide)
    energy_plain, grad_plain = plain_energy_grad(z, mlp, precision)
    assert_as_good_as_torch(energy, energy_plain, energy_64, "energy")
    assert_as_good_as_torch(grad, grad_plain, grad_64, "grad")
    # h_l, and delta_l by its recursion; nine of ten, since single chains may cross a kink
    _, slope, pre = eager.mlp_forward(z.double(), wide)
    delta_64 = slope @ wide.weights[-1]
    worst = {"fp32": 2e-6, "tf32": 3e-3, "bf16": 5e-2}[precision]
    for layer, (name, parameter) in reversed(list(enumerate(zip(mlp.spec.activations, mlp.spec.activation_params)))):
        delta_64 = delta_64 * eager.activation_slope(name, parameter, pre[layer])
        for got, expected in ((hidden[layer], eager.activation(name, parameter, pre[layer])), (delta[layer], delta_64)):
            error = (got - expected).abs().flatten().quantile(0.9)
            assert error <= worst * float(1 + expected.abs().max()), f"layer {layer}"
        delta_64 = delta_64 @ wide.weights[layer]


@pytest.mark.parametrize("precision", mlp_host.PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(host, activation, precision):
    mlp = make_mlp([5, 19, 33, 1], activation, chains=9, seed=1)
    z = 2 * torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    check(host, mlp, z, precision)


@pytest.mark.parametrize("precision", mlp_host.PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_right_at_every_finite_number(host, activation, precision):
    """phi and phi' of z itself, at powers of two: those are exact in every precision."""
    mlp = make_mlp([1, 1, 1], activation, bias=False)
    mlp = mlp._replace(weights=(torch.ones(1, 1), torch.ones(1, 1)))
    powers = torch.logspace(-126, 127, 254, base=2.0, dtype=torch.float64).float()[:, None]
    z = torch.cat([powers, -powers])
    energy, grad, _, _ = host.run_energy_grad(z, mlp, precision)
    energy_64, grad_64 = eager.mlp_energy_grad(z.double(), cast(mlp, torch.float64))
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    assert ((energy - energy_64).abs() <= tolerance * (1 + energy_64.abs())).all()
    assert ((grad - grad_64).abs() <= tolerance).all()


@pytest.mark.parametrize(
    ("head", "n_logits"),
    [("identity", 1), ("tanh", 1), ("sigmoid", 1), ("softplus", 1), ("logsumexp", 5), ("logsumexp", 20), ("logit", 17)],
)
@pytest.mark.parametrize(
    ("precision", "regime"),
    [
        ("fp32", "resident"),
        ("fp32", "lean"),
        ("tf32", "streamed"),
        ("tf32", "lean"),
        ("bf16", "resident"),
        ("bf16", "streamed"),
        ("bf16", "lean"),
    ],
)
def test_head(host, head, n_logits, precision, regime):
    mlp = make_mlp([10, 24, 40, n_logits], "gelu", head=head, out_scale=-0.7, chains=9, seed=3)
    z = torch.randn(9, 10, generator=torch.Generator().manual_seed(4))
    check(host, mlp, z, precision, plan=(regime,))


def test_a_number_that_is_no_logits_makes_its_chain_nan(host):
    """It must not be an address: who replays a graph may bring numbers that nobody has checked."""
    mlp = make_mlp([10, 24, 3], "gelu", head="logit", chains=9, seed=3)
    z = torch.randn(9, 10, generator=torch.Generator().manual_seed(4))
    expected, expected_grad, _, _ = host.run_energy_grad(z, mlp, "fp32")
    logit = mlp.logit.clone()
    logit[2], logit[5], logit[7] = -1, 3, 1 << 40
    energy, grad, _, _ = host.run_energy_grad(z, mlp._replace(logit=logit), "fp32")
    bad = (logit < 0) | (logit >= 3)
    assert energy[bad].isnan().all()
    assert grad[bad].isnan().all()
    assert torch.equal(energy[~bad], expected[~bad])
    assert torch.equal(grad[~bad], expected_grad[~bad])


# widths, activations, chains, precision, (regime, chain tiles, warps, groups), context
SHAPES = [
    ([2, 200, 1], "gelu", 1, "fp32", ("resident", 1, 8, 1), False),
    ([2, 50, 1], "tanh", 7, "bf16", ("streamed", 1, 4), False),
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 100, "fp32", ("resident", 4, 1, 3), False),
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 100, "tf32", ("resident", 4, 4, 1), False),
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 100, "bf16", ("resident", 4, 1, 5), False),
    ([16, 50, 50, 50, 50, 1], "leaky_relu", 9, "fp32", ("streamed", 2, 4), False),
    ([50, 100, 100, 1], "leaky_relu", 100, "bf16", ("resident", 2, 2, 4), False),
    ([50, 100, 100, 1], "leaky_relu", 8, "fp32", ("resident", 1, 4, 1), True),
    ([50, 100, 100, 1], "silu", 33, "tf32", ("resident", 2, 4, 1), True),
    ([100, 200, 200, 1], "gelu", 9, "fp32", ("streamed", 1, 8), False),
    ([100, 200, 200, 1], "gelu", 33, "tf32", ("streamed", 4, 8), False),
    ([100, 200, 200, 1], "gelu", 33, "bf16", ("resident", 4, 4, 1), False),
    ([100, 200, 200, 1], "gelu", 17, "bf16", ("streamed", 4, 8), False),
    ([7, 31, 17, 65, 1], ["relu", "elu", "mish"], 9, "fp32", ("resident", 1, 2, 2), True),
    ([7, 31, 17, 65, 3], ["softplus", "identity", "gelu_tanh"], 9, "bf16", ("resident", 1, 4, 2), True),
    ([1, 1, 1], "tanh", 1, "fp32", ("resident", 1, 1, 1), False),
    ([100, 200, 200, 1], "gelu", 17, "fp32", ("lean", 1, 8), False),
    ([7, 31, 17, 65, 3], ["softplus", "identity", "gelu_tanh"], 9, "tf32", ("lean", 1, 4), True),
]


@pytest.mark.parametrize(("widths", "activations", "chains", "precision", "plan", "context"), SHAPES)
def test_shape(host, widths, activations, chains, precision, plan, context):
    head = "identity" if widths[-1] == 1 else "logsumexp"
    mlp = make_mlp(widths, activations, head=head, chains=chains, context=context, bias=chains != 8, seed=len(widths))
    z = torch.randn(chains, widths[0], generator=torch.Generator().manual_seed(chains))
    check(host, mlp, z, precision, plan=plan)


def test_sixteen_layers(host):
    mlp = make_mlp([3, *[20, 9] * 8, 1], "tanh", chains=9, seed=5)
    check(host, mlp, torch.randn(9, 3, generator=torch.Generator().manual_seed(6)), "fp32")


@pytest.mark.parametrize("precision", mlp_host.PRECISIONS)
def test_result_does_not_depend_on_the_geometry(host, precision):
    mlp = make_mlp([18, 40, 70, 1], ["gelu", "tanh"], chains=41, seed=7)
    z = torch.randn(41, 18, generator=torch.Generator().manual_seed(8))
    first = host.run_energy_grad(z, mlp, precision, plan=("resident", 1, 1, 1))
    for plan in [
        ("resident", 1, 4, 2),
        ("resident", 2, 2, 3),
        ("resident", 4, 4, 1),
        ("resident", 4, 1, 2),
        ("streamed", 1, 8),
        ("streamed", 2, 4),
        ("streamed", 4, 8),
    ]:
        other = host.run_energy_grad(z, mlp, precision, plan=plan, seed=plan[1])
        for a, b in zip([*first[:2], *first[2], *first[3]], [*other[:2], *other[2], *other[3]]):
            assert torch.equal(a, b), plan


@pytest.mark.parametrize("plan", [("resident", 1, 4, 1), ("resident", 4, 2, 1), ("streamed", 2, 4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_stays_in_its_chain(host, precision, plan):
    mlp = make_mlp([18, 40, 70, 4], ["gelu", "leaky_relu"], head="logsumexp", chains=21, seed=9)
    z = torch.randn(21, 18, generator=torch.Generator().manual_seed(10))
    clean = host.run_energy_grad(z, mlp, precision, plan=plan)
    z[3, 5], z[17, 0] = float("nan"), float("inf")
    energy, grad, _, _ = host.run_energy_grad(z, mlp, precision, plan=plan)
    bad = torch.zeros(21, dtype=torch.bool)
    bad[3] = bad[17] = True
    assert not energy[bad].isfinite().any()
    assert not grad[bad].isfinite().all(dim=1).any()
    assert torch.equal(energy[~bad], clean[0][~bad])
    assert torch.equal(grad[~bad], clean[1][~bad])


def test_no_chains(host):
    mlp = make_mlp([3, 4, 1], "tanh")
    energy, grad, _, _ = host.run_energy_grad(torch.empty(0, 3), mlp, "fp32")
    assert energy.shape == (0,)
    assert grad.shape == (0, 3)


def test_matrix_loads_have_no_bank_conflicts(host):
    for widths in ([16, 50, 50, 1], [50, 100, 100, 1], [100, 200, 200, 1]):
        for plan in [("resident", 1, 4, 1), ("resident", 4, 4, 1)]:
            mlp = make_mlp(widths, "gelu", chains=32)
            host.module.take_statistics()
            host.run_energy_grad(torch.randn(32, widths[0]), mlp, "bf16", plan=plan)
            counted = host.module.take_statistics()
            assert counted[3] > 0
            assert counted[4] == counted[3]


def test_word_loads_have_no_bank_conflicts(host):
    """Lanes (g, t) of one 32-bit load: rows and columns of the weight, features and chains of the operand."""
    lanes = [(g, t) for g in range(8) for t in range(4)]

    def banks(addresses):
        return len({address // 4 % 32 for address in addresses})

    row_at = host.module.word_row_at
    for n_in in (1, 16, 50, 100, 200, 1000):
        for precision in (0, 1):
            stride = host.module.weight_stride(precision, n_in)
            assert banks(g * stride + 4 * t for g, t in lanes) == 32  # forward: W[g][t]
            assert banks(2 * t * stride + 4 * g for g, t in lanes) == 32  # backward: W[2t][g]
    for feature in (lambda t: t, lambda t: t + 4, lambda t: 2 * t, lambda t: 2 * t + 1):
        assert banks(row_at(8 + feature(t)) + 4 * g for g, t in lanes) == 32
    assert sorted(row_at(f) for f in range(32)) == [32 * f for f in range(32)]
