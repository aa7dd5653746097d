"""Layers exchanged, norms taken off, other types of number, of modules read by a run of their forward and others."""

import gc

import pytest
import torch
from reference import published_loop
from torch import nn

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition.probing import Probed
from jlebm_fast.recognition.twins import copy_of


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z = normal(60, 6)
NORMS = {
    "old": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "new": (
        nn.utils.parametrizations.spectral_norm,
        lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
    ),
}


class Tempered(nn.Module):
    """Times a parameter, which no structure has a place for: read by a run of its forward."""

    def __init__(self, norm=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        first = nn.Linear(6, 20)
        self.net = nn.Sequential(first if norm is None else norm(first), nn.GELU(), nn.Linear(20, 1))
        self.t = nn.Parameter(torch.tensor(3.0))

    def forward(self, z):
        return (self.t * self.net(z)).squeeze(1)


def found(net, z=Z):
    return EnergySource(net).found(flatten_latents(z)[1])


def close(sampler, net, z=Z, atol=1e-5):
    """A chain is that of a module that nobody ever looked at."""
    expected = jf.FastLangevin(copy_of(net), n_steps=sampler.n_steps)(z, noise_key=1)
    torch.testing.assert_close(sampler(z, noise_key=1), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("norm", NORMS)
def test_the_norms_are_those_of_the_layers_that_are_there_now(norm):
    """As copies with averaged weights, or the best ones, are put in and taken out again."""
    add = NORMS[norm][0]
    net, other = Tempered(add).eval(), Tempered(add, seed=1).eval()
    sampler = jf.FastLangevin(net, n_steps=20)
    close(sampler, net)
    assert isinstance(found(net), Probed)
    own, net.net = net.net, other.net
    torch.testing.assert_close(
        sampler(Z, noise_key=1), jf.FastLangevin(other, n_steps=20)(Z, noise_key=1), rtol=0, atol=1e-5
    )
    assert jf.verify(net, Z, show=False).passed
    assert [layer.owner() for layer in found(net).norms] == [other.net[0]]
    del own
    gc.collect()  # what was examined is gone
    close(sampler, net)
    assert "spectral norms as they converge" in sampler.explain(Z)


@pytest.mark.parametrize("norm", NORMS)
def test_layers_exchanged_back_and_forth(norm):
    """So often that the structure is given up for a run of the forward."""
    nets = [Tempered(NORMS[norm][0], seed=seed).eval().net for seed in (0, 1)]
    whole = nn.Sequential(nets[0]).eval()
    sampler = jf.FastLangevin(whole, n_steps=20)
    for i in range(8):
        whole[0] = nets[i % 2]
        expected = jf.FastLangevin(nn.Sequential(nets[i % 2]).eval(), n_steps=20)(Z, noise_key=1)
        torch.testing.assert_close(sampler(Z, noise_key=1), expected, rtol=0, atol=1e-5)
    assert isinstance(found(whole), Probed)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_is_taken_off(norm):
    add, remove = NORMS[norm]
    net = Tempered(add)
    for _ in range(100):
        net(Z)  # a power iteration
    sampler = jf.FastLangevin(net.eval(), n_steps=20, step_size=0.1)
    sampler(Z)
    remove(net.net[0])
    noise = normal(20, 60, 6, seed=32)
    expected = published_loop(net, Z, 0.1, noise)
    for chain in (sampler, jf.FastLangevin(net, n_steps=20, step_size=0.1)):
        torch.testing.assert_close(chain(Z, noise=noise), expected, rtol=0, atol=1e-4)
    assert isinstance(found(net), Probed)
    assert found(net).norms == []
    assert jf.verify(net, Z, show=False).passed
    few = jf.FastLangevin(net, n_steps=1)  # too few to read it: its own forward
    torch.testing.assert_close(few(Z[:2], noise=noise[:1, :2]), published_loop(net, Z[:2], 0.4, noise[:1, :2]))


@pytest.mark.parametrize("few", [False, True], ids=["read", "by autograd"])
def test_a_norm_of_another_kind_in_its_place(few):
    """One whose converged value is not known, of the columns, is refused by name wherever it is met."""
    net = Tempered(nn.utils.spectral_norm).eval()
    sampler = jf.FastLangevin(net, n_steps=1 if few else 20)
    z = Z[:2] if few else Z
    sampler(z)
    net.net[0] = nn.utils.spectral_norm(nn.Linear(6, 20), dim=1).eval()
    plain = jf.FastLangevin(lambda z: net(z), n_steps=sampler.n_steps)
    torch.testing.assert_close(sampler(z, noise_key=1), plain(z, noise_key=1), rtol=0, atol=1e-5)
    assert "layer 'net.0' has a spectral norm whose converged value is not known" in sampler.explain(z)


def test_another_type_and_back():
    net = Tempered()
    sampler = jf.FastLangevin(net, n_steps=20)
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64):
        net.to(dtype)
        z, noise = Z.to(dtype), normal(20, 60, 6, seed=32).to(dtype)
        expected = published_loop(net, z, 0.4, noise)
        torch.testing.assert_close(sampler(z, noise=noise), expected, rtol=0, atol=1e-4)
        assert "parameters by a run of its own forward" in sampler.explain(z)
    assert "before the last time its type or device had changed" in sampler.explain(z)


PLAIN = {
    "read where they stand": lambda seed=0: Tempered(seed=seed).net,
    "read by a run": lambda seed=0: Tempered(seed=seed),
    "of a norm": lambda seed=0: Tempered(nn.utils.parametrizations.spectral_norm, seed=seed).net.eval(),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_torch_may_swap_what_parameters_hold(make):
    """It refuses wherever somebody has a weak reference to a parameter."""
    net = make()
    sampler = jf.FastLangevin(net, n_steps=20)
    sampler(Z)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.load_state_dict(make(seed=1).state_dict())
        close(sampler, net)
        net.double()
        close(sampler, net, Z.double(), 1e-9)
        net.float()
        close(sampler, net)
        assert "autograd" not in sampler.explain(Z)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_parameters_that_take_each_others_place():
    """Each freed before the next is made, so that they come to lie where others lay."""
    net = Tempered().net
    sampler = jf.FastLangevin(net, n_steps=20)
    for seed, width in enumerate((20, 20, 20, 31, 31, 20)):
        for layer, shape in ((net[0], (width, 6)), (net[2], (1, width))):
            del layer.weight, layer.bias
            layer.weight = nn.Parameter(0.3 * normal(*shape, seed=seed))
            layer.bias = nn.Parameter(normal(shape[0], seed=seed))
        close(sampler, net)
        assert "autograd" not in sampler.explain(Z)


def test_all_shapes_at_once():
    """The very parameters, wider: a kernel is never given what no longer fits its structure."""
    net = Tempered().net
    sampler = jf.FastLangevin(net, n_steps=20)
    sampler(Z)
    sampler(Z)
    net[0].weight.data, net[0].bias.data, net[2].weight.data = normal(31, 6), normal(31), 0.2 * normal(1, 31)
    close(sampler, net)
    assert "parameter 'weight' of layer '0' had changed" in sampler.explain(Z)
