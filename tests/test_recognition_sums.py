"""Energies that are a sum of networks, as of one per latent layer: recognised, and run side by side as one."""

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as new_spectral_norm

import jlebm_fast as jf

CHAINS, DIMS = 7, (2, 4)


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z = normal(CHAINS, sum(DIMS))
LAYERS = [Z[:, :2].contiguous(), Z[:, 2:].contiguous()]
CONTEXT = normal(CHAINS, 3, seed=5)


def net(inputs, hidden=(12, 9), activation=nn.GELU, out=1, bias=True, wrap=lambda layer: layer):
    layers = []
    for n_in, n_out in zip((inputs, *hidden), hidden, strict=False):
        layers += [wrap(nn.Linear(n_in, n_out, bias=bias)), activation()]
    return nn.Sequential(*layers, wrap(nn.Linear(hidden[-1], out, bias=bias))).double()


class Networks(nn.Module):
    """What `add` makes of several networks and z."""

    def __init__(self, add, *nets):
        super().__init__()
        self.add, self.nets = add, nn.ModuleList(nets)

    def forward(self, z):
        return self.add(self.nets, z)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.temperature = net(6), net(6, (3, 5)), 0.7

    def forward(self, z):
        return (self.first(z) - self.second(z)) / self.temperature


class Conditional(nn.Module):
    """f_1(z, c) + f_2(z): the condition enters one network of two."""

    def __init__(self):
        super().__init__()
        self.bound, self.free = net(9), net(6)

    def forward(self, z, context):
        return (self.bound(torch.cat([z, context], 1)) + self.free(z)).squeeze(1)


def per_layer(nets, zs):
    return [f(z) for f, z in zip(nets, zs, strict=True)]


def in_a_loop(nets, zs):
    total = 0
    for f, z in zip(nets, zs, strict=True):
        total = total + f(z)
    return total


def in_place(nets, zs):
    total = nets[0](zs[0])
    for f, z in zip(nets[1:], zs[1:], strict=True):
        total += f(z)
    return total.squeeze(1)


def one_per_layer():
    torch.manual_seed(4)
    return net(2), net(4, (5, 8))


SUMS = {
    "sum()": (lambda: Networks(lambda nets, zs: sum(per_layer(nets, zs)), *one_per_layer()), LAYERS),
    "in a loop": (lambda: Networks(in_a_loop, *one_per_layer()), LAYERS),
    "in place": (lambda: Networks(in_place, *one_per_layer()), LAYERS),
    "stacked": (lambda: Networks(lambda nets, zs: torch.stack(per_layer(nets, zs)).sum(0), *one_per_layer()), LAYERS),
    "joined": (lambda: Networks(lambda nets, zs: torch.cat(per_layer(nets, zs), 1).sum(1), *one_per_layer()), LAYERS),
    "mean": (lambda: Networks(lambda nets, zs: torch.hstack(per_layer(nets, zs)).mean(-1), *one_per_layer()), LAYERS),
    "minus, scaled": (Scaled, Z),
    "negative": (lambda: Networks(lambda nets, z: -nets[0](z) - nets[1](z), net(6), net(6)), Z),
    "one network twice": (lambda: Networks(lambda nets, z: nets[0](z[:, :3]) + nets[0](z[:, 3:]), net(3)), Z),
    "one value twice": (lambda: Networks(lambda nets, z: (lambda f: f + f)(nets[0](z)), net(6)), Z),
    "sum of sums": (
        lambda: Networks(lambda nets, z: 0.5 * (nets[0](z) + nets[1](z)) + nets[2](z), net(6), net(6), net(6)),
        Z,
    ),
    "no biases": (lambda: Networks(lambda nets, z: nets[0](z) + nets[1](z), net(6, bias=False), net(6, bias=False)), Z),
    "some biases": (lambda: Networks(lambda nets, z: nets[0](z) + nets[1](z), net(6, bias=False), net(6)), Z),
    "old norm": (lambda: Networks(lambda nets, z: nets[0](z) + nets[1](z), net(6, wrap=old_spectral_norm), net(6)), Z),
    "new norm": (lambda: Networks(lambda nets, z: nets[0](z) + nets[1](z), net(6), net(6, wrap=new_spectral_norm)), Z),
    "one hidden layer": (lambda: Networks(lambda nets, z: nets[0](z) + nets[1](z), net(6, (4,)), net(6, (3,))), Z),
}  # fmt: skip


def flat(z):
    return z if isinstance(z, torch.Tensor) else torch.cat(z, 1)


@pytest.mark.parametrize("case", SUMS)
@pytest.mark.parametrize("maximize", [True, False])
def test_it_is_one_fused_chain_with_the_values_of_autograd(case, maximize):
    make, z = SUMS[case]
    torch.manual_seed(2)
    energy = make()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(2)
        if "norm" in case:  # power iterations that have converged
            for _ in range(200):
                energy.train()(z)
    energy.eval()
    chain = jf.FastLangevin(energy, n_steps=20, step_size=0.3, maximize=maximize)
    assert "in one call" in chain.explain(z)
    assert "networks, side by side as 6 -> " in chain.explain(z)
    end = chain.sample(z, noise_key=3)
    expected = jf.FastLangevin(lambda z: energy(z), n_steps=20, step_size=0.3, maximize=maximize).sample(z, noise_key=3)
    torch.testing.assert_close(flat(end), flat(expected), rtol=1e-9, atol=1e-9)


