"""How an energy is called, and with what: inside inference_mode, by its own __call__, latents of another width."""

import copy

import pytest
import torch
from torch import nn

import jlebm_fast as jf

Z = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.t = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 1)), nn.Parameter(torch.tensor(3.0))

    def forward(self, z):
        return (self.t * self.net(z)).squeeze(1)


class NoMLP(Tempered):
    def forward(self, z):
        return super().forward(z).sin()


def own():
    torch.manual_seed(1)
    return jf.EnergyMLP(6, 12, 2)


MADE = {"read by a run": Tempered, "read": lambda: Tempered().net, "by autograd": NoMLP, "own": own}


@pytest.mark.parametrize("copied", [False, True], ids=["made", "copied"])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_nets_of_inference_mode(make, copied):
    net = make()
    with torch.inference_mode():
        other = copy.deepcopy(net) if copied else make()
    assert all(parameter.is_inference() for parameter in other.parameters())
    expected = jf.FastLangevin(net, n_steps=8)
    sampler = jf.FastLangevin(other, n_steps=8)
    torch.testing.assert_close(sampler(Z, noise_key=1), expected(Z, noise_key=1), rtol=0, atol=1e-5)
    assert sampler.explain(Z).splitlines()[0] == expected.explain(Z).splitlines()[0]
    assert jf.verify(other, Z, show=False).passed
    torch.testing.assert_close(jf.energy_and_grad(other, Z)[1], jf.energy_and_grad(net, Z)[1])
    with torch.inference_mode():
        torch.testing.assert_close(sampler(Z, noise_key=1), expected(Z, noise_key=1), rtol=0, atol=1e-5)


def test_a_call_of_its_own():
    class Called(jf.EnergyMLP):
        def __call__(self, z):
            return 10 * super().__call__(z)

    torch.manual_seed(1)
    net = Called(6, 12, 2)
    torch.testing.assert_close(jf.energy_and_grad(net, Z)[0], net(Z).detach())
    chain, plain = jf.FastLangevin(net, n_steps=4), jf.FastLangevin(lambda z: net(z), n_steps=4)
    for _ in range(2):
        torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [Tempered, lambda: Tempered().net], ids=["by a run", "where they stand"])
@pytest.mark.parametrize("used", [False, True], ids=["at first", "later"])
def test_latents_of_another_width(make, used):
    sampler = jf.FastLangevin(make(), n_steps=8)
    if used:
        sampler(Z)
    with pytest.raises(ValueError, match=r"z must be \[chains, 6\].* got \[40, 5\] float32 on cpu: give latents"):
        sampler(Z[:, :5])
    sampler(Z)


def test_what_else_raises_is_the_energys_own():
    class Broken(Tempered):
        def forward(self, z):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jf.FastLangevin(Broken(), n_steps=2)(Z)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jf.FastLangevin(NoMLP(), n_steps=2)(Z[:, :5])
