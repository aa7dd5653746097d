"""Energies that hold the Gaussian themselves, f(z) = mlp(z) - |z|²/2 and its like: one chain kernel all the same."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from jlebm_fast import EnergyMLP, FastLangevin, GaussianPrior, energy_and_grad, verify
from jlebm_fast.metropolis import mala

DIM, STEPS, CHAINS = 5, 12, 9


def network(dim=DIM):
    return nn.Sequential(nn.Linear(dim, 12), nn.LeakyReLU(0.2), nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


class Energy(nn.Module):
    """What `form(self, f, z)` makes of the network's value f [chains, 1]."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(3)
        self.net, self.form = network(), form
        self.register_buffer("mu", torch.randn(DIM))
        self.log_sigma = nn.Parameter(0.3 * torch.randn(DIM))
        self.normal = torch.distributions.Normal(0.0, 1.0)
        self.temperature = 2.0

    def forward(self, z):
        return self.form(self, self.net(z), z)


def log_normal(self, f, z):
    return f.squeeze(1) + torch.distributions.Normal(self.mu, self.log_sigma.exp()).log_prob(z).sum(-1)


FORMS = {
    "pow": lambda self, f, z: f.squeeze(-1) - 0.5 * (z**2).sum(1),
    "square_keepdim": lambda self, f, z: f - z.square().sum(dim=1, keepdim=True) / 2,
    "product": lambda self, f, z: f.squeeze() - (z * z).sum(-1) * 0.5,
    "norm": lambda self, f, z: f[:, 0] - 0.5 * torch.norm(z, dim=1) ** 2,
    "linalg_norm": lambda self, f, z: f[:, 0] - torch.linalg.vector_norm(z, dim=1).pow(2).mul(0.5),
    "method_norm": lambda self, f, z: f.view(-1) - z.norm(dim=-1).square() / 2.0,
    "einsum": lambda self, f, z: f.view(-1) - 0.5 * torch.einsum("bi,bi->b", z, z),
    "first": lambda self, f, z: -0.5 * z.pow(2).sum(1) + f.squeeze(1),
    "potential": lambda self, f, z: -(0.5 * z.pow(2).sum(1) - f.squeeze(1)),
    "sigma": lambda self, f, z: f.squeeze(1) - (z / 0.7).pow(2).sum(1) / 2,
    "mean_and_width": lambda self, f, z: f.squeeze(1) - 0.5 * (((z - self.mu) / self.log_sigma.exp()) ** 2).sum(1),
    "log_prob": lambda self, f, z: f.squeeze(1) + self.normal.log_prob(z).sum(-1),
    "log_prob_learned": log_normal,
    "independent": lambda self, f, z: (
        f.squeeze(1) + torch.distributions.Independent(torch.distributions.Normal(self.mu, 1.5), 1).log_prob(z)
    ),
    "written_out": lambda self, f, z: f.squeeze(1) - 0.5 * (z * z + math.log(2 * math.pi)).sum(1),
    "tempered": lambda self, f, z: (f.squeeze(1) - 0.5 * (z**2).sum(1)) / self.temperature,
    "widened": lambda self, f, z: f.squeeze(1) + 0.25 * (z**2).sum(1),
    "linear_beside": lambda self, f, z: (
        f.squeeze(1) - 0.5 * (z**2).sum(1) + (self.mu * z).square().sum(1) - z.pow(1).sum(1)
    ),
    "two": lambda self, f, z: f.squeeze(1) - 0.5 * z[:, :2].pow(2).sum(1) - 2 * z[:, 2:].pow(2).sum(1),
    "head": lambda self, f, z: torch.tanh(f).squeeze(1) - 0.5 * (z**2).sum(1),
    "shifted": lambda self, f, z: 3.0 + f.squeeze(1) - 0.5 * (z**2).sum(1) - 1.0,
}


def reference(energy, z, noise, sampler):
    """The formula in float64 through autograd."""
    double, z, sign = energy.double(), z.double(), 1.0 if sampler.maximize else -1.0
    s = torch.tensor(sampler.step_size, dtype=torch.float64).expand(sampler.n_steps)
    for k in range(sampler.n_steps):
        z = z.detach().requires_grad_()
        (grad,) = torch.autograd.grad(double(z).sum(), z)
        drift = sign * grad
        if sampler.prior is not None:
            drift = drift + (torch.as_tensor(sampler.prior.mean) - z) / torch.as_tensor(sampler.prior.std).double() ** 2
        z = z.detach() + 0.5 * s[k] ** 2 * drift.detach() + s[k] * noise[k].double()
    energy.float()
    return z


