"""Other people's conditional energies, f(z, context): recognised where the condition enters beside z."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.recognition.examining import _examined

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


class Later(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(DIM, 9), nn.Linear(9 + CONTEXT, 1)

    def forward(self, z, context):
        return self.last(torch.cat([torch.tanh(self.first(z)), context], 1))


REFUSED = {
    "multiplied": (lambda: Film(None), C, "mul with a condition, other than added or joined before the first activa"),
    "in a later layer": (lambda: Later(), C, "cat with a condition, other than added or joined before"),
    "of another number of chains": (lambda: Joined(lambda z, c: torch.cat([z, c], 1)), C[:5], "Sizes of tensors"),
}


@pytest.mark.parametrize(("make", "context", "reason"), REFUSED.values(), ids=REFUSED)
def test_everything_else_is_named_and_still_right(make, context, reason):
    net = make()
    sampler = jf.FastLangevin(net, n_steps=5)
    with pytest.raises(AssertionError, match=f"not recognised as an MLP: .*{reason}"):
        raise AssertionError(sampler.explain(Z, context=context))
    if len(context) != CHAINS:
        with pytest.raises(RuntimeError, match="Sizes of tensors"):
            sampler(Z, context=context)
        return
    plain = jf.FastLangevin(lambda z, context: net(z, context), n_steps=5)
    ours = sampler(Z, context=context, noise_key=3)
    assert torch.equal(ours, plain(Z, context=context, noise_key=3))


# --- conditions that enter the first layer in other ways: read by running the forward (probing.py)


class Conditioned(nn.Module):
    """f(z, c) by a function of (module, z, c), with layers to make something of c."""

    def __init__(self, written):
        super().__init__()
        torch.manual_seed(7)
        self.written, self.embed, self.table = written, nn.Linear(CONTEXT, CONTEXT), nn.Embedding(5, CONTEXT)
        self.net, self.beside, self.logits = body(), nn.Linear(CONTEXT, 12), nn.Linear(9, 4)

    def forward(self, z, context=None, y=None):
        return self.written(self, z, context if y is None else y)

    def hidden(self, z):
        return self.net[:4](z)


def sinusoids(t):
    return torch.cat([torch.sin(t[:, None] * 3.0 ** -torch.arange(2)), t[:, None].cos()], 1)


def behind(m, z, c):
    """The condition joins the pre-activation of the first layer."""
    first = F.linear(z, m.net[0].weight[:, :DIM], m.net[0].bias)
    return m.net[1:](first + m.beside(c))


Y = torch.tensor([0, 3, 1, 2, 3, 0, 1])
TIMES = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.3, 0.7])
ELSEWHERE = {
    "embedded": (lambda m, z, c: m.net(torch.cat([z, torch.tanh(m.embed(c))], 1)), {"context": C}),
    "beside the first layer": (behind, {"context": C}),
    "of the neighbour": (lambda m, z, c: m.net(torch.cat([z, torch.cat([c[1:], c[:1]])], 1)), {"context": C}),
    "times of the chains": (lambda m, z, t: m.net(torch.cat([z, sinusoids(t)], 1)), {"context": TIMES}),
    "one time for all": (
        lambda m, z, t: m.net(torch.cat([z, sinusoids(t).expand(len(z), -1)], 1)) * t, {"context": TIMES[:1]}
    ),
    "one condition for all": (
        lambda m, z, c: m.net(torch.cat([z, c.expand(len(z), -1)], 1)), {"context": C[0]}
    ),
    "steps as whole numbers": (lambda m, z, t: m.net(torch.cat([z, m.table(t)], 1)), {"context": Y}),
    "in float64": (lambda m, z, c: m.net(torch.cat([z, c.to(z.dtype)], 1)), {"context": C.double()}),
    "an embedded label": (lambda m, z, y: m.net(torch.cat([z, m.table(y)], 1)), {"y": Y}),
    "a label one-hot": (
        lambda m, z, y: m.net(torch.cat([z, F.one_hot(y, 4)[:, :CONTEXT].to(z.dtype)], 1)), {"y": Y}
    ),
    "one label": (lambda m, z, y: m.logits(m.hidden(torch.cat([z, z[:, :CONTEXT]], 1)))[:, y], {"y": 2}),
    "gathered logit": (
        lambda m, z, y: m.logits(m.hidden(torch.cat([z, z[:, :CONTEXT]], 1))).gather(1, y[:, None]), {"y": Y}
    ),
    "indexed logit, negative": (
        lambda m, z, y: -m.logits(m.hidden(torch.cat([z, z[:, :CONTEXT]], 1)))[torch.arange(len(z)), y], {"y": Y}
    ),
    "label and its logit": (
        lambda m, z, y: 2.0 * m.logits(m.hidden(torch.cat([z, m.table(y)], 1)))[range(len(z)), y], {"y": Y}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("written", "given"), ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("maximize", [True, False])
def test_conditions_that_enter_the_first_layer_in_any_way(written, given, maximize):
    net = Conditioned(written)
    sampler = jf.FastLangevin(net, n_steps=5, maximize=maximize)
    assert "not recognised" not in sampler.explain(Z, **given), sampler.explain(Z, **given)
    plain = jf.FastLangevin(lambda z, **given: net(z, **given), n_steps=5, maximize=maximize)
    others = {name: value.flip(0) * 1 if torch.is_tensor(value) else 3 for name, value in given.items()}
    for options in (given, others):
        end, info = sampler.sample(Z, noise_key=3, return_info=True, **options)
        expected, told = plain.sample(Z, noise_key=3, return_info=True, **options)
        for a, b in zip((end, *info[:3]), (expected, *told[:3]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if "context" in given or torch.is_tensor(given["y"]):
        assert jf.verify(sampler, Z, show=False, **given).passed
    assert sum(entry.times for entry in _examined[net].values()) == 1


def test_more_chains_and_one_chain_of_a_conditioned_net():
    net = Conditioned(ELSEWHERE["an embedded label"][0])
    sampler = jf.FastLangevin(net, n_steps=5)
    plain = jf.FastLangevin(lambda z, y: net(z, y=y), n_steps=5)
    for n in (1, 2, 40):
        z, y = normal(n, DIM), torch.arange(n) % 5
        torch.testing.assert_close(sampler(z, y=y, noise_key=1), plain(z, y=y, noise_key=1), rtol=1e-4, atol=1e-5)


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


def test_a_condition_of_another_name_is_refused_with_the_remedy():
    class Named(nn.Module):
        def forward(self, z, condition):
            return torch.cat([z, condition], 1).sum(1)

    for energy, arguments in (
        (Named(), r"\(z, condition\)"),
        (nn.Sequential(nn.Linear(DIM, 1)), r"\(input\)"),
        (lambda z, c: z.sum(1), r"\(z, c\)"),
        (Named().forward, r"\(z, condition\)"),
    ):
        with pytest.raises(ValueError, match=f"which .* does not take: its arguments are {arguments}; give a module"):
            jf.FastLangevin(energy, n_steps=1)(Z, context=C)
