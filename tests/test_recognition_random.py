"""Random energies of the kinds that people write: each is recognised, and computes what its own forward computes."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition.examining import Recognised

ACTIVATIONS = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Softplus,
    nn.Identity,
    lambda: nn.Softplus(beta=2.0),
    lambda: nn.LeakyReLU(0.2, inplace=True),
    lambda: nn.ELU(0.7, inplace=True),
    lambda: nn.Dropout(0.0),
)
NORMS = (lambda m: m, lambda m: m, old_spectral_norm, spectral_norm, weight_norm)
FORMS = (lambda e: e, torch.tanh, torch.sigmoid, F.softplus)


class RandomEnergy(nn.Module):
    """Some layers of z in some order, an MLP, a head or an output form, a scale, an output shape."""

    def __init__(self, dims, choose):
        super().__init__()
        self.order = choose.sample(range(len(dims)), choose.randint(1, len(dims)))
        width, parts = sum(dims[i] for i in self.order), []
        for _ in range(choose.randint(1, 4)):
            hidden = choose.randint(1, 12)
            parts += [
                choose.choice(NORMS)(nn.Linear(width, hidden, bias=choose.random() < 0.8)),
                choose.choice(ACTIVATIONS)(),
            ]
            width = hidden
        logits = choose.choice((1, 1, 1, 4))
        self.net = nn.Sequential(*parts, nn.Linear(width, logits))
        form = choose.choice(FORMS)
        self.head = (lambda e: e.logsumexp(-1)) if logits > 1 else (lambda e: form(e).squeeze(-1))
        self.scale, self.shape = choose.choice((1, -1, 0.5)), choose.choice(((-1,), (-1, 1), (-1, 1, 1, 1)))

    def forward(self, zs):
        z = torch.cat([zs[i].reshape(zs[i].shape[0], -1) for i in self.order], dim=-1)
        return (self.scale * self.head(self.net(z))).view(self.shape)


@pytest.mark.parametrize("seed", range(30))
def test_random_energies_are_recognised_and_right(seed):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    dims = [choose.randint(1, 5) for _ in range(choose.randint(1, 4))]
    net = RandomEnergy(dims, choose)
    z = [torch.randn(6, d, *choose.choice(((), (1, 1)))) for d in dims]
    with torch.no_grad():
        for _ in range(200):
            net(z)
    net.train(choose.random() < 0.5)
    found = EnergySource(net).found(flatten_latents(z)[1])
    assert isinstance(found, Recognised), found
    value, grad = jf.energy_and_grad(net, z)
    expected, expected_grad = jf.energy_and_grad(lambda z: net(z), z)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(grad, expected_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
