"""Unusual arguments, modes and containers: a right answer or one sentence, no traceback and no silent other thing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import jlebm_fast as jf
from jlebm_fast.spectral import top_singular_triple

Z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Two(NamedTuple):
    a: Tensor
    b: Tensor


@pytest.mark.parametrize("way", ["plain", "general"])
def test_a_named_tuple_comes_back_as_one(way):
    prior = jf.FastLangevin(jf.EnergyMLP((2, 4), 8, 2), n_steps=3)
    z = Two(Z[:, :2].clone(), Z[:, 2:].clone())
    options = {} if way == "plain" else {"log_likelihood": lambda z: -z.a.square().sum(1)}
    got = prior.sample(z, noise_key=1, **options)
    assert type(got) is Two
    if way == "plain":
        assert all(torch.equal(x, y) for x, y in zip(got, prior.sample(tuple(z), noise_key=1), strict=True))


def test_spectral_norms_under_fake_tensors():
    with FakeTensorMode():
        assert jf.EnergyMLP(6, 8, 1, spectral_norm=True).layers[0].weight.shape == (8, 6)
    energy = jf.EnergyMLP(6, 8, 1, spectral_norm=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert energy(mode.from_tensor(Z)).shape == (5,)
        assert jf.FastLangevin(energy).sample(torch.empty(5, 6), noise_key=1).shape == (5, 6)
    assert torch.isfinite(energy(Z)).all()


def test_a_key_is_drawn_under_a_mode():
    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    prior = jf.FastLangevin(jf.EnergyMLP(6, 8, 2), n_steps=3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert prior(torch.empty(5, 6)).shape == (5, 6)
    torch.manual_seed(2)
    expected, state = prior(Z), torch.get_rng_state()
    torch.manual_seed(2)
    with Passing():
        got = prior(Z)
    assert torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_spectral_norm_leaves_the_vector_of_a_lesser_value():
    """An entry that was never the largest grows beyond the one whose vectors are kept: exactly singular, but lesser."""
    energy = jf.EnergyMLP(4, 4, 1, spectral_norm=True)
    layer = energy.layers[0]
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.4, 0.3])))
        energy(Z[:, :4])  # keeps the vectors
        layer.weight[1, 1] = 20.0
        assert torch.linalg.matrix_norm(layer.effective_weight(), 2).item() == pytest.approx(1.0, abs=1e-5)
    for dtype in (torch.float32, torch.float64):
        start = torch.eye(4, dtype=dtype)[0]
        assert top_singular_triple(layer.weight.to(dtype), start)[2] == pytest.approx(20.0)
    rows = torch.tensor([[3.0, 4.0]])
    assert top_singular_triple(rows, torch.ones(1))[2] == pytest.approx(5.0)  # of one row there is no other vector


def test_a_compiled_call_heeds_a_replaced_forward():
    energy = jf.EnergyMLP(6, 8, 2)
    energy.forward = lambda z, context=None, y=None: -5 * z.square().sum(1)
    prior = jf.FastLangevin(energy, n_steps=3)
    run = lambda z: prior.sample(z, noise_key=1)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(Z), run(Z))


@pytest.mark.parametrize("bad", [4, -1, 2**32 + 1])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_number_that_is_no_logits_makes_its_chain_nan(backend, bad):
    energy = jf.EnergyMLP(6, 8, 2, out_features=4, head="logit")
    parameters = [[getattr(layer, name).detach() for layer in energy.layers] for name in ("weight", "bias")]
    y = torch.tensor([0, 1, 2, 3, bad])
    value, grad = torch.ops.jlebm_fast.mlp_energy_grad(
        Z, *parameters, None, y, "6-8-8-4 leaky_relu:0.2 leaky_relu:0.2 logit", 1.0, backend, None
    )
    assert torch.isfinite(torch.cat([value[:4, None], grad[:4]], 1)).all()
    assert torch.cat([value[4:, None], grad[4:]], 1).isnan().all()
    torch.testing.assert_close(value[:4], energy(Z[:4], y=y[:4]).detach())


@pytest.mark.parametrize("call", ["sample", "forward"])
def test_chosen_logits_in_a_graph(call):
    energy = jf.EnergyMLP(6, 8, 2, out_features=4, head="logit")
    prior = jf.FastLangevin(energy, n_steps=3)
    run = {"sample": lambda z, y: prior.sample(z, y=y, noise_key=1), "forward": lambda z, y: energy(z, y=y)}[call]
    y = torch.tensor([3, 1, 0, 2, 1])
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(Z, y), run(Z, y))


def test_metropolis_at_its_edges():
    energy = jf.EnergyMLP(6, 8, 2)
    z = Z.clone()
    jf.mala(energy, z, n_steps=0)[0].add_(1)
    assert torch.equal(z, Z)
    poles = lambda z: torch.where(z[:, 0] > 0, float("inf"), z.sum(1) * 0)  # noqa: E731
    _, info = jf.mala(poles, torch.full((5, 6), -0.3), n_steps=50, noise_key=1)
    assert torch.isfinite(info.energy).all()  # a proposal whose density is infinite is rejected
    for schedule in ([0.4, 0.3], (0.4,), np.array([0.4])):
        with pytest.raises(ValueError, match="a proposal with a schedule is another kernel"):
            jf.mala(energy, Z, n_steps=2, step_size=schedule)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: jf.FastLangevin(f.half())(Z), "must be float32 or float64, got float16"),
        (lambda f: jf.FastLangevin(f).sample(Z, thin=2**63), r"thin must be an integer below 2\*\*63"),
        (lambda f: jf.FastLangevin(f, step_size={0.4, 0.3}, n_steps=2), "step_size must be a float, a sequence of 2"),
        (lambda f: jf.FastLangevin(f, step_size=b"ab", n_steps=2), "step_size must be a float, a sequence of 2"),
        (lambda f: jf.FastLangevin(f, step_size=np.complex64(1 + 2j)), "step_size must be a float"),
        (lambda f: jf.FastLangevin(f, step_size=10**400), "step_size must be a float"),
        (lambda f: jf.GaussianPrior(std=10**400), "std of the prior must be a float"),
        (lambda f: jf.GaussianPrior(std=1e-30), "std of the prior must be at least 1e-18"),
        (lambda f: jf.EnergyMLP(6, True, 2), "hidden must be"),
        (lambda f: jf.FastLangevin(jf.EnergyMLP), "energy must be a module or a callable, got the class EnergyMLP"),
        (lambda f: jf.FastLangevin(f)([]), "got an empty list"),
    ],
)
def test_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call(jf.EnergyMLP(6, 8, 2, spectral_norm=True))


def test_numbers_of_numpy():
    assert jf.GaussianPrior(mean=np.float32(0.5), std=np.int64(2)).std == 2.0


def test_verify_makes_as_many_chains_as_the_prior_has():
    energy = jf.EnergyMLP(6, 8, 2)
    assert jf.verify(jf.FastLangevin(energy, n_steps=3, prior=jf.GaussianPrior(torch.zeros(7, 6))), show=False).passed


def test_what_torch_raises_while_it_makes_the_answer_is_the_callers():
    class RaisingOnce(torch.overrides.TorchFunctionMode):
        raised = False

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.empty_like and not self.raised:
                self.raised = True
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    prior = jf.FastLangevin(jf.EnergyMLP(6, 8, 2), n_steps=3)
    prior(Z)
    with RaisingOnce(), pytest.raises(KeyboardInterrupt):
        prior(Z)
    assert torch.equal(prior(Z, noise_key=1), prior(Z, noise_key=1))