def start(chains=CHAINS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(chains, DIM, generator=generator), torch.randn(STEPS, chains, DIM, generator=generator)


def check(energy, **options):
    z, noise = start()
    sampler = FastLangevin(energy, n_steps=STEPS, **options)
    assert "and a Gaussian in z" in sampler.explain(z), sampler.explain(z)
    got = sampler(z, noise=noise)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), reference(energy, z, noise, sampler), atol=2e-5, rtol=0)
    return sampler


@pytest.mark.parametrize("form", FORMS)
def test_without_a_prior_of_the_sampler(form):
    energy = Energy(FORMS[form])
    check(energy, prior=None, step_size=0.3)
    assert all(parameter.grad is None for parameter in energy.parameters())


@pytest.mark.parametrize("form", ["pow", "log_prob_learned", "widened", "tempered"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prior": GaussianPrior(0.5, 2.0)},
        {"prior": GaussianPrior(torch.linspace(-1, 1, DIM), torch.linspace(0.5, 2, DIM))},
        {"prior": GaussianPrior(0.0, torch.linspace(0.5, 2, CHAINS).view(-1, 1)), "step_size": 0.2},
        {"step_size": [0.1 + 0.02 * k for k in range(STEPS)]},
    ],
    ids=["standard", "scalars", "per_dimension", "per_chain", "schedule"],
)
def test_joined_with_a_prior_of_the_sampler(form, options):
    check(Energy(FORMS[form]), **options)


def test_of_a_potential():
    check(Energy(lambda self, f, z: 0.5 * (z**2).sum(1) - f.squeeze(1)), prior=None, maximize=False)


def test_a_prior_that_the_energy_takes_away_again():
    """precision 0 in all coordinates; and with a mean, where only a force is left."""
    check(Energy(lambda self, f, z: f.squeeze(1) + 0.5 * (z**2).sum(1)))
    check(Energy(lambda self, f, z: f.squeeze(1) + 0.5 * (z**2).sum(1)), prior=GaussianPrior(0.75, 1.0))


def test_layers_each_with_its_own():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = network(5)

        def forward(self, zs):
            f = self.net(torch.cat(zs, 1)).squeeze(1)
            for z in zs:
                f = f - 0.5 * z.pow(2).sum(1)
            return f

    energy = Layers()
    flat, noise = start()
    zs = list(flat.split([2, 3], 1))
    sampler = FastLangevin(energy, n_steps=STEPS, prior=None)
    assert "and a Gaussian in z" in sampler.explain(zs)
    got = torch.cat(sampler(zs, noise=noise), 1)
    whole = Energy(FORMS["pow"])
    whole.net = energy.net
    torch.testing.assert_close(got.double(), reference(whole, flat, noise, sampler), atol=2e-5, rtol=0)


def test_what_it_is_made_of_is_read_at_every_call():
    energy = Energy(FORMS["mean_and_width"])
    check(energy, prior=None, step_size=0.2)
    with torch.no_grad():
        energy.mu += 1.0
        energy.log_sigma -= 0.2
        energy.net[0].weight *= 1.3
    check(energy, prior=None, step_size=0.2)
    tempered = Energy(FORMS["tempered"])
    check(tempered, prior=None)
    tempered.temperature = 0.5
    check(tempered, prior=None)


def test_diagnostics_are_of_all_of_the_energy():
    energy = Energy(FORMS["log_prob_learned"])
    z, noise = start()
    fused = FastLangevin(energy, n_steps=STEPS, step_size=0.2)
    plain = FastLangevin(lambda z: energy(z), n_steps=STEPS, step_size=0.2)
    end, info = fused(z, noise=noise, return_info=True, return_trajectory=True, thin=3)
    expected_end, expected = plain(z, noise=noise, return_info=True, return_trajectory=True, thin=3)
    torch.testing.assert_close(end, expected_end, atol=1e-5, rtol=0)
    torch.testing.assert_close(end, fused(z, noise=noise), atol=1e-5, rtol=0)
    for name in ("energy", "grad_norm", "displacement", "trajectory"):
        torch.testing.assert_close(getattr(info, name), getattr(expected, name), atol=1e-4, rtol=1e-5)
    assert torch.equal(info.first_bad_step, expected.first_bad_step)


def test_posterior_chains():
    energy = Energy(FORMS["pow"])
    z, noise = start()
    likelihood = lambda z: -((z - 0.3) ** 2).sum(1)  # noqa: E731
    for options in ({}, {"return_info": True}):
        got, expected = (
            FastLangevin(f, n_steps=STEPS, prior=None, step_size=0.2)(
                z, noise=noise, log_likelihood=likelihood, **options
            )
            for f in (energy, lambda z: energy(z))
        )
        torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=0)


