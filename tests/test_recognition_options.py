"""Options with a `__getattr__` of their own, as attributes and as globals: never asked for what their class has not."""

import copy

import pytest
import torch
from torch import nn

import jlebm_fast as jf
from jlebm_fast.recognition.twins import copy_of


class Strict(dict):
    """Raises KeyError for what it does not have."""

    __getattr__ = dict.__getitem__


class Auto(dict):
    """Makes what it does not have."""

    def __getattr__(self, name):
        return self.setdefault(name, Auto())


class Remote:
    """Asks somebody who is not there."""

    def __init__(self, **entries):
        self.entries = entries

    def __getattr__(self, name):
        raise RuntimeError(f"not connected: {name}")


class Slotted:
    __slots__ = ("hidden", "unset")

    def __init__(self, hidden):
        self.hidden = hidden

    def __getattr__(self, name):
        raise RuntimeError(f"not here: {name}")


class Listed(list):
    def __getattr__(self, name):
        raise LookupError(name)


class StandsFor:
    """Of somebody's who is not there."""

    __slots__ = ()

    @property
    def __class__(self):
        raise RuntimeError("working outside of a context")

    def __getattr__(self, name):
        raise RuntimeError("working outside of a context")


ASKED = []


class Guarded:
    """Remembers what it is asked for."""

    def __init__(self):
        self.entries = [1, 2]

    def __getattribute__(self, name):
        ASKED.append(name)
        return object.__getattribute__(self, name)


OPTIONS = {
    "strict": lambda: Strict(hidden=12, scale=2.0),
    "auto": lambda: Auto(hidden=12),
    "remote": lambda: Remote(hidden=12),
    "slotted": lambda: Slotted(12),
    "listed": lambda: Listed([1, 2]),
    "nested": lambda: {"a": [Strict(b=Auto(c=Remote(d=Slotted(3))))]},
}
Z = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
GLOBAL = None


class Energy(nn.Module):
    def __init__(self, options=None):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.cfg = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 1)), options

    def forward(self, z):
        return self.net(z)


class Looking(Energy):
    def forward(self, z):
        return self.net(z) * (1.0 if self.cfg is None else 2.0)


class LookingOutside(Energy):
    def forward(self, z):
        return self.net(z) * (1.0 if GLOBAL is None else 2.0)


def close(net):
    chain, plain = jf.FastLangevin(net, n_steps=10), jf.FastLangevin(lambda z: net(z), n_steps=10)
    for _ in range(2):
        torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1), rtol=0, atol=1e-5)
    assert "autograd" not in chain.explain(Z)
    assert jf.verify(net, Z, show=False).passed


@pytest.mark.parametrize("kind", [Energy, Looking])
@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_as_an_attribute(kind, make):
    options = make()
    before = repr(options) if isinstance(options, (dict, list)) else None
    close(kind(options))
    assert before is None or repr(options) == before  # and no entry '__func__' or '__deepcopy__'


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_as_a_global(make, monkeypatch):
    options = make()
    before = repr(options) if isinstance(options, (dict, list)) else None
    monkeypatch.setitem(globals(), "GLOBAL", options)
    close(LookingOutside())
    assert before is None or repr(options) == before


def test_an_entry_that_changes_is_seen():
    class Scaled(Energy):
        def forward(self, z):
            return self.net(z) * self.cfg.scale

    net = Scaled(Strict(scale=2.0))
    close(net)
    net.cfg["scale"] = 0.5
    close(net)


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_a_copy_is_examined_with_copies(make):
    net = Energy(make())
    twin = copy_of(net)
    assert twin.cfg is not net.cfg
    assert type(twin.cfg) is type(net.cfg)
    assert not isinstance(net.cfg, (dict, list)) or twin.cfg == net.cfg or isinstance(twin.cfg["a"][0], Strict)
    assert not isinstance(net.cfg, Remote) or twin.cfg.entries == net.cfg.entries
    assert not isinstance(net.cfg, Slotted) or twin.cfg.hidden == net.cfg.hidden


def test_nothing_is_asked_of_what_only_lies_there():
    for options in (Guarded(), [Guarded()]):
        net = Energy(options)
        chain = jf.FastLangevin(net, n_steps=2)
        chain(Z)
        chain(Z)
        assert not {"__func__", "fget"} & set(ASKED)
        ASKED.clear()
        chain(Z)
        assert not ASKED
        assert "autograd" not in chain.explain(Z)


def test_one_that_stands_for_another(monkeypatch):
    monkeypatch.setitem(globals(), "GLOBAL", StandsFor())
    close(LookingOutside())


def test_copies_are_copies():
    """Also where a class says itself how it is copied."""

    class Saying(Strict):
        def __deepcopy__(self, memo):
            return Saying({key: copy.deepcopy(value, memo) for key, value in self.items()})

    close(Looking(Saying(hidden=[1, 2])))
