"""mlp_energy_grad in both regimes: every activation and head, sizes around the tiles, precisions, bad values."""

import pytest
import torch
from reference import PARAMETERS, assert_accurate, moved, random_mlp

from jlebm_fast import precision
from jlebm_fast.backends import eager
from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import tiles
from jlebm_fast.problem import ACTIVATIONS, HEADS, MLP

REGIMES = ("resident", "streamed")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(z, mlp, regime, times=2):
    with tiles.override(regime=regime), precision.using("fp32"):
        ours = backend.mlp_energy_grad(z, mlp)
    plain = eager.mlp_energy_grad(z, mlp)
    exact = eager.mlp_energy_grad(z.double(), moved(mlp, dtype=torch.float64))
    for name, *three in zip(("energy", "grad"), ours, plain, exact, strict=True):
        assert_accurate(*three, what=name, times=times)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, regime):
    check(drawn(18, 7), random_mlp((7, 20, 17, 1), activation), regime)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(activation):
    # pre-activations up to some hundreds, and kinks: zeros stay zeros without a bias
    mlp = random_mlp((3, 16, 1), activation, seed=3)
    mlp = mlp._replace(biases=(None, None))
    z = torch.cat([torch.zeros(2, 3), drawn(14, 3) * torch.logspace(-6, 2, 14)[:, None]])
    check(z, mlp, "resident")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_right_at_every_finite_number(activation):
    mlp = random_mlp((1, 1, 1), activation)
    mlp = mlp._replace(weights=(torch.ones(1, 1), torch.ones(1, 1)), biases=(None, None))
    powers = torch.logspace(-37, 38, 76, dtype=torch.float64).float()[:, None]
    z = torch.cat([powers, -powers])
    with precision.using("fp32"):
        energy, grad = backend.mlp_energy_grad(z, mlp)
    energy_64, grad_64 = eager.mlp_energy_grad(z.double(), moved(mlp, dtype=torch.float64))
    assert ((energy - energy_64).abs() <= 1e-6 * (1 + energy_64.abs())).all()
    assert ((grad - grad_64).abs() <= 1e-6).all()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("head", HEADS)
