"""Laws, not tolerances: where the chain is Gaussian with known mean and variance, it must be that Gaussian.

    z <- z + s²/2 (a + (mean − z)/std²) + s · scale · eps,   rate = 1 − s²/(2 std²)
    m <- rate m + s²/2 (a + mean/std²),   v <- rate² v + s² scale²

a = 0 is f = 0, a ≠ 0 a linear f. Level of every single test: 1e-4, fixed before looking, as are the keys.
"""

import functools
import math

import pytest
import torch
from scipy import stats

import jlebm_fast as jf

LEVEL = 1e-4
CHAINS, DIM = 4000, 6
CHECKED_STEPS = (1, 2, 5, 20, 60)
SLOPE = (0.0, 1.5, -0.7, 0.0, 3.0, 0.2)


def linear_energy(slope, device):
    """f(z) = slope · z + 0.3 as an MLP with one linear unit."""
    f = jf.EnergyMLP(len(slope), 1, 1, activation="identity")
    with torch.no_grad():
        f.layers[0].weight.copy_(torch.tensor([slope]))
        f.layers[0].bias.zero_()
        f.layers[1].weight.fill_(1.0)
        f.layers[1].bias.fill_(0.3)
    return f.to(device)


@functools.cache
def noise_field(backend):
    return jf.langevin_noise(5, 30, 300, 48, device=backend.device, backend=backend.name).double()


def check_law(sample, mean, variance):
    """Mean, variance and distribution of independent draws [n, dim] of N(mean[dim], variance)."""
    score = ((sample.double().cpu() - torch.as_tensor(mean, dtype=torch.float64)) / math.sqrt(variance)).flatten()
    n = score.numel()
    p_mean = 2 * stats.norm.sf(abs(float(score.mean())) * math.sqrt(n))
    sum_of_squares = float(score.square().sum())
    p_variance = 2 * min(stats.chi2.cdf(sum_of_squares, n), stats.chi2.sf(sum_of_squares, n))
    p_distribution = stats.kstest(score.numpy(), "norm").pvalue
    assert min(p_mean, p_variance, p_distribution) > LEVEL, (p_mean, p_variance, p_distribution)


SETTINGS = {
    "paper": {"step_size": 0.4},
    "molecules": {"step_size": 0.5, "noise_scale": 0.5, "prior": jf.GaussianPrior(mean=0.4, std=0.5)},
}


