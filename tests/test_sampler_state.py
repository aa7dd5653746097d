"""A sampler keeps nothing that could go stale: whatever changes between two calls is seen at the second."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import published_loop
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import jlebm_fast as jf
from jlebm_fast.energy import EnergyLinear
from jlebm_fast.rng import draw_noise_key


def normal(*shape, seed=11):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_samplers_of_the_same_numbers_share_is_not_made_by_a_mode():
    """The tensors of their coefficients are made once; those of a mode's own making stay in the call."""
    f, z = jf.EnergyMLP(16, 8, 2), normal(12, 16)
    options = {"n_steps": 7, "step_size": 0.2345}
    with torch.inference_mode():
        inside = jf.FastLangevin(f, **options)(z, noise_key=3)
    with FakeTensorMode() as mode:
        fake = jf.FastLangevin(jf.EnergyMLP(16, 8, 2), **options)
        assert fake(mode.from_tensor(z), noise_key=3).shape == z.shape
    plain = jf.FastLangevin(f, **options)(z, noise_key=3)
    assert torch.equal(plain, inside)
    again = jf.FastLangevin(f, **options, prior=None)
    assert not torch.equal(again(z, noise_key=3), plain)
    other = jf.FastLangevin(f, **options, prior=jf.GaussianPrior(std=2.0))
    assert not torch.equal(other(z, noise_key=3), plain)


def test_keys_drawn_by_threads_and_in_modes_are_those_of_their_generators():
    def keys(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw_noise_key(generator) for _ in range(200)]

    def keys_in_inference_mode(seed):
        with torch.inference_mode():
            return keys(seed)

    expected = [keys(seed) for seed in range(8)]
    for draw in (keys, keys_in_inference_mode, keys):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(draw, range(8))) == expected


class Halved(nn.Module):
    def forward(self, weight):
        return weight * 0.5


CHANGES = {
    "a weight in place": lambda f: f.layers[1].weight.data.mul_(0.5),
    "a weight's data": lambda f: setattr(f.layers[1].weight, "data", f.layers[1].weight.data * 0.5),
    "a weight replaced": lambda f: setattr(f.layers[1], "weight", nn.Parameter(f.layers[1].weight.detach() * 0.5)),
    "a bias removed": lambda f: setattr(f.layers[0], "bias", None),
    "a layer replaced": lambda f: f.layers.__setitem__(0, EnergyLinear(16, 20, spectral_norm=False)),
    "a norm switched on": lambda f: f.layers.__setitem__(1, EnergyLinear(20, 20, spectral_norm=True)),
    "a weight parametrised": lambda f: nn.utils.parametrize.register_parametrization(f.layers[1], "weight", Halved()),
    "a hook": lambda f: f.register_forward_hook(lambda module, inputs, output: output * 0.5),
    "another forward": lambda f: setattr(f, "forward", lambda z: type(f).forward(f, z) * 0.5),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_an_energy_is_seen_at_the_next_call(change):
    torch.manual_seed(11)
    f, z, noise = jf.EnergyMLP(16, 20, 2), normal(12, 16), normal(6, 12, 16, seed=12)
    prior = jf.FastLangevin(f, n_steps=6)
    before = prior(z, noise=noise)
    change(f)
    after = prior(z, noise=noise)
    assert not torch.allclose(before, after, atol=1e-4)
    assert (after.double() - published_loop(f.double(), z.double(), 0.4, noise.double())).abs().max() < 2e-5


def test_parameters_that_no_longer_fit_are_refused():
    prior, z = jf.FastLangevin(jf.EnergyMLP(16, 20, 2), n_steps=6), normal(12, 16)
    prior(z)
    prior.energy.layers[1].weight.data = torch.zeros(20, 19)
    with pytest.raises(ValueError, match=r"weight 1 of the energy must be \[20, 20\] float32 on cpu like z"):
        prior(z)
    prior.energy.layers[1].weight.data = torch.zeros(20, 20)
    prior.energy.layers[2].bias.data = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"bias 2 of the energy must be \[1\] float32 on cpu like z, got \[1\] float64"
    ):
        prior(z)
    prior.energy.double()
    with pytest.raises(ValueError, match=r"z must be \[chains, 16\] float64 on cpu, got \[12, 16\] float32 on cpu"):
        prior(z)