def test_heads(head, regime):
    logits = (1, 3, 17) if head in ("logsumexp", "logit") else (1,)
    for n_logits in logits:
        check(drawn(18, 5), random_mlp((5, 12, n_logits), "tanh", head, chains=18, out_scale=-1.5), regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_heads_far_out(regime):
    for head in ("sigmoid", "tanh", "softplus", "logsumexp"):
        mlp = random_mlp((3, 8, 4 if head == "logsumexp" else 1), "relu", head)
        mlp = mlp._replace(weights=(mlp.weights[0], mlp.weights[1] * 60))
        # weights 60 times the usual show in the logits what three products of tf32 lose to float32: two bits of 24
        check(drawn(18, 3), mlp, regime, times=2 if backend._chip(0).kind == "interpreter" else 8)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("bias", [(True, False, True), (False, True, False), (False, False, False)])
def test_context_and_absent_biases(bias, regime):
    mlp = random_mlp((5, 12, 9, 1), "gelu", chains=18, context=True)
    mlp = mlp._replace(biases=tuple(b if there else None for b, there in zip(mlp.biases, bias, strict=True)))
    check(drawn(18, 5), mlp, regime)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("widths", [(1, 1, 1), (15, 16, 17, 1), (16, 17, 15, 1), (17, 64, 1), (64, 65, 1), (65, 63, 2)])
def test_sizes_around_the_tiles(widths, regime):
    head = "identity" if widths[-1] == 1 else "logsumexp"
    for chains in (1, 16, 17):
        check(drawn(chains, widths[0]), random_mlp(widths, "leaky_relu", head), regime)


def test_depths():
    for depth in (1, 4, 5, 16):
        check(drawn(17, 3), random_mlp((3, *[6] * depth, 1), "silu"), "streamed")
    check(drawn(17, 3), random_mlp((3, *[6] * 4, 1), "silu"), "resident")


@pytest.mark.parametrize("regime", REGIMES)
def test_layers_of_different_kinds(regime):
    mlp = random_mlp((5, 9, 8, 7, 1))
    kinds = ("elu", "softplus", "elu")
    spec = mlp.spec.__class__(mlp.spec.widths, kinds, (0.7, PARAMETERS["softplus"], 1.1))
    check(drawn(18, 5), mlp._replace(spec=spec), regime)


@pytest.mark.parametrize(
    "sides",
    [
        {"block_chains": 32},
        {"block_out": 32, "block_in": 16},
        {"block_out": 16, "block_in": 64},
        {"block_out": 128, "block_in": 128},
    ],
)
def test_tiles_change_nothing_but_rounding(sides):
    with tiles.override(**sides):
        check(drawn(50, 70), random_mlp((70, 100, 40, 1), "gelu"), "streamed")


@pytest.mark.parametrize("regime", REGIMES)
def test_more_blocks_than_programs(regime, monkeypatch):
    few = tiles.Chip("interpreter", 0, 232448, 1)
    monkeypatch.setattr(backend, "_chip", lambda index: few)
    with tiles.override(block_chains=16):
        check(drawn(16 * 5 + 3, 4), random_mlp((4, 9, 1), "tanh", chains=83, context=True), regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_bad_values_stay_in_their_chain(regime):
    z = drawn(20, 5)
    mlp = random_mlp((5, 12, 9, 3), "gelu", "logsumexp")
    with tiles.override(regime=regime):
        clean = backend.mlp_energy_grad(z, mlp)
        z[3, 2], z[17, 0] = float("nan"), float("inf")
        energy, grad = backend.mlp_energy_grad(z, mlp)
    sound = [i for i in range(20) if i not in (3, 17)]
    assert torch.equal(energy[sound], clean[0][sound])
    assert torch.equal(grad[sound], clean[1][sound])
    assert energy[3].isnan()
    assert grad[3].isnan().all()


def bfloat(t):
    return t.bfloat16().float()


def emulated(z, mlp: MLP):
    """The MLP in plain torch with the operands of every product rounded to bfloat16."""
    h, slopes = z, []
    for weight, bias, name, parameter in zip(
        mlp.weights, mlp.biases, mlp.spec.activations, mlp.spec.activation_params, strict=False
    ):
        a = bfloat(h) @ bfloat(weight).T + bias
        slopes.append(eager.activation_slope(name, parameter, a))
        h = eager.activation(name, parameter, a)
    logits = bfloat(h) @ bfloat(mlp.weights[-1]).T + mlp.biases[-1]
    energy, slope = eager.head_value_and_slope(mlp, logits)
    delta = bfloat(slope) @ bfloat(mlp.weights[-1])
    for weight, slope in zip(reversed(mlp.weights[:-1]), reversed(slopes), strict=True):
        delta = bfloat(delta * slope) @ bfloat(weight)
    return energy, delta


@pytest.mark.parametrize("regime", REGIMES)
def test_bfloat16_rounds_operands_only(regime):
    mlp, z = random_mlp((20, 40, 30, 3), "gelu", "logsumexp"), drawn(40, 20)
    with tiles.override(regime=regime), precision.using("bf16"):
        ours = backend.mlp_energy_grad(z, mlp)
    exact = eager.mlp_energy_grad(z.double(), moved(mlp, dtype=torch.float64))
    for got, plain, true in zip(ours, emulated(z, mlp), exact, strict=True):
        assert_accurate(got, plain, true)
        assert (got - true).abs().max() > 1e-4, "the operands were not rounded"


def test_precision_follows_torch():
    mlp, z = random_mlp((20, 40, 1), "gelu"), drawn(20, 20)
    with precision.using("bf16"):
        rounded = backend.mlp_energy_grad(z, mlp)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        followed = backend.mlp_energy_grad(z, mlp)
        with precision.using("fp32"):
            exact = backend.mlp_energy_grad(z, mlp)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(followed[1], rounded[1])
    assert not torch.equal(exact[1], rounded[1])


def test_no_chains():
    energy, grad = backend.mlp_energy_grad(torch.zeros(0, 5), random_mlp((5, 9, 1)))
    assert energy.shape == (0,)
    assert grad.shape == (0, 5)