@pytest.mark.parametrize("slope", [(0.0,) * DIM, SLOPE], ids=["f = 0", "linear f"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("recognised", [True, False], ids=["fused", "autograd"])
def test_every_step_of_a_gaussian_chain_has_its_law(backend, slope, options, recognised):
    f = linear_energy(slope, backend.device)
    energy = f if recognised else (lambda z: f(z))
    n_steps = CHECKED_STEPS[-1] if recognised else 5
    sampler = jf.FastLangevin(energy, n_steps=n_steps, backend=backend.name, **options)
    z0 = torch.full((CHAINS, DIM), 2.0, device=backend.device)
    _, info = sampler.sample(z0, noise_key=20261122, return_trajectory=True)
    s, scale = options["step_size"], options.get("noise_scale", 1.0)
    prior = options.get("prior", jf.GaussianPrior())
    rate = 1 - s * s / (2 * prior.std**2)
    mean, variance = torch.full((DIM,), 2.0, dtype=torch.float64), 0.0
    for step in range(1, n_steps + 1):
        mean = rate * mean + s * s / 2 * (torch.tensor(slope, dtype=torch.float64) + prior.mean / prior.std**2)
        variance = rate**2 * variance + (s * scale) ** 2
        if step in CHECKED_STEPS:
            check_law(info.trajectory[step - 1], mean, variance)


def test_stationary_variance_is_that_of_the_discrete_chain(backend):
    """1/(1 − s²/4): 1.0417 at s = 0.4, not 1; with this many draws a test tells them apart."""
    f = linear_energy((0.0,) * 16, backend.device)
    z0 = jf.langevin_noise(1, 1, 4000, 16, stream=1, device=backend.device)[0]
    z = jf.FastLangevin(f, n_steps=100, step_size=0.4, backend=backend.name)(z0, noise_key=77)
    rate = (1 - 0.08) ** 2
    stationary = 1 / (1 - 0.04)
    check_law(z, 0.0, stationary + (1 - stationary) * rate**100)
    with pytest.raises(AssertionError):
        check_law(z, 0.0, 1.0)


def test_the_noise_is_standard_normal(backend):
    eps = jf.langevin_noise(3, 10, 500, 50, device=backend.device, backend=backend.name)
    check_law(eps.flatten(0, 1), 0.0, 1.0)
    # fourth moment: 3, variance of its estimate 96/n
    score = (float(eps.double().pow(4).mean()) - 3) / math.sqrt(96 / eps.numel())
    assert 2 * stats.norm.sf(abs(score)) > LEVEL


LAGS = {"chains": (0, 1, 0), "steps": (1, 0, 0), "dims": (0, 0, 1), "chains and dims": (0, 1, 1), "all": (1, 1, 1)}


@pytest.mark.parametrize("lag", LAGS.values(), ids=LAGS)
@pytest.mark.parametrize("distance", [1, 2, 4, 7])
@pytest.mark.parametrize("power", [1, 2], ids=["values", "squares"])
def test_noise_is_independent_across_chains_steps_and_dims(backend, lag, distance, power):
    eps = noise_field(backend)
    eps = eps if power == 1 else (eps.square() - 1) / math.sqrt(2)
    ahead, behind = eps, eps
    for axis, step in enumerate(lag):
        if step:
            size = eps.shape[axis] - distance
            ahead, behind = ahead.narrow(axis, distance, size), behind.narrow(axis, 0, size)
    score = float((ahead * behind).sum()) / math.sqrt(ahead.numel())
    assert 2 * stats.norm.sf(abs(score)) > LEVEL


@pytest.mark.parametrize(
    ("a", "b"),
    [((7, {}), (8, {})), ((7, {}), (7 << 32, {})), ((7, {}), (7, {"stream": 1})), ((7, {}), (7, {"first_step": 1}))],
)
def test_neighbouring_keys_and_streams_share_nothing(backend, a, b):
    eps = [
        jf.langevin_noise(key, 10, 200, 48, device=backend.device, backend=backend.name, **place).double()
        for key, place in (a, b)
    ]
    score = float((eps[0] * eps[1]).sum()) / math.sqrt(eps[0].numel())
    assert 2 * stats.norm.sf(abs(score)) > LEVEL


def test_chains_stay_independent(backend):
    """After 20 steps from one start, ends are as uncorrelated as independent draws; so are two calls."""
    f = linear_energy(SLOPE, backend.device)
    z0 = torch.zeros(2000, DIM, device=backend.device)
    sampler = jf.FastLangevin(f, n_steps=20, backend=backend.name)
    ends = [sampler(z0, generator=torch.Generator().manual_seed(seed)).double() for seed in (7, 8)]
    ends = [(z - z.mean(0)) / z.std(0) for z in ends]
    pairs = [(ends[0][1:], ends[0][:-1]), (ends[0][:, 1:], ends[0][:, :-1]), (ends[0], ends[1])]
    for one, other in pairs:
        score = float((one * other).sum()) / math.sqrt(one.numel())
        assert 2 * stats.norm.sf(abs(score)) > LEVEL


def test_per_chain_step_sizes_have_their_own_laws(backend):
    f = linear_energy((0.0,) * DIM, backend.device)
    s = torch.tensor([0.1, 0.4, 0.9]).repeat_interleave(4000)
    sampler = jf.FastLangevin(f, n_steps=10, step_size=s.to(backend.device), backend=backend.name)
    z = sampler(torch.zeros(12_000, DIM, device=backend.device), noise_key=4)
    for group, size in zip(z.split(4000), (0.1, 0.4, 0.9), strict=True):
        rate, variance = (1 - size * size / 2) ** 2, 0.0
        for _ in range(10):
            variance = rate * variance + size * size
        check_law(group, 0.0, variance)
