"""Where a closed form exists: Gaussians, the conditional prior and its chain, contrastive optima, the mixture."""

import math

import pytest
import torch
from learning import generator_of

from jlebm_fast import FastLangevin
from jlebm_fast.models import (
    BIVA,
    ConditionalGaussians,
    ContrastivePrior,
    LatentVAE,
    LearningRates,
    LearningStep,
    MixturePrior,
    ModelConfig,
    build,
)
from jlebm_fast.models.gaussians import draw, kl, log_density, product, standard_normal_log_density

N = 200_000


def random_gaussian(seed, n=1, d=3):
    generator = generator_of(seed)
    return torch.randn(n, d, generator=generator), 0.5 * torch.randn(n, d, generator=generator)


def test_densities_are_those_of_torch():
    mean, log_variance = random_gaussian(0, 5)
    z = torch.randn(5, 3, generator=generator_of(1))
    law = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    torch.testing.assert_close(log_density(z, mean, log_variance), law.log_prob(z).sum(1))
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(
        standard_normal_log_density([z, z[:, :1]]), normal.log_prob(z).sum(1) + normal.log_prob(z[:, 0])
    )


def test_kl_against_monte_carlo():
    q, p = random_gaussian(0), random_gaussian(1)
    z = draw(q[0].expand(N, -1), q[1].expand(N, -1), torch.randn(N, 3, generator=generator_of(2)))
    ratio = log_density(z, *q) - log_density(z, *p)
    # five standard errors of the mean
    assert (ratio.mean() - kl(*q, *p)[0]).abs() < 5 * ratio.std() / N**0.5
    assert kl(*q, *q).abs() < 1e-6


def test_the_merge_is_the_normalised_product():
    a, b = random_gaussian(0), random_gaussian(1)
    merged = product(*a, *b)
    z = torch.randn(50, 3, generator=generator_of(3))
    difference = log_density(z, *a) + log_density(z, *b) - log_density(z, *merged)
    torch.testing.assert_close(difference, difference[:1].expand(50), atol=1e-4, rtol=0)  # constant in z
    torch.testing.assert_close(merged[1].exp(), 1 / ((-a[1]).exp() + (-b[1]).exp()))


def conditional(seed=0, dims=(2, 3, 2)):
    torch.manual_seed(seed)
    prior = ConditionalGaussians(dims, hidden=16)
    for parameter in prior.parameters():
        parameter.data.mul_(2.0)  # so that the layers depend on each other clearly
    return prior


def normals(seed, n, dims=(2, 3, 2)):
    return list(torch.randn(n, sum(dims), generator=generator_of(seed)).split(dims, dim=1))


def test_ancestral_samples_have_the_density_that_is_claimed():
    """E_p[r(z)/p(z)] = 1 for any density r, here one narrower than p: within five standard errors."""
    prior = conditional()
    with torch.no_grad():
        zs = prior.sample(normals(4, N))
        narrow = [(torch.zeros(1, d), torch.full((1, d), -2.0)) for d in (2, 3, 2)]
        log_r = sum(log_density(z, *law) for z, law in zip(zs, narrow, strict=True))
        ratio = (log_r - prior.log_density(zs)).exp()
    assert (ratio.mean() - 1).abs() < 5 * ratio.std() / N**0.5


def test_the_chain_on_the_conditional_prior_is_langevin_on_its_score():
    prior = conditional().double()
    z0 = [z.double() for z in normals(5, 4)]
    noise = torch.randn(6, 4, 7, generator=generator_of(6)).double()
    chain = FastLangevin(prior.log_density, n_steps=6, step_size=0.3, prior=None)
    found = torch.cat(chain.sample(z0, noise=noise), dim=1)
    z = torch.cat(z0, dim=1)
    for eps in noise:
        layers = [layer.clone().requires_grad_() for layer in z.split((2, 3, 2), dim=1)]
        score = torch.cat(torch.autograd.grad(prior.log_density(layers).sum(), layers), dim=1)
        z = z + 0.3**2 / 2 * score + 0.3 * eps
    torch.testing.assert_close(found, z)


def test_a_chain_on_the_conditional_prior_keeps_its_moments():
    """From an ancestral draw, small steps keep mean and variance: within five standard errors and the step's bias."""
    prior = conditional()
    n = 20_000
    with torch.no_grad():
        z0 = prior.sample(normals(7, n))
    z = FastLangevin(prior.log_density, n_steps=30, step_size=0.1, prior=None).sample(z0, noise_key=5)
    for before, after in zip(z0, z, strict=True):
        std = before.std(0)
        assert ((after.mean(0) - before.mean(0)).abs() < 5 * std * (2 / n) ** 0.5 + 0.02 * std).all()
        assert ((after.std(0) / std - 1).abs() < 0.05).all()