def test_value_gradient_and_metropolis():
    energy = Energy(FORMS["log_prob_learned"])
    z, _ = start()
    value, grad = energy_and_grad(energy, z)
    expected_value, expected_grad = energy_and_grad(lambda z: energy(z), z)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad, expected_grad)
    end, _ = mala(energy, z, n_steps=5, step_size=0.3, prior=None, noise_key=4)
    expected_end, _ = mala(lambda z: energy(z), z, n_steps=5, step_size=0.3, prior=None, noise_key=4)
    torch.testing.assert_close(end, expected_end)


def test_no_copy_as_an_energy_mlp():
    with pytest.raises(ValueError, match="holds a Gaussian in z, which belongs into prior"):
        EnergyMLP.from_module(Energy(FORMS["pow"]), DIM)


def test_verified():
    assert verify(FastLangevin(Energy(FORMS["mean_and_width"]), prior=None, n_steps=5), start()[0], show=False).passed


@pytest.mark.parametrize(
    "form",
    [
        lambda self, f, z: f.squeeze(1) - 0.1 * (z**4).sum(1),
        lambda self, f, z: f.squeeze(1) - torch.norm(z, dim=1),
        lambda self, f, z: f.squeeze(1) - z.abs().sum(1),
        lambda self, f, z: f.squeeze(1) - 0.5 * z.clamp(-50, 50).pow(2).sum(1),
        lambda self, f, z: f.squeeze(1) - 0.5 * (z[:, :1] * z[:, 1:]).sum(1),
        lambda self, f, z: f.squeeze(1) - 0.5 * (z @ torch.ones(DIM, 2, dtype=z.dtype)).pow(2).sum(1),
        lambda self, f, z: f.squeeze(1) * (1 + z.pow(2).sum(1)),
        lambda self, f, z: f.squeeze(1) - 0.5 * (z**2).sum(),
        lambda self, f, z: f - 0.5 * (z**2),
        lambda self, f, z: (f.squeeze(1) - 0.5 * (z**2).sum(1)).exp(),
        lambda self, f, z: torch.logaddexp(f.squeeze(1), -0.5 * (z**2).sum(1)),
    ],
    ids=["quartic", "norm", "laplace", "clamped", "product", "cross", "times", "of_all", "vector", "exp", "logaddexp"],
)
def test_what_is_no_gaussian_goes_through_autograd(form):
    energy = Energy(form)
    z, noise = start()
    sampler = FastLangevin(energy, n_steps=STEPS, prior=None, step_size=0.1)
    assert "not recognised" in sampler.explain(z)
    if energy(z).numel() != CHAINS:
        with pytest.raises(ValueError, match="one value per chain"):
            sampler(z, noise=noise)
        return
    got = sampler(z, noise=noise)
    torch.testing.assert_close(got.double(), reference(energy, z, noise, sampler), atol=2e-5, rtol=0)


def test_a_gaussian_around_a_condition_goes_through_autograd():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, z, context):
            return self.net(z).squeeze(1) - 0.5 * (z - context).pow(2).sum(1)

    z, _ = start()
    explanation = FastLangevin(Conditional()).explain(z, context=torch.randn(CHAINS, DIM))
    assert "not recognised" in explanation
    assert "no Gaussian in z, of independent coordinates and alike in all chains" in explanation


def test_an_exponent_that_changes_is_seen():
    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.exponent = network(), 2

        def forward(self, z):
            return self.net(z).squeeze(1) - 0.5 * z.pow(self.exponent).sum(1)

    energy = Power()
    z, _ = start()
    sampler = FastLangevin(energy, prior=None, n_steps=STEPS, step_size=0.1)
    assert "and a Gaussian" in sampler.explain(z)
    energy.exponent = 4
    got = sampler(z, noise_key=1)
    expected = FastLangevin(lambda z: energy(z), prior=None, n_steps=STEPS, step_size=0.1)(z, noise_key=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert "not recognised" in sampler.explain(z)


def test_few_evaluations_have_the_converged_spectral_norms_of_many():
    """One evaluation is not worth a run of the forward for its parameters, and goes through autograd."""
    torch.manual_seed(11)  # where one power iteration is far from converged
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(DIM, 8))
    energy = Energy(FORMS["pow"])
    energy.net = nn.Sequential(normed, nn.GELU(), nn.Linear(8, 1))
    z, _ = start()
    value, grad = energy_and_grad(energy, z)
    exact = copy.deepcopy(energy).double()
    original = exact.net[0].parametrizations.weight.original
    weight = original / torch.linalg.matrix_norm(original, 2)
    at = z.double().requires_grad_()
    hidden = nn.functional.gelu(at @ weight.t() + exact.net[0].bias)
    expected = exact.net[2](hidden).squeeze(1) - 0.5 * at.square().sum(1)
    torch.testing.assert_close(value.double(), expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected.sum(), at)[0], atol=1e-5, rtol=0)