@pytest.mark.parametrize("change", ["a class's forward", "a base's forward", "a static forward"])
def test_a_forward_written_into_a_class_is_seen(change):
    class Base(nn.Sequential):
        pass

    class Energy(Base):
        pass

    torch.manual_seed(11)
    net, z, noise = Energy(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1)), normal(12, 16), normal(6, 12, 16, seed=12)
    prior = jf.FastLangevin(net, n_steps=6)
    assert "path      mlp_langevin_chain" in prior.explain(z)

    def halved(self, z):
        return 0.5 * nn.Sequential.forward(self, z)

    prior(z, noise=noise)
    if change == "a static forward":
        Energy.forward = staticmethod(lambda z: halved(net, z))
    else:
        (Energy if change == "a class's forward" else Base).forward = halved
    after = prior(z, noise=noise)
    assert (after.double() - published_loop(net.double(), z.double(), 0.4, noise.double())).abs().max() < 2e-5


def test_tensors_of_a_configuration_are_copied():
    f, z = jf.EnergyMLP(16, 20, 2), normal(12, 16)
    step_size, std = torch.full((12,), 0.3), torch.full((16,), 2.0)
    prior = jf.FastLangevin(f, n_steps=6, step_size=step_size, prior=jf.GaussianPrior(std=std))
    before = prior(z, noise_key=1)
    step_size.mul_(2)
    std.mul_(2)
    assert torch.equal(prior(z, noise_key=1), before)


def writing(z):
    with torch.no_grad():
        z.clamp_(-1, 1)
    return -z.pow(2).sum(1)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_what_an_energy_writes_into_its_argument_never_reaches_the_caller(backend):
    z = 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    before = z.clone()
    jf.FastLangevin(writing, n_steps=2, backend=backend).sample(z)
    jf.FastLangevin(jf.EnergyMLP(6, 4, 1), n_steps=2, backend=backend).sample(z, log_likelihood=writing)
    jf.energy_and_grad(writing, z)
    jf.verify(writing, z, show=False)
    jf.mala(writing, z, n_steps=2)
    assert torch.equal(z, before)


def test_complex_energies_are_refused():
    z = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"energy must return real numbers, got \[4\] complex64 on cpu"):
        jf.FastLangevin(lambda z: z.sum(1).to(torch.complex64), n_steps=2)(z)
    with pytest.raises(ValueError, match="log_likelihood must return real numbers"):
        jf.FastLangevin(jf.EnergyMLP(6, 4, 1), n_steps=2)(z, log_likelihood=lambda z: z.sum(1).to(torch.complex64))


def test_long_chains_are_described_at_once_and_endless_ones_refused():
    jf.FastLangevin(jf.EnergyMLP(6, 4, 1), n_steps=1_000_000)
    with pytest.raises(ValueError, match=r"n_steps must be at most 2\*\*32"):
        jf.FastLangevin(jf.EnergyMLP(6, 4, 1), n_steps=10**12)


class Scaled(nn.Module):
    """Read by a run of its forward; with a layer norm, run through autograd."""

    def __init__(self, layer_norm):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        middle = [nn.LayerNorm(12)] if layer_norm else []
        self.net = nn.Sequential(norm(nn.Linear(16, 12)), *middle, nn.SiLU(), norm(nn.Linear(12, 1)))

    def forward(self, z):
        return self.net(z).squeeze(1) * self.net[0].bias.exp()[0]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_threads_that_sample_one_module_leave_its_buffers_alone(layer_norm):
    torch.manual_seed(3)
    energy, z = Scaled(layer_norm), normal(12, 16)
    sampler = jf.FastLangevin(energy, n_steps=5)
    expected = [sampler(z, noise_key=key) for key in range(40)]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in energy.named_buffers()}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: sampler(z, noise_key=key), range(40)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, buffer in energy.named_buffers():
        assert buffer is buffers[name][0], name
        assert torch.equal(buffer, buffers[name][1]), name