def test_the_contrastive_optimum_is_the_density_ratio():
    """q = N(m, v I) against N(0, I): f* = log q − log p; two stages end at chains with the moments of q."""
    torch.manual_seed(0)
    config = ModelConfig(latent_dims=(2,), energy_hidden=24, nce_stages=2, energy_activation="gelu", chain_steps=60)
    prior = ContrastivePrior(config)
    optimisers = prior.optimisers(LearningRates(1e-3, 3e-3))
    mean, std = torch.tensor([0.8, -0.5]), 0.6
    for index in range(1200):
        step = LearningStep(optimisers, seed=0, index=index)
        z = mean + std * torch.randn(500, 2, generator=generator_of(index))
        prior.learn(z, step, stage=index // 800, all_z=None)
    points = mean + std * torch.randn(500, 2, generator=generator_of(10_000))
    with torch.no_grad():
        log_q = log_density(points, mean[None], torch.full((1, 2), 2 * math.log(std)))
        optimum = log_q - standard_normal_log_density([points])
        assert (prior.classifiers[0](points) - optimum).abs().mean() < 0.15  # nats, where q has its mass
        # nothing is left for the second stage
        assert prior.classifiers[1](points).abs().mean() < 0.25
    for sampler in ("chain", "resampling"):
        prior.config = ModelConfig(**{**config.__dict__, "nce_sampler": sampler})
        samples = prior.sample(3000, generator_of(3), None)
        assert (samples.mean(0) - mean).abs().max() < 0.1
        assert (samples.std(0) - std).abs().max() < 0.1


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_stacked_net_is_the_sum_of_the_classifiers(depth, spectral_norm):
    torch.manual_seed(1)
    config = ModelConfig(
        latent_dims=(2, 3), energy_hidden=7, energy_depth=depth, nce_stages=3, spectral_norm=spectral_norm
    )
    prior = ContrastivePrior(config)
    z = torch.randn(20, 5)
    torch.testing.assert_close(prior.stacked()(z), prior(z))
    torch.testing.assert_close(prior.stacked(2)(z), prior.classifiers[0](z) + prior.classifiers[1](z))


def test_the_mixture_finds_its_components():
    torch.manual_seed(0)
    centres = torch.tensor([[-3.0, 0.0], [2.0, 2.0]])
    component = torch.randint(2, (4000,), generator=generator_of(1))
    z = centres[component] + torch.randn(4000, 2, generator=generator_of(2)) @ torch.tensor([[0.5, 0.0], [0.3, 0.4]]).T
    prior = MixturePrior(ModelConfig(latent_dims=(2,), mixture_components=2))
    metrics = prior.learn(z, LearningStep({}), 0, lambda: z)
    found = prior.means[prior.means[:, 0].argsort()]
    assert (found - centres).abs().max() < 0.1
    torch.testing.assert_close(metrics["loss"].double(), -prior.log_density(z).double().mean(), atol=1e-3, rtol=0)
    samples = prior.sample(4000, generator_of(3), None)
    assert (samples.mean(0) - z.mean(0)).abs().max() < 0.2
    assert (torch.cov(samples.T) - torch.cov(z.T)).abs().max() < 0.4


def test_the_second_vae_learns_a_correlated_gaussian():
    torch.manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    prior = LatentVAE(ModelConfig(latent_dims=(2,)))
    optimisers = prior.optimisers(LearningRates(1e-3, 1e-3))
    for index in range(600):
        z = torch.randn(200, 2, generator=generator_of(index)) @ mixing.T + 1.0
        prior.learn(z, LearningStep(optimisers, index=index), 0, None)
    samples = prior.sample(5000, generator_of(1), None)
    assert (samples.mean(0) - 1.0).abs().max() < 0.15
    assert (torch.cov(samples.T) - mixing @ mixing.T).abs().max() < 0.25


def test_biva_samples_have_the_density_that_is_claimed():
    torch.manual_seed(0)
    model = build("biva", ModelConfig(latent_dims=(2, 3), width=4, prior="gaussian"), 16, 1)
    assert isinstance(model, BIVA)
    for name, parameter in model.named_parameters():
        if name.startswith(("path", "prior_heads")):
            parameter.data.mul_(3.0)  # so that what is above clearly matters below
    with torch.no_grad():
        zs = model.sample_prior(50_000, generator_of(1))
        log_r = sum(
            log_density(z, torch.zeros(1, d), torch.full((1, d), -1.0)) for z, d in zip(zs, (2, 3), strict=True)
        )
        ratio = (log_r - model.log_prior(zs)).exp()
    assert (ratio.mean() - 1).abs() < 5 * ratio.std() / 50_000**0.5


@pytest.mark.parametrize("name", ["cg", "lvae"])
def test_the_divergence_of_a_hierarchy_against_monte_carlo(name):
    """E_q log q(z|x) − log p(z), drawn, against the sum of closed KLs along the same draws."""
    torch.manual_seed(0)
    model = build(name, ModelConfig(latent_dims=(2, 3), width=4, prior="gaussian"), 16, 1)
    n = 20_000
    with torch.no_grad():
        bottom_up = model.encoder(torch.rand(1, 1, 16, 16, generator=generator_of(3)))
        bottom_up = type(bottom_up)(*([layer.expand(n, -1) for layer in part] for part in bottom_up))
        noise = normals(2, n, (2, 3))
        zs, divergence = model.top_down(bottom_up, noise)
        posterior = model.layer_posterior(bottom_up.mean[0], bottom_up.log_variance[0], *model.conditional.of(0, zs[1]))
        log_q = log_density(zs[1], bottom_up.mean[1], bottom_up.log_variance[1]) + log_density(zs[0], *posterior)
        ratio = log_q - model.log_prior(zs)
        difference = ratio - divergence
    assert difference.mean().abs() < 5 * difference.std() / n**0.5
