"""Forwards made to be misread: whatever they do, a chain is the one that autograd gives, and they stay as they were."""

import collections
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import jlebm_fast as jf

DIM = 8


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z = normal(12, DIM)


class Base(nn.Module):
    """f of three layers, as a function of (module, z, …) and numbers that change."""

    def __init__(self, written=None, **attributes):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(DIM, 20), nn.Linear(20, 20), nn.Linear(20, 1)
        self.t = nn.Parameter(torch.ones(()))
        self.written = written
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z, *args, **options):
        return self.written(self, z, *args, **options)

    def head(self, h):
        return self.c(h).squeeze(1)


def assert_right(net, z=Z, n_steps=5, **options):
    chain, plain = jf.FastLangevin(net, n_steps=n_steps), jf.FastLangevin(lambda z, **o: net(z, **o), n_steps=n_steps)
    ours, theirs = (one(z.clone(), noise_key=1, **options) for one in (chain, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for x, y in zip(
        jf.energy_and_grad(net, z.clone(), **options),
        jf.energy_and_grad(lambda z, **o: net(z, **o), z.clone(), **options),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k):
        ctx.k = k
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.k * g, None


def skipping(m, z):
    h = F.gelu(m.a(z))
    return m.head(F.gelu(m.b(h)) + (h if m.k else m.b.bias)) * m.t


def swish(m, z):
    a = m.a(z) * m.t
    return m.head(a * torch.sigmoid(m.k * a))


def view_written(m, z):
    a = m.a(z)
    v = a.view(a.shape)
    a += m.k
    return m.head(F.gelu(v)) * m.t


CHANGED = {
    "a skip beside a bias": (skipping, 0, 1),
    "a number inside an activation": (swish, 1.0, 2.0),
    "a number inside an error function": (
        lambda m, z: (lambda a: m.head(0.5 * a * (1 + torch.erf(m.k * a / 2**0.5))))(m.a(z) * m.t), 1.0, 2.0
    ),
    "a backward of its own": (lambda m, z: m.head(F.gelu(m.a(Scale.apply(z, m.k)))) * m.t, 1.0, 0.1),
    "a detached part": (lambda m, z: m.head(F.gelu(m.a(z) + m.k * m.a(z.detach()))) * m.t, 0.0, 1.0),
    "the mean over chains": (lambda m, z: m.head((lambda h: h - m.k * h.mean(0))(F.gelu(m.a(z)))) * m.t, 0.0, 1.0),
    "chains turned round": (lambda m, z: m.head((lambda h: h + m.k * h.flip(0))(F.gelu(m.a(z)))) * m.t, 0.0, 1.0),
    "chains shifted": (lambda m, z: m.head(F.gelu(m.a(z).roll(m.k, 0))) * m.t, 0, 1),
    "a view": (view_written, 0.0, 1.0),
    "rounding": (lambda m, z: m.head(F.gelu(torch.div(m.a(z), 0.3, rounding_mode=m.k))) * m.t, None, "floor"),
    "a slope of numpy": (
        lambda m, z: m.head(F.leaky_relu(m.a(z), m.k)) * m.t, np.float32(0.1), np.float32(0.9)
    ),
    "a large constant": (lambda m, z: m.head(F.relu(m.a(z))) * m.t + m.k, 0.0, 1e5),
    "data of the chains": (
        lambda m, z: m.head(F.gelu(m.a(z) + m.k)) * m.t, torch.zeros(1, 20), normal(12, 20, seed=4)
    ),
    "as many rows as units": (
        lambda m, z: m.head(F.gelu(m.a(z) + m.k[: len(z)])) * m.t, torch.zeros(21, 20), normal(21, 20, seed=4)
    ),
    "gradients switched": (
        lambda m, z: m.head(F.gelu(m.a(z) + (m.a(z) if m.k else m.a(z).detach()))) * m.t, 1, 0
    ),
}  # fmt: skip


@pytest.mark.parametrize(("written", "before", "after"), CHANGED.values(), ids=CHANGED)
def test_a_number_that_changes(written, before, after):
    net = Base(written, k=before)
    assert_right(net)
    net.k = after
    assert_right(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3)
    assert_right(net)
    net.k = before
    assert_right(net)


def one_hot(m, z, y):
    hot = torch.zeros(len(z), DIM, dtype=z.dtype)
    hot[torch.arange(len(z)), y] = 1.0
    return m.head(F.gelu(m.a(z * (1 + hot))))


def copied(m, z, context):
    g = torch.zeros(len(z), 20, dtype=z.dtype)
    g[:].copy_(context)
    return m.head(F.gelu(m.b(F.gelu(m.a(z))) + g))


SORTED = torch.arange(12) // 4
CONDITIONED = {
    "a one-hot of sorted labels": (one_hot, {"y": SORTED}, {"y": SORTED.flip(0)}),
    "the mean of a condition": (
        lambda m, z, context: m.head(F.gelu(m.a(z))) * context.mean().item(),
        {"context": torch.ones(12, 1)},
        {"context": torch.linspace(1, 3, 12)[:, None]},
    ),
    "a branch on a condition": (
        lambda m, z, context: m.head(F.gelu(m.a(z))) * (2.0 if (context > 2).any() else 1.0),
        {"context": torch.ones(12, 1)},
        {"context": torch.linspace(1, 3, 12)[:, None]},
    ),
    "a copy of a condition": (copied, {"context": torch.ones(12, 20)}, {"context": normal(12, 20, seed=6)}),
    "a label counted from the end": (
        lambda m, z, y: m.b(F.gelu(m.a(z)))[torch.arange(len(z)), y],
        {"y": torch.zeros(12, dtype=torch.int64)},
        {"y": torch.full((12,), -1)},
    ),
    "a number for a name": (
        lambda m, z, y: m.head(F.gelu(m.b(F.gelu(m.a(z))) + (m.b(F.gelu(m.a(z))) if y else m.b.bias))),
        {"y": 0},
        {"y": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("written", "first", "then"), CONDITIONED.values(), ids=CONDITIONED)
def test_conditions_that_escape(written, first, then):
    net = Base(written)
    for given in (first, then, first):
        assert_right(net, **given)


def written_into(how):
    def written(m, z):
        h = m.a(z)
        how(h)
        return m.head(F.gelu(h))

    return written


def items(h):
    h[h > 10] = 10.0


FAR = {
    "items": written_into(items),
    "a view": written_into(lambda h: h.view(-1).clamp_(-10, 10)),
    "a slice": written_into(lambda h: h[:, :5].clamp_(-10, 10)),
    "detached": written_into(lambda h: h.detach().clamp_(-10, 10)),
    "data": written_into(lambda h: h.data.clamp_(-10, 10)),
    "counted": lambda m, z: (lambda h: m.head(F.gelu(h)) * (1.0 + len(torch.nonzero(h.abs() > 10))))(m.a(z)),
    "masked": lambda m, z: (lambda h: m.head(F.gelu(h)) * (1.0 + h[h.abs() > 10].numel()))(m.a(z)),
    "contained": lambda m, z: (lambda h: m.head(F.gelu(h)) * (2.0 if True in (h > 10) else 1.0))(m.a(z)),
    "printed": lambda m, z: (lambda h: m.head(F.gelu(h)) * (2.0 if float(f"{h.max():.4f}") > 10 else 1.0))(m.a(z)),
}


def attempted(m, z):
    h = m.a(z)
    try:
        large = h.max().item() > 10
    except Exception:  # noqa: BLE001
        large = False
    return m.head(F.gelu(h)) * (2.0 if large else 1.0)


@pytest.mark.parametrize("written", [*FAR.values(), attempted], ids=[*FAR, "attempted"])
@pytest.mark.parametrize("by_a_run", [False, True])
def test_what_happens_far_away(written, by_a_run):
    net = Base((lambda m, z: written(m, z) * m.t) if by_a_run else written)
    assert_right(net)
    assert_right(net, 20 * Z)
    assert "not recognised" in jf.FastLangevin(net).explain(Z)


@pytest.mark.parametrize("how", [lambda z: z.detach().clamp_(-1, 1), lambda z: z.data.clamp_(-1, 1)])
def test_writes_into_z(how):
    def written(m, z):
        how(z)
        return m.head(F.gelu(m.a(z)))

    assert_right(Base(written), 3 * Z)


def test_other_code_for_many_chains():
    net = Base(lambda m, z: m.head(F.gelu(m.a(z)) if len(z) < 64 else F.relu(m.a(z))))
    for chains in (12, 100, 12):
        assert_right(net, normal(chains, DIM))


def test_modules_that_say_they_are_equal():
    class Equal(Base):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 1

    first, second = (Equal(lambda m, z: m.head(F.gelu(m.a(z)))) for _ in range(2))
    with torch.no_grad():
        second.a.weight.mul_(2)
    assert_right(first)
    assert_right(second)


@pytest.mark.parametrize("by_a_run", [False, True])
def test_a_kink_within_rounding_is_no_disagreement(by_a_run):
    net = Base(lambda m, z: m.head(F.relu(m.a(z))) * (m.t if by_a_run else 1.0))
    exact = net.a.weight.detach().double()
    z = Z.clone().double()
    with torch.no_grad():  # the first unit's pre-activation is zero but for rounding, in all chains
        z -= (z @ exact[0] + net.a.bias[0].double())[:, None] * exact[0] / exact[0].square().sum()
    chain = jf.FastLangevin(net, n_steps=5)
    chain(z.float())
    assert "in one call" in chain.explain(z.float())


# --- what a call leaves behind


@pytest.mark.parametrize("change", [False, True])
def test_what_a_forward_sets_up_it_takes_down(change):
    def written(m, z, context):
        was, m.depth = m.training, m.depth + 1
        m.requires_grad_(False)
        m.eval()
        f = m.head((torch.tanh if m.k else F.gelu)(m.a(z) + context))
        m.train(was)
        m.requires_grad_(True)
        m.depth -= 1
        return f

    net = Base(written, depth=0, k=0)
    sampler = jf.FastLangevin(net, n_steps=5)
    sampler(Z, context=normal(12, 20))
    net.k = int(change)
    sampler(Z, context=normal(12, 20))
    assert net.training
    assert net.depth == 0
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_inside_a_cache_of_parametrisations(norm):
    net = nn.Sequential(norm(nn.Linear(DIM, 20)), nn.GELU(), nn.Linear(20, 1), nn.Flatten(0))
    sampler = jf.FastLangevin(net, n_steps=3)
    for _ in range(2):
        with parametrize.cached():
            net(sampler(Z)).sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        net.zero_grad()
        sampler(Z)


# --- what must not raise


class Peculiar(Exception):
    pass


def raising(m, z):
    if z.dtype != torch.float32:
        raise Peculiar
    return m.head(F.gelu(m.a(z)))


def in_bfloat16(m, z):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = m.head(F.gelu(m.a(z)))
    return f.float() * m.t


UNUSUAL = {
    "an exception of its own": raising,
    "autocast inside": in_bfloat16,
    "float64 between": lambda m, z: m.head(F.gelu(m.a(z) / torch.ones(20, dtype=torch.float64)).float()) * m.t,
    "attributes of a buffer": lambda m, z: m.head(F.gelu(m.a(z) + m.mark.shift * m.mark)) * m.t,
}


@pytest.mark.parametrize("written", UNUSUAL.values(), ids=UNUSUAL)
def test_what_runs_by_itself_runs_here(written):
    net = Base(written)
    net.register_buffer("mark", torch.ones(20))
    net.mark.shift = 0.5
    plain = jf.FastLangevin(lambda z: net(z), n_steps=5)(Z, noise_key=1)
    torch.testing.assert_close(jf.FastLangevin(net, n_steps=5)(Z, noise_key=1), plain, rtol=1e-3, atol=1e-3)


def test_a_first_parameter_of_whole_numbers():
    class Stepped(Base):
        def __init__(self):
            super().__init__(lambda m, z: m.head(F.gelu(m.a(z))) * m.t)
            layers = dict(self._parameters)
            self._parameters.clear()
            self.step = nn.Parameter(torch.tensor(3), requires_grad=False)
            self._parameters.update(layers)

    assert_right(Stepped())


def test_two_modules_that_wait_for_each_other():
    # in a deque, whose entries are watched by nobody: a barrier counts those who wait
    meeting = collections.deque([threading.Barrier(2, timeout=20)])

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(DIM, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 1))
            self.register_buffer("one", torch.ones(()))
            self.meets = collections.deque()

        def forward(self, z):
            if self.meets:
                meeting[0].wait()
            return self.net(z).squeeze(1) * self.one

    nets = [Meeting(), Meeting()]
    samplers = [jf.FastLangevin(net, n_steps=3) for net in nets]
    for net, sampler in zip(nets, samplers, strict=True):
        sampler(Z)  # examined
        net.meets.append(True)
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda sampler: sampler(Z), samplers))
    assert all(end.shape == Z.shape for end in ends)