def test_values_and_gradients_in_float32_and_a_certificate():
    energy = SUMS["sum()"][0]().float()
    zs = [z.float() for z in LAYERS]
    assert jf.verify(energy, zs).passed


def test_parameters_are_those_of_the_call_and_a_network_more_is_seen():
    nets = [net(6), net(6)]
    energy = Networks(lambda nets, z: sum(f(z) for f in nets), *nets)
    chain = jf.FastLangevin(energy, n_steps=5)
    reference = jf.FastLangevin(lambda z: energy(z), n_steps=5)
    chain.sample(Z, noise_key=1)
    torch.optim.SGD(energy.parameters(), lr=0.1).step()
    with torch.no_grad():
        nets[1][0].weight.add_(0.5)
    torch.testing.assert_close(chain.sample(Z, noise_key=1), reference.sample(Z, noise_key=1))
    energy.nets.append(net(6))
    assert "the sum of 3 networks" in chain.explain(Z)
    torch.testing.assert_close(chain.sample(Z, noise_key=1), reference.sample(Z, noise_key=1))


def test_the_condition_enters_one_network_of_two():
    energy = Conditional().double()
    chain = jf.FastLangevin(energy, n_steps=9)
    assert "the sum of 2 networks" in chain.explain(Z, context=CONTEXT)
    expected = jf.FastLangevin(lambda z: energy(z, CONTEXT), n_steps=9).sample(Z, noise_key=3)
    torch.testing.assert_close(chain.sample(Z, context=CONTEXT, noise_key=3), expected)


def test_in_a_compiled_graph():
    energy = SUMS["sum()"][0]().float()
    zs = [z.float() for z in LAYERS]
    chain = jf.FastLangevin(energy, n_steps=4)
    expected = chain.sample(zs, noise_key=8)  # recognised by this call
    compiled = torch.compile(lambda zs: chain.sample(zs, noise_key=8), fullgraph=True, backend="eager")
    for end, wanted in zip(compiled(zs), expected, strict=True):
        torch.testing.assert_close(end, wanted)


ELSE = {
    "another depth": (lambda nets, z: nets[0](z) + nets[1](z), (net(6), net(6, (4,))), "joins values of different l"),
    "other activations": (lambda nets, z: nets[0](z) + nets[1](z), (net(6), net(6, activation=nn.ReLU)), "activations"),
    "too wide": (lambda nets, z: nets[0](z) + nets[1](z), (net(6, (300, 4)), net(6, (300, 4))), "600 units"),
    "heads": (
        lambda nets, z: nets[0](z).logsumexp(1) + nets[1](z).logsumexp(1),
        (net(6, out=3), net(6, out=3)),
        "add of the reduced logits",
    ),
    "other chains": (
        lambda nets, z: nets[0](z) + nets[1](z)[[*range(1, len(z)), 0]],
        (net(6), net(6)),
        "does not reproduce",
    ),
    "residual": (lambda nets, z: nets[1](nets[0](z) + z), (net(6, out=6), net(6)), "joins values of different layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", ELSE)
def test_what_is_no_such_sum_is_named_and_run_by_autograd(case):
    add, nets, why = ELSE[case]
    energy = Networks(add, *nets)
    chain = jf.FastLangevin(energy, n_steps=3)
    assert why in chain.explain(Z), chain.explain(Z)
    expected = jf.FastLangevin(lambda z: energy(z), n_steps=3).sample(Z, noise_key=3)
    torch.testing.assert_close(chain.sample(Z, noise_key=3), expected)


AS_ONE = {
    "one of a stack": (lambda nets, z: torch.cat([f(z) for f in nets], 1)[:, 0], (net(6), net(6))),
    "part of a stack": (
        lambda nets, z: torch.cat([f(z) for f in nets], 1)[:, :2].sum(1), (net(6), net(6), net(6))
    ),
    "a constant": (lambda nets, z: nets[0](z) + 3.0, (net(6),)),
    "hidden": (lambda nets, z: nets[1](nets[0](z) + nets[0](z)), (net(6, out=6), net(6))),
    "networks and a parameter": (lambda nets, z: nets[0](z) - 2.5 * nets[1](z) + nets[1][0].bias[0], (net(6), net(6))),
}  # fmt: skip


@pytest.mark.parametrize("case", AS_ONE)
def test_sums_that_only_a_run_of_the_forward_reads(case):
    add, nets = AS_ONE[case]
    energy = Networks(add, *nets)
    chain = jf.FastLangevin(energy, n_steps=9)
    assert "by a run of its own forward" in chain.explain(Z), chain.explain(Z)
    expected = jf.FastLangevin(lambda z: energy(z), n_steps=9).sample(Z, noise_key=3)
    torch.testing.assert_close(chain.sample(Z, noise_key=3), expected)
