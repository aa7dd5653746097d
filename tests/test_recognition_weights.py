"""Whatever a module's weights hold, or are, when it is examined: its structure is read, or it is refused by name."""

import pytest
import torch
from reference import published_loop
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.testing._internal.two_tensor import TwoTensor

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition.examining import Recognised


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FLAT = normal(6, 10)


def found(net, z):
    return EnergySource(net).found(flatten_latents(z)[1])


def two_layers():
    torch.manual_seed(10)
    return nn.Sequential(nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 1))


WEIGHTS_THAT_TEST_NOTHING = {
    "a last layer of zeros": lambda net: nn.init.zeros_(net[2].weight),
    "a first layer of zeros": lambda net: nn.init.zeros_(net[0].weight),
    "ones": lambda net: nn.init.ones_(net[0].weight),
    "NaN": lambda net: nn.init.constant_(net[0].weight, float("nan")),
    "an infinity": lambda net: net[2].weight.data[0, 3].fill_(float("inf")),
    "huge": lambda net: net[2].weight.data.mul_(1e35),
    "expanded": lambda net: setattr(net[0], "weight", nn.Parameter(torch.zeros(1, 1).expand(9, 10))),
}


@pytest.mark.parametrize("change", WEIGHTS_THAT_TEST_NOTHING.values(), ids=WEIGHTS_THAT_TEST_NOTHING)
def test_weights_that_test_nothing_are_no_reason_to_refuse(change):
    """A last layer of zeros is a usual start; NaN is what training may come to, and be loaded over."""
    net = two_layers()
    change(net)
    kept = [parameter.detach().clone() for parameter in net.parameters()]
    sampler = jf.FastLangevin(net, n_steps=5)
    sampler(FLAT)
    assert isinstance(found(net, FLAT), Recognised)
    for parameter, was in zip(net.parameters(), kept, strict=True):
        assert torch.equal(parameter, was) or torch.equal(parameter.isnan(), was.isnan())
    net[0].weight = nn.Parameter(torch.empty(9, 10))
    net.load_state_dict(two_layers().state_dict())
    noise = normal(5, 6, 10, seed=32)
    torch.testing.assert_close(
        sampler(FLAT, noise=noise), published_loop(two_layers(), FLAT, 0.4, noise), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("wrong", [lambda h: h.abs(), lambda h: 2 * h, lambda h: h.relu() + 1])
def test_a_net_that_starts_at_zero_is_tested_like_any_other(wrong):
    """With a last layer of zeros nothing that the forward does before it shows in its value or gradient."""

    class Zeroed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = two_layers()
            nn.init.zeros_(self.net[2].weight)

        def forward(self, z):
            return self.net[2](wrong(self.net[1](self.net[0](z))))

    what, net = found(Zeroed(), FLAT), Zeroed()
    nn.init.normal_(net.net[2].weight)
    if isinstance(what, Recognised):
        assert isinstance(found(net, FLAT), Recognised)
    noise, sampler = normal(5, 6, 10, seed=32), jf.FastLangevin(net, n_steps=5)
    torch.testing.assert_close(sampler(FLAT, noise=noise), published_loop(net, FLAT, 0.4, noise), rtol=0, atol=1e-5)


def test_weights_of_a_class_of_their_own_are_not_read():
    net = two_layers()
    sampler = jf.FastLangevin(net, n_steps=5)
    sampler(FLAT)
    sampler(FLAT)
    net[0].weight = nn.Parameter(TwoTensor(net[0].weight.detach(), net[0].weight.detach()))
    assert found(net, FLAT).reason == "'0.weight' is a TwoTensor, whose memory the fused kernels cannot read"
    assert "TwoTensor" in sampler.explain(FLAT)


@pytest.mark.parametrize("old_norm", [False, True])
def test_a_weight_kept_as_its_negative(old_norm):
    """As torch keeps the imaginary part of a conjugate."""
    net, noise = two_layers(), normal(5, 6, 10, seed=32)
    if old_norm:
        old_spectral_norm(net[0], n_power_iterations=50)
    name = "weight_orig" if old_norm else "weight"
    sampler = jf.FastLangevin(net.eval() if old_norm else net, n_steps=5)
    expected = [sampler(FLAT, noise=noise) for _ in range(2)][1]
    negative = torch._neg_view(-getattr(net[0], name).detach())
    setattr(net[0], name, nn.Parameter(negative))
    assert getattr(net[0], name).is_neg()
    for _ in range(2):
        torch.testing.assert_close(sampler(FLAT, noise=noise), expected, rtol=0, atol=1e-6)
