"""Code exchanged in place, as IPython's autoreload does: the function is the same object, and runs something else."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition.examining import Recognised

Z = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
FLAG = 1.0


def act(x, slope=0.2, *, kind="leaky"):
    return F.leaky_relu(x, slope) if kind == "leaky" else torch.tanh(x)


def other_act(x, slope=0.2, *, kind="leaky"):
    return torch.tanh(x)


def in_a_list(x):
    return act(x)


def other_in_a_list(x):
    return torch.tanh(x)


class Energy(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def middle(self, x):
        return act(x)

    def forward(self, z):
        return self.b(self.middle(self.a(z)))


class Other(Energy):
    def middle(self, x):
        return torch.tanh(x)

    def forward(self, z):
        return -self.b(self.middle(self.a(z)))


class OfAList(Energy):
    def forward(self, z):
        return self.b(self.acts[0](self.a(z)))


class OfADefault(Energy):
    def forward(self, z, through=in_a_list):
        return self.b(through(self.a(z)))


class OfAClosure(Energy):
    def __init__(self):
        super().__init__()
        slope = 0.2

        def own(x):
            return F.leaky_relu(x, 0.2) if slope > 0.1 else torch.tanh(x)

        self.own = own

    def forward(self, z):
        return self.b(self.own(self.a(z)))


def exchange(function, other):
    function.__code__ = other.__code__


def closed(function):
    slope = 0.2

    def own(x):
        return torch.tanh(x) if slope > 0.1 else x

    exchange(function, own)


CHANGES = {
    "a function": (Energy, lambda net: exchange(act, other_act)),
    "a method": (Energy, lambda net: exchange(Energy.middle, Other.middle)),
    "the forward": (Energy, lambda net: exchange(Energy.forward, Other.forward)),
    "defaults": (Energy, lambda net: setattr(act, "__defaults__", (0.7,))),
    "defaults twice": (
        Energy,
        lambda net: [setattr(act, "__defaults__", (slope,)) for slope in (0.3, 0.7)],
    ),
    "defaults of keywords": (Energy, lambda net: setattr(act, "__kwdefaults__", {"kind": "tanh"})),
    "an entry of those": (Energy, lambda net: act.__kwdefaults__.update(kind="tanh")),
    "a function in a list": (lambda: OfAList(acts=[in_a_list]), lambda net: exchange(in_a_list, other_in_a_list)),
    "what one in a list calls": (lambda: OfAList(acts=[in_a_list]), lambda net: exchange(act, other_act)),
    "a function as a default": (OfADefault, lambda net: exchange(in_a_list, other_in_a_list)),
    "a function with a closure": (OfAClosure, lambda net: closed(net.own)),
}


@pytest.fixture(autouse=True)
def as_before():
    functions = (act, in_a_list, Energy.middle, Energy.forward, OfADefault.forward)
    kept = [(f, f.__code__, f.__defaults__, dict(f.__kwdefaults__ or {}) or None) for f in functions]
    yield
    for function, code, defaults, of_keywords in kept:
        function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, of_keywords


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_code_that_is_exchanged_is_seen(make, change):
    net = make()
    chain, plain = jf.FastLangevin(net, n_steps=4), jf.FastLangevin(lambda z: net(z), n_steps=4)
    before = chain(Z, noise_key=1)
    torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1))
    change(net)
    after = plain(Z, noise_key=1)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(chain(Z, noise_key=1), after, rtol=0, atol=1e-5)
    assert "autograd" not in chain.explain(Z)


def test_what_is_written_into_a_function_in_a_list_is_seen():
    """A global that only code in a list names."""
    namespace = {"torch": torch, "F": F, "FLAG": True}
    exec("def own(x):\n    return F.relu(x) if FLAG else torch.tanh(x)", namespace)
    net = OfAList(acts=[namespace["own"]])
    chain, plain = jf.FastLangevin(net, n_steps=4), jf.FastLangevin(lambda z: net(z), n_steps=4)
    chain(Z)
    namespace["FLAG"] = False
    torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1), rtol=0, atol=1e-5)


def test_functions_one_after_another():
    """Each may come to lie where one that is gone lay."""
    net = OfAList(acts=[act])
    chain, plain = jf.FastLangevin(net, n_steps=4), jf.FastLangevin(lambda z: net(z), n_steps=4)
    for number in range(6):
        code = (lambda x: F.relu(x)) if number % 2 else (lambda x: torch.tanh(x))
        net.acts[0] = None
        net.acts[0] = types.FunctionType(code.__code__, globals())
        torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1), rtol=0, atol=1e-5)


def test_code_that_a_forward_does_not_run_may_change():
    class Unused(Energy):
        def report(self):
            return 1

    net = Unused()
    chain = jf.FastLangevin(net, n_steps=4)
    chain(Z)
    exchange(Unused.report, (lambda self: 2))
    chain(Z)
    assert isinstance(EnergySource(net).found(flatten_latents(Z)[1]), Recognised)
    assert "examined" not in chain.explain(Z)
