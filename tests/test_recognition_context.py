"""Other people's conditional energies, f(z, context): recognised where the condition enters beside z."""

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm

import jlebm_fast as jf
from jlebm_fast.recognition import EnergySource, _examined

CHAINS, DIMS, CONTEXT = 7, (2, 4), 3
DIM = sum(DIMS)


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z, C = normal(CHAINS, DIM), normal(CHAINS, CONTEXT, seed=5)
LAYERS = [Z[:, :2].contiguous(), Z[:, 2:].contiguous()]


def body(inputs=DIM + CONTEXT, wrap=lambda layer: layer):
    torch.manual_seed(4)
    return nn.Sequential(wrap(nn.Linear(inputs, 12)), nn.GELU(), wrap(nn.Linear(12, 9)), nn.Tanh(), nn.Linear(9, 1))


class Joined(nn.Module):
    """What `join` makes of z and the condition goes through an MLP."""

    def __init__(self, join, net=None):
        super().__init__()
        self.join, self.net = join, body() if net is None else net

    def forward(self, z, context):
        return self.net(self.join(z, context)).squeeze(1)


CONDITIONAL = {
    "after z": (lambda: Joined(lambda z, c: torch.cat([z, c], 1)), Z),
    "before z": (lambda: Joined(lambda z, c: torch.cat((c, z), dim=-1)), Z),
    "among layers": (lambda: Joined(lambda zs, c: torch.cat([zs[0], c, zs[1]], 1)), LAYERS),
    "in pieces": (lambda: Joined(lambda z, c: torch.cat([c[:, 2:], z, c[:, :2]], 1)), Z),
    "twice": (lambda: Joined(lambda z, c: torch.cat([c, z, c], 1), body(DIM + 2 * CONTEXT)), Z),
    "a part of it": (lambda: Joined(lambda z, c: torch.cat([z, c[:, 1:]], 1), body(DIM + CONTEXT - 1)), Z),
    "not at all": (lambda: Joined(lambda z, c: z, body(DIM)), Z),
    "optional": (lambda: Optional(), Z),
    "spectral norm": (
        lambda: Joined(lambda z, c: torch.cat([z, c], 1), body(wrap=lambda m: old_spectral_norm(m))).eval(),
        Z,
    ),
}


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.free, self.bound = body(DIM), body()

    def forward(self, z, context=None):
        return self.free(z) if context is None else self.bound(torch.cat([z, context], 1))


def as_layers(z):
    return z if isinstance(z, list) else [z]


@pytest.mark.parametrize(("make", "z"), CONDITIONAL.values(), ids=CONDITIONAL)
@pytest.mark.parametrize("maximize", [True, False])
def test_recognised_and_right(make, z, maximize):
    net = make()
    with torch.no_grad():
        for _ in range(50):  # an old norm's iterations converge
            net.train()(z, context=C)
    net.eval()
    sampler = jf.FastLangevin(net, n_steps=5, maximize=maximize)
    assert "not recognised" not in sampler.explain(z, context=C)
    plain = jf.FastLangevin(lambda z, context: net(z, context=context), n_steps=5, maximize=maximize)
    for c in (C, normal(CHAINS, CONTEXT, seed=6)):
        end, info = sampler.sample(z, context=c, noise_key=3, return_info=True)
        expected, told = plain.sample(z, context=c, noise_key=3, return_info=True)
        for a, b in zip((*as_layers(end), *info[:3]), (*as_layers(expected), *told[:3]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert jf.verify(sampler, z, context=C, show=False).passed


def test_each_step_of_an_optimiser_and_each_condition_counts():
    net = Joined(lambda z, c: torch.cat([z, c], 1))
    sampler, optimiser = jf.FastLangevin(net, n_steps=5), torch.optim.SGD(net.parameters(), lr=0.1)
    ends = []
    for seed in (1, 1, 2):
        ends.append(sampler(Z, context=normal(CHAINS, CONTEXT, seed=seed), noise_key=3))
        optimiser.zero_grad()
        net(Z, C).mean().backward()
        optimiser.step()
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])
    (entry,) = _examined[net].values()
    assert entry.times == 1


def test_with_and_without_a_condition_one_after_the_other():
    net = Optional()
    sampler = jf.FastLangevin(net, n_steps=5)
    for _ in range(2):
        for options in ({}, {"context": C}, {"context": C[:, :CONTEXT]}):
            plain = jf.FastLangevin(lambda z, context=None: net(z, context), n_steps=5)
            torch.testing.assert_close(
                sampler(Z, noise_key=3, **options), plain(Z, noise_key=3, **options), rtol=1e-4, atol=1e-5
            )
    assert len(_examined[net]) == 2


class Film(Joined):
    def forward(self, z, context):
        return self.net(torch.cat([z * context[:, :1], context], 1))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.Linear(CONTEXT, CONTEXT), body()

    def forward(self, z, context):
        return self.net(torch.cat([z, self.embed(context)], 1))


class Later(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(DIM, 9), nn.Linear(9 + CONTEXT, 1)

    def forward(self, z, context):
        return self.last(torch.cat([torch.tanh(self.first(z)), context], 1))


class Mixed(nn.Module):
    """Each chain sees its neighbour's condition."""

    def __init__(self):
        super().__init__()
        self.net = body()

    def forward(self, z, context):
        return self.net(torch.cat([z, torch.cat([context[1:], context[:1]])], 1))


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = body(DIM + 1)

    def forward(self, z, context):
        return self.net(torch.cat([z, context.to(z.dtype)], 1))


REFUSED = {
    "multiplied": (Film, C, "mul with a tensor, or of z itself"),
    "embedded": (lambda: Embedded(), C, "cat joins different things"),
    "in a later layer": (lambda: Later(), C, "cat joins different things"),
    "of another chain": (lambda: Mixed(), C, "a linear layer that mixes chains"),
    "whole numbers": (lambda: Counted(), torch.ones(CHAINS, 1, dtype=torch.int64), "a context can be fused if it is"),
    "in float64": (lambda: Counted(), normal(CHAINS, 1).double(), r"got \[7, 1\] float64 on cpu"),
    "one for all": (
        lambda: Joined(lambda z, c: torch.cat([z, c.expand(len(z), -1)], 1)),
        C[0],
        r"if it is \[7, context_dim\] float32 on cpu, got \[3\] float32",
    ),
}


@pytest.mark.parametrize(("make", "context", "reason"), REFUSED.values(), ids=REFUSED)
def test_everything_else_is_named_and_still_right(make, context, reason):
    net = make() if make is not Film else Film(None)
    sampler = jf.FastLangevin(net, n_steps=5)
    with pytest.raises(AssertionError, match=f"not recognised as an MLP: .*{reason}"):
        raise AssertionError(sampler.explain(Z, context=context))
    plain = jf.FastLangevin(lambda z, context: net(z, context), n_steps=5)
    ours = sampler(Z, context=context, noise_key=3)
    assert torch.equal(ours, plain(Z, context=context, noise_key=3))


def test_a_condition_does_not_reach_compiled_graphs_unseen():
    """What a graph may read of a module is what was recognised without one."""
    net = Optional()
    source = EnergySource(net)
    sampler = jf.FastLangevin(net, n_steps=5)
    sampler(Z, context=C)
    assert not sampler._source._known
    sampler(Z)
    (known,) = sampler._source._known
    assert known[-1][0].widths[0] == DIM
    assert not source._known
