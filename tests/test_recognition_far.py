"""What an energy is a thousand standard deviations away, no random latents show: walls, and activations with one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition import agreeing, following
from jlebm_fast.recognition.examining import Recognised, Unrecognised
from jlebm_fast.recognition.probing import Probed

DIM = 6
Z = torch.randn(30, DIM, generator=torch.Generator().manual_seed(3))


class Walled(nn.Module):
    """A network, a Gaussian, and a function of z alone that is next to nothing wherever a chain starts."""

    def __init__(self, wall):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.wall = nn.Sequential(nn.Linear(DIM, 20), nn.GELU(), nn.Linear(20, 1)), wall

    def forward(self, z):
        return self.net(z).squeeze(1) - 0.5 * z.pow(2).sum(1) + self.wall(z)


WALLS = {
    "softplus of squares": lambda z: -F.softplus(10 * (z.pow(2) - 100)).sum(1),
    "softplus of the length": lambda z: -F.softplus(z.pow(2).sum(1) - 400),
    "exp of squares": lambda z: -torch.exp(z.pow(2) - 90).sum(1),
    "exp of one coordinate": lambda z: -torch.exp(3 * z[:, 1] - 80),
    "bounded": lambda z: -50 * torch.sigmoid(z.pow(2).sum(1) - 400),
    "a root": lambda z: -((1e6 - z.pow(2).sum(1)).sqrt() ** 2),
    "another norm": lambda z: -((z - 1000).norm(p=1, dim=1) ** 2),
    "a norm with a number": lambda z: -((z.norm(dim=1) + 1.0) ** 2),
    "a norm": lambda z: -z.norm(dim=1),
    "a quartic": lambda z: -1e-14 * z.pow(2).pow(2).sum(1),
    "a cube": lambda z: -1e-14 * (z * z * z).sum(1),
    "a product of squares": lambda z: -1e-14 * torch.einsum("bi,bi->b", z * z, z),
    "a quotient": lambda z: 1.0 / (z.pow(2).sum(1) + 1e12),
}


@pytest.mark.parametrize("wall", WALLS.values(), ids=WALLS)
def test_what_is_no_gaussian_by_the_way_it_is_computed_is_refused(wall):
    net = Walled(wall)
    what = EnergySource(net).found(flatten_latents(Z)[1])
    assert isinstance(what, Unrecognised), what.spec
    assert any(words in what.reason for words in ("no Gaussian in z either", "z that is none", "add of the reduced"))
    chain, plain = jf.FastLangevin(net, n_steps=5), jf.FastLangevin(lambda z: net(z), n_steps=5)
    far = 30 * Z
    torch.testing.assert_close(chain(far, noise_key=1), plain(far, noise_key=1), equal_nan=True)


GAUSSIANS = {
    "far mean": lambda z: -((z - 1000) ** 2).sum(1),
    "length over a width": lambda z: -((z.norm(dim=1) / 3.0) ** 2),
    "length times itself": lambda z: (lambda n: -(n * n))(z.norm(dim=1)),
    "length of what is shifted": lambda z: -(torch.linalg.norm(z - 2.0, dim=1) ** 2),
    "product of two": lambda z: -((z - 1) * (z + 2)).sum(1),
    "linear": lambda z: z.pow(1).sum(1),
}


@pytest.mark.parametrize("form", GAUSSIANS.values(), ids=GAUSSIANS)
def test_what_is_one_is_taken(form):
    net = Walled(form)
    assert "and a Gaussian in z" in jf.FastLangevin(net).explain(Z)
    value, grad = jf.energy_and_grad(net, 30 * Z)
    z = (30 * Z).requires_grad_()
    expected = net(z)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), z)[0], rtol=1e-4, atol=1e-2)


class Activated(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.activation = nn.Linear(DIM, 20), nn.Linear(20, 1), activation

    def forward(self, z):
        return self.b(self.activation(self.a(z))).squeeze(1)


# of which the first is silu, and the others are to a part in a billion billion, up to 20 or so
ACTIVATIONS = {
    "written out": (lambda x: x * torch.sigmoid(x), Probed),
    "with a wall": (lambda x: x * torch.sigmoid(x) - 1e-40 * torch.exp(x), Unrecognised),
    "with a fifth power": (lambda x: x * torch.sigmoid(x) + 1e-20 * x.pow(5), Unrecognised),
}


@pytest.mark.parametrize(("activation", "kind"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_written_out_are_compared_far_out(activation, kind):
    # twice an attribute, so that none of it stands in code that a structure is read of
    what = EnergySource(Activated(activation)).found(flatten_latents(Z)[1])
    assert isinstance(what, (kind, Recognised) if kind is Probed else kind), what
    if kind is Unrecognised:
        assert "far from 0" in what.reason


class Clipped(torch.autograd.Function):
    """The identity, with a gradient that is cut off where no test on random numbers comes to."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return torch.where(z.abs() > 50, 0.0, grad)


def test_a_gradient_that_is_another_far_out():
    class Energy(Walled):
        def forward(self, z):
            return self.net(Clipped.apply(z)).squeeze(1)

    net = Energy(None)
    chain, plain = jf.FastLangevin(net, n_steps=5), jf.FastLangevin(lambda z: net(z), n_steps=5)
    torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1))
    torch.testing.assert_close(chain(100 * Z, noise_key=1), plain(100 * Z, noise_key=1))
    assert isinstance(EnergySource(net).found(flatten_latents(Z)[1]), Unrecognised)


def test_verify_looks_far_out_too(monkeypatch):
    assert any(check.name == "far" for check in jf.verify(jf.EnergyMLP(4, 5, 1), show=False).checks)
    # as if nobody had looked when it was examined
    monkeypatch.setattr(agreeing, "_agrees_far_out", lambda *_: True)
    monkeypatch.setattr(following, "degree_of", lambda *_: 2)
    net = Walled(WALLS["softplus of the length"])
    assert "and a Gaussian in z" in jf.FastLangevin(net).explain(Z)
    certificate = jf.verify(net, Z, show=False)
    assert [check.name for check in certificate.checks if not check.passed] == ["far"] * len(
        [check for check in certificate.checks if check.name == "far"]
    )
    assert not certificate.passed
