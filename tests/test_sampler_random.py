"""Random chains of the kinds that people run: every combination of options against the loop written out in float64."""

import copy
import random

import pytest
import torch
from torch import nn

import jlebm_fast as jf

ACTIVATIONS = (lambda: nn.LeakyReLU(0.2), nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Hardtanh)  # the last: not fused


class Energy(nn.Module):
    def __init__(self, dim, choose):
        super().__init__()
        width, parts = dim, []
        for _ in range(choose.randint(1, 4)):
            hidden = choose.choice((1, 3, 8, 13, 20, 50))
            parts += [nn.Linear(width, hidden), choose.choice(ACTIVATIONS)()]
            width = hidden
        self.net = nn.Sequential(*parts, nn.Linear(width, 1))

    def forward(self, z):
        layers = z if isinstance(z, (list, tuple)) else [z]
        return self.net(torch.cat([layer.flatten(1) for layer in layers], dim=1)).squeeze(1)


def column(value):
    return value.double()[:, None] if isinstance(value, torch.Tensor) else value


def chain_in_float64(energy, z, *, schedules, prior, sign, noise, frozen, log_likelihood):
    """(z after each step, energy, |gradient|, |move|) of all steps, as the formula says."""
    rows = []
    for k, eps in enumerate(noise.double()):
        step_size, noise_scale = (column(s[k] if isinstance(s, list) else s) for s in schedules)
        z.requires_grad_(True)
        value = energy(z)
        (grad,) = torch.autograd.grad((sign * value + log_likelihood(z)).sum(), z)
        before = z.detach()
        drift = grad if prior is None else grad + (prior[0].double() - before) / prior[1].double() ** 2
        z = torch.where(frozen, before, before + step_size**2 / 2 * drift + step_size * noise_scale * eps)
        rows.append((z, value.detach(), grad.norm(dim=1), (z - before).norm(dim=1)))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("seed", range(60))
def test_random_chains_are_the_formula(seed):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    dims = [choose.choice((1, 2, 3, 5, 10, 17)) for _ in range(choose.randint(1, 4))]
    dim, chains, n_steps = (
        sum(dims),
        choose.choice((1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 100)),
        choose.choice((1, 2, 5, 9)),
    )
    energy, z = Energy(dim, choose), torch.randn(chains, dim)
    given = list(z.split(dims, dim=1))
    if len(dims) == 1:
        given = choose.choice((z, z.view(chains, dim, 1, 1), [z], (z,)))

    def schedule(value):
        rising = [value * (1 + 0.1 * k) for k in range(n_steps)]
        return choose.choice((value, rising, value * (0.5 + torch.rand(chains))))

    schedules = schedule(choose.choice((0.05, 0.4, 1.0))), schedule(choose.choice((0.0, 0.3, 1.0)))
    shape = choose.choice(((dim,), (chains, 1), (chains, dim)))
    prior = choose.choice((None, (torch.tensor(0.0), torch.tensor(1.0)), (torch.randn(shape), 0.5 + torch.rand(shape))))
    sign = choose.choice((1.0, -1.0))
    frozen = torch.rand(choose.choice(((dim,), (chains, dim)))) < 0.3
    if not choose.randrange(3):
        frozen = torch.zeros(dim, dtype=torch.bool)
    pull = choose.choice((0.0, 0.1))  # of a log-likelihood
    noise = torch.randn(n_steps, chains, dim)
    exact, exact_energy, exact_grad, exact_move = chain_in_float64(
        copy.deepcopy(energy).double(),
        z.double(),
        schedules=schedules,
        prior=prior,
        sign=sign,
        noise=noise,
        frozen=frozen.expand(chains, dim),
        log_likelihood=lambda z: -pull * (z**2).sum(dim=1),
    )

    def log_likelihood(zs):
        layers = zs if isinstance(zs, (list, tuple)) else [zs]
        return -pull * sum((layer**2).flatten(1).sum(dim=1) for layer in layers)

    sampler = jf.FastLangevin(
        energy,
        n_steps=n_steps,
        step_size=schedules[0],
        noise_scale=schedules[1],
        prior=None if prior is None else jf.GaussianPrior(*(v.item() if v.dim() == 0 else v for v in prior)),
        maximize=sign > 0,
    )
    end, info = sampler.sample(
        given,
        noise=noise,
        mask=frozen,
        return_info=True,
        return_trajectory=True,
        log_likelihood=log_likelihood if pull else None,
    )
    assert type(end) is type(given)
    layers = end if isinstance(end, (list, tuple)) else [end]
    started = given if isinstance(given, (list, tuple)) else [given]
    assert [layer.shape for layer in layers] == [layer.shape for layer in started]
    assert torch.equal(torch.cat([layer.flatten(1) for layer in layers], dim=1), info.trajectory[-1])
    for ours, truth in (
        (info.trajectory, exact),
        (info.energy, exact_energy),
        (info.grad_norm, exact_grad),
        (info.displacement, exact_move),
    ):
        # a leaky ReLU's kink turns a rounding error into a step of the gradient now and then: not a matter of 1e-6
        torch.testing.assert_close(ours.double(), truth, rtol=2e-4, atol=2e-4 * (1 + truth.abs().max().item()))
