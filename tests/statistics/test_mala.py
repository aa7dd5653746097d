"""MALA: exact where the unadjusted chain is biased, on targets whose law is known."""

import math

import pytest
import torch

from jlebm_fast import EnergyMLP, FastLangevin, GaussianPrior
from jlebm_fast.metropolis import mala

CHAINS, STEPS, LARGE = 20_000, 60, 1.2
# Five standard errors of a variance estimated from CHAINS * 2 nearly independent normals.
SLACK = 5 * math.sqrt(2 / (2 * CHAINS))


def flat_energy(z):
    return 0.0 * z.sum(dim=1)


def tilt(z):
    return z @ torch.tensor([0.7, -0.3], dtype=z.dtype)


def start(chains=CHAINS, dim=2, dtype=torch.float32):
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(11), dtype=dtype)


def test_a_large_step_is_exact_on_the_normal_where_the_unadjusted_chain_is_biased():
    z, info = mala(flat_energy, start(), n_steps=STEPS, step_size=LARGE, noise_key=3)
    assert float(z.var()) == pytest.approx(1.0, abs=SLACK)
    unadjusted = FastLangevin(flat_energy, n_steps=STEPS, step_size=LARGE).sample(start(), noise_key=3)
    biased = 1 / (1 - LARGE**2 / 4)
    assert float(unadjusted.var()) == pytest.approx(biased, rel=SLACK)
    assert 0.3 < float(info.acceptance.mean()) < 0.95


def test_it_forgets_a_wrong_start_and_finds_a_tilted_target():
    """exp(b·z) N(0, I) is N(b, I); chains start at N(3, 4), the law of their ends meets Kolmogorov and Smirnov."""
    from scipy import stats

    z0 = 3 + 2 * start(4000)
    z, _ = mala(tilt, z0, n_steps=120, step_size=1.0, noise_key=5)
    for d, mean in enumerate((0.7, -0.3)):
        assert stats.kstest(z[:, d].numpy(), stats.norm(mean, 1).cdf).pvalue > 1e-4


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_other_priors_and_steps_per_chain(std):
    step_size = torch.linspace(0.5, 1.5, CHAINS) * std
    prior = GaussianPrior(mean=1.0, std=std)
    z, _ = mala(flat_energy, 1 + std * start(), n_steps=30, step_size=step_size, prior=prior, noise_key=7)
    assert float(z.mean()) == pytest.approx(1.0, abs=5 * std / math.sqrt(2 * CHAINS))
    for part in (z[: CHAINS // 2], z[CHAINS // 2 :]):  # small steps and large ones
        assert float(part.var()) == pytest.approx(std**2, rel=SLACK * math.sqrt(2))


def test_an_energy_to_be_minimised_is_the_same_target():
    up, _ = mala(tilt, start(50), n_steps=5, step_size=0.8, noise_key=1)
    down, _ = mala(lambda z: -tilt(z), start(50), n_steps=5, step_size=0.8, noise_key=1, maximize=False)
    assert torch.equal(up, down)


def test_with_every_proposal_accepted_it_is_the_langevin_chain():
    f = EnergyMLP((2, 3), hidden=8, depth=2)
    z0 = [start(40, 2), start(40, 3)]
    z, info = mala(f, z0, n_steps=10, step_size=1e-3, noise_key=9)
    assert float(info.acceptance.min()) == 1.0
    chain = FastLangevin(f, n_steps=10, step_size=1e-3, backend="eager").sample(z0, noise_key=9)
    assert isinstance(z, list)
    for ours, reference in zip(z, chain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)


def test_parts_of_chains_and_of_steps_are_the_whole():
    f, z0 = EnergyMLP(5, hidden=8, depth=2), start(30, 5)
    options = {"step_size": 1.0, "noise_key": 2, "return_trajectory": True}
    z, info = mala(f, z0, n_steps=8, **options)
    first, _ = mala(f, z0[:10], n_steps=8, **options)
    rest, _ = mala(f, z0[10:], n_steps=8, first_chain=10, **options)
    torch.testing.assert_close(torch.cat([first, rest]), z, rtol=0, atol=1e-6)
    half, _ = mala(f, z0, n_steps=4, **options)
    again, _ = mala(f, half, n_steps=4, first_step=4, **options)
    assert torch.equal(again, z)
    assert torch.equal(info.trajectory[-1], z)
    assert torch.equal(info.trajectory[3], half)
    thinned = mala(f, z0, n_steps=8, thin=4, **options)[1]
    assert torch.equal(thinned.trajectory, info.trajectory[3::4])
    assert torch.equal(thinned.energy, info.energy[3::4])


def test_proposals_without_a_finite_density_are_rejected():
    def wall(z):
        return torch.where(z[:, 0] > 1, torch.nan, 0.0) + 0.0 * z.sum(dim=1)

    z, _ = mala(wall, -start(1000).abs(), n_steps=40, step_size=1.0, noise_key=4)
    assert torch.isfinite(z).all()
    assert float(z[:, 0].max()) <= 1.0


@pytest.mark.parametrize("energy", [EnergyMLP(3, 8, 2), lambda z: -z.pow(4).sum(dim=1)], ids=["mlp", "callable"])
def test_chains_made_in_inference_mode_can_be_used_outside(energy):
    """Torch refuses to write an inference tensor and to save one for a backward."""
    options = {"n_steps": 3, "noise_key": 5, "return_trajectory": True}
    plain = mala(energy, start(6, 3), **options)
    with torch.inference_mode():
        z, info = mala(energy, start(6, 3), **options)
    torch.testing.assert_close((z, info), plain)
    assert not FastLangevin(energy, n_steps=2).sample(z, return_info=True)[0].is_inference()
    for tensor in (z, *info):
        weight = torch.ones((), requires_grad=True)
        (weight * tensor.add_(1)).sum().backward()


def test_edges_and_wrong_arguments():
    z, info = mala(flat_energy, start(0), n_steps=3)
    assert z.shape == (0, 2)
    assert info.energy.shape == (3, 0)
    z, info = mala(flat_energy, start(4), n_steps=0, return_trajectory=True)
    assert torch.equal(z, start(4))
    assert info.trajectory.shape == (0, 4, 2)
    for wrong, words in (
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"step_size": [0.1, 0.2]}, "step_size must be a float or a tensor"),
        ({"n_steps": -1}, "n_steps must be an integer >= 0"),
        ({"thin": 0}, "thin must be an integer >= 1"),
        ({"prior": 3}, "prior must be a GaussianPrior or None, got int"),
        ({"first_step": -1}, r"first_step must be an integer in \[0, 2\*\*32\), got -1"),
        ({"first_chain": "a"}, "first_chain must be an integer in"),
        ({"step_size": None}, "step_size must be a float"),
    ):
        with pytest.raises(ValueError, match=words):
            mala(flat_energy, start(4), **{"n_steps": 2, **wrong})
