"""The oracle itself: its formulas against autograd, its update against the published line."""

import pytest
import torch
from reference import ONE_LOGIT_HEADS, moved, plain_update, published_loop, random_mlp

from jlebm_fast.backends import eager
from jlebm_fast.problem import ACTIVATIONS, Record


def autograd_of(z, mlp):
    z = z.clone().requires_grad_(True)
    energy = eager.mlp_forward(z, mlp)[0]
    return energy.detach(), torch.autograd.grad(energy.sum(), z)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_formula_equals_autograd(activation):
    mlp = moved(random_mlp((7, 13, 11, 1), activation), dtype=torch.float64)
    z = 3 * torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    energy, grad = eager.mlp_energy_grad(z, mlp)
    expected_energy, expected_grad = autograd_of(z, mlp)
    assert torch.equal(energy, expected_energy)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "elu", "softplus", "mish", "silu", "gelu", "gelu_tanh"])
def test_slopes_at_kinks_and_in_the_tails_equal_autograd(activation):
    a = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 40.0, -40.0, 1e4, -1e4], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(eager.activation(activation, 0.7, a).sum(), a)
    torch.testing.assert_close(eager.activation_slope(activation, 0.7, a.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", [*ONE_LOGIT_HEADS, "logsumexp", "logit"])
def test_heads_equal_autograd(head):
    logits = 1 if head in ONE_LOGIT_HEADS else 5
    mlp = moved(random_mlp((6, 9, logits), "gelu", head, chains=20, context=True, out_scale=-1.5), dtype=torch.float64)
    z = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    energy, grad = eager.mlp_energy_grad(z, mlp)
    expected_energy, expected_grad = autograd_of(z, mlp)
    assert torch.equal(energy, expected_energy)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


def test_activations_are_what_their_names_say():
    a = torch.linspace(-3, 3, 13, dtype=torch.float64)
    exp, relu = torch.exp, torch.clamp
    expected = {
        "identity": a,
        "leaky_relu": torch.maximum(a, 0.2 * a),
        "relu": relu(a, min=0),
        "gelu": a * torch.distributions.Normal(0.0, 1.0).cdf(a),
        "silu": a / (1 + exp(-a)),
        "mish": a * torch.tanh(torch.log1p(exp(a))),
        "tanh": (exp(a) - exp(-a)) / (exp(a) + exp(-a)),
        "softplus": torch.log1p(exp(1.3 * a)) / 1.3,
        "elu": torch.where(a > 0, a, 0.9 * (exp(a) - 1)),
    }
    for name, value in expected.items():
        parameter = {"leaky_relu": 0.2, "softplus": 1.3, "elu": 0.9}.get(name, 0.0)
        torch.testing.assert_close(eager.activation(name, parameter, a), value, rtol=1e-7, atol=1e-7, msg=name)
    assert set(expected) | {"gelu_tanh"} == set(ACTIVATIONS)


def test_chain_is_the_published_loop():
    mlp = moved(random_mlp((5, 8, 1)), dtype=torch.float64)
    noise = torch.randn(12, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    update = moved(plain_update(12, 5), dtype=torch.float64)._replace(noise=noise)
    # 0.3 of steps() passed through float32
    s = float(update.step_coefficients[0, 2])
    update.step_coefficients[:, :2] = s * s / 2
    result = eager.mlp_langevin_chain(z, mlp, update, 12, Record())
    expected = published_loop(lambda z: eager.mlp_forward(z, mlp)[0], z, s, noise)
    torch.testing.assert_close(result.z, expected, rtol=1e-13, atol=1e-13)


def test_records_mean_what_the_contract_says():
    mlp = moved(random_mlp((5, 8, 1)), dtype=torch.float64)
    update = moved(plain_update(7, 5), dtype=torch.float64)
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    result = eager.mlp_langevin_chain(z, mlp, update, 7, Record(True, True, 3))
    every = eager.mlp_langevin_chain(z, mlp, update, 7, Record(True, True, 1))
    assert result.energy.shape == (2, 4)
    assert result.trajectory.shape == (2, 4, 5)
    for kept, every_step in zip(result[1:4], every[1:4], strict=True):
        assert torch.equal(kept, every_step[[2, 5]])
    assert torch.equal(result.trajectory, every.trajectory[[2, 5]])
    points = torch.cat([z[None], every.trajectory])
    for k in range(7):
        energy, grad = eager.mlp_energy_grad(points[k], mlp)
        torch.testing.assert_close(every.energy[k], energy)
        torch.testing.assert_close(every.grad_norm[k], grad.norm(dim=1))
        torch.testing.assert_close(every.displacement[k], (points[k + 1] - points[k]).norm(dim=1))
    assert torch.equal(every.z, every.trajectory[-1])
