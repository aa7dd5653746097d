"""float64 on the CPU: what serves it is eager's arithmetic with other roundings, and eager's noise in every bit."""

import pytest
import torch
from torch import nn

import jlebm_fast as jf
from jlebm_fast import ops
from jlebm_fast.backends import _native, float64
from jlebm_fast.problem import ACTIVATIONS, HEADS, MLP, MLPSpec, Record, Update

CHAINS, DIM, STEPS = 7, 6, 5
pytestmark = pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason()))


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(activation, head="identity", context=False):
    n_logits = 3 if head in ("logsumexp", "logit") else 1
    spec = MLPSpec((DIM, 9, 8, n_logits), (activation, "gelu"), (0.3, 0.0), head, -0.7)
    weights = tuple(normal(*shape, seed=i) / shape[1] ** 0.5 for i, shape in enumerate(spec.weight_shapes))
    bias = normal(CHAINS, 9, seed=8) if context else None
    logit = torch.tensor([0, 2, 1, 0, 1, 2, 2]) if head == "logit" else None
    return MLP(spec, weights, (normal(9, seed=5), None, normal(n_logits, seed=6)), bias, logit)


UPDATES = {
    "plain": {},
    "prior": {"prior_mean": normal(DIM, seed=2), "prior_precision": normal(DIM, seed=3).abs()},
    "per chain": {
        "chain_coefficients": normal(CHAINS, 3, seed=2),
        "prior_mean": normal(CHAINS, DIM, seed=4),
        "prior_precision": normal(CHAINS, DIM, seed=3).abs(),
        "frozen": normal(CHAINS, DIM, seed=5) > 0.5,
    },
    "counted from elsewhere": {"first_step": (1 << 32) - 2, "first_chain": (1 << 32) - 3},
    "given noise": {"noise": normal(STEPS, CHAINS, DIM, seed=9)},
}


def chains_agree(mlp, update, record):
    z = normal(CHAINS, DIM, seed=1)
    found = ops.mlp_langevin_chain(z, mlp, update, STEPS, record)
    expected = ops.mlp_langevin_chain(z, mlp, update, STEPS, record, backend="eager")
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    mlp = net(activation)
    coefficients = normal(STEPS, 3, seed=7)
    chains_agree(mlp, Update(coefficients, noise_key=5), Record(True, True, 2))
    z = normal(CHAINS, DIM)
    for ours, theirs in zip(ops.mlp_energy_grad(z, mlp), ops.mlp_energy_grad(z, mlp, backend="eager"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("group", [None, 2], ids=["at once", "in groups"])
def test_every_head_and_update(head, update, group, monkeypatch):
    if group is not None:
        monkeypatch.setattr(float64, "_NOISE_FLOATS", group * STEPS * DIM)
    coefficients = normal(STEPS, 3, seed=7)
    for record in (Record(), Record(True, True, 2)):
        chains_agree(net("leaky_relu", head, context=True), Update(coefficients, noise_key=5, **update), record)


def test_noise_is_that_of_the_contract():
    ours = jf.langevin_noise(3, 4, 5, 7, first_step=2, first_chain=9, dtype=torch.float64)
    assert ours.dtype is torch.float64
    assert torch.equal(ours, jf.langevin_noise(3, 4, 5, 7, first_step=2, first_chain=9).double())
    assert torch.equal(
        ours, jf.langevin_noise(3, 4, 5, 7, first_step=2, first_chain=9, dtype=torch.float64, backend="eager")
    )


def test_a_step_of_any_energy():
    energy = nn.Sequential(nn.Linear(DIM, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 1)).double()
    z = normal(CHAINS, DIM)
    found, expected = (
        jf.FastLangevin(energy, n_steps=4, backend=backend)(z, noise_key=2) for backend in ("auto", "eager")
    )
    assert torch.equal(found, expected)


def test_explain_says_that_nothing_is_fused():
    energy = nn.Sequential(nn.Linear(DIM, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    z = normal(CHAINS, DIM)
    assert "fused kernels are float32" in jf.FastLangevin(energy).explain(z)
    assert "plain torch" in jf.FastLangevin(energy, backend="eager").explain(z)
