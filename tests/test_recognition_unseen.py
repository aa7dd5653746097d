"""What a forward looks at and nobody watches: settings of objects, types of tensors, hooks, foreign random numbers.

Such a module is read by running it at every call, or runs through autograd; it is never taken for what it was.
"""

import argparse
import collections
import functools
import os
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition.blind_spots import blind_spot
from jlebm_fast.recognition.examining import Unrecognised
from jlebm_fast.recognition.probing import Probed
from jlebm_fast.recognition.recognised import Recognised

Z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class Setting:
    value = 1.0


class Slots:
    __slots__ = ("value",)


class Through:
    """A property over a global."""

    @property
    def value(self):
        return Setting.value


NESTED = argparse.Namespace(energy=argparse.Namespace(inner=argparse.Namespace(value=1.0)))
helpers = types.ModuleType("helpers")
exec("value = 1.0\ndef scaled(x):\n    return x * value", vars(helpers))


class Energy(nn.Module):
    """Its ELU has a parameter of 1.0, so that the number is known from elsewhere."""

    def __init__(self, **attributes):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ELU(), nn.Linear(12, 1))
        for name, value in attributes.items():
            setattr(self, name, value)


class OfAClass(Energy):
    def forward(self, z):
        return self.net(z) * Setting.value


class OfANestedNamespace(Energy):
    def forward(self, z):
        return self.net(z) / NESTED.energy.inner.value


class OfABranch(Energy):
    def forward(self, z):
        return -self.net(z) if Setting.value > 1 else self.net(z)


class OfAnActivation(Energy):
    def forward(self, z):
        return self.net[2](F.elu(self.net[0](z), Setting.value))


class OfAnEnvironment(Energy):
    def forward(self, z):
        return self.net(z) * float(os.environ.get("JLEBM_TEST_SETTING", "1.0"))


class OfAnImport(Energy):
    def forward(self, z):
        import os as system

        return self.net(z) * float(system.environ.get("JLEBM_TEST_SETTING", "1.0"))


class OfAModule(Energy):
    def forward(self, z):
        return helpers.scaled(self.net(z))


class OfAnAttribute(Energy):
    def forward(self, z):
        return self.net(z) * self.setting[0]


class OfAnObject(Energy):
    def forward(self, z):
        return self.net(z) * self.setting.value


class OfADefault(Energy):
    def forward(self, z, setting=[1.0]):  # noqa: B006
        return self.net(z) * setting[0]


class OfAHelper(Energy):
    def scale(self):
        return Setting.value

    def forward(self, z):
        return self.net(z) * self.scale()


class OfAName(Energy):
    def forward(self, z):
        return self.net(z) * getattr(self, "set" + "ting").value


def set_class(net):
    Setting.value = 3.0


def set_slots(net):
    net.setting.value = 3.0


def slots():
    found = Slots()
    found.value = 1.0
    return found


def set_first(net):
    net.setting[0] = 3.0


CASES = {
    "a class": (OfAClass, {}, set_class),
    "a nested namespace": (OfANestedNamespace, {}, lambda net: setattr(NESTED.energy.inner, "value", 3.0)),
    "a branch": (OfABranch, {}, set_class),
    "a parameter of an activation": (OfAnActivation, {}, set_class),
    "the environment": (OfAnEnvironment, {}, lambda net: os.environ.update(JLEBM_TEST_SETTING="3.0")),
    "an import": (OfAnImport, {}, lambda net: os.environ.update(JLEBM_TEST_SETTING="3.0")),
    "a module of Python": (OfAModule, {}, lambda net: setattr(helpers, "value", 3.0)),
    "numpy": (OfAnAttribute, {"setting": np.ones(1)}, set_first),
    "a deque": (OfAnAttribute, {"setting": collections.deque([1.0])}, set_first),
    "slots": (OfAnObject, {"setting": slots()}, set_slots),
    "a property": (OfAnObject, {"setting": Through()}, set_class),
    "a class among the attributes": (OfAnObject, {"setting": Setting}, set_class),
    "a default argument": (OfADefault, {}, lambda net: type(net).forward.__defaults__[0].__setitem__(0, 3.0)),
    "a helper": (OfAHelper, {}, set_class),
    "a name made up": (OfAName, {"setting": slots()}, set_slots),
    "a partial": (
        lambda **given: with_forward(functools.partial(lambda box, net, z: net(z) * box[0], given["box"])),
        {"box": [1.0]},
        lambda net: net.box.__setitem__(0, 3.0),
    ),
}


def with_forward(function):
    net = Energy(box=function.args[0])
    net.calculate = function
    net.forward = types.MethodType(lambda self, z: self.calculate(self.net, z), net)
    return net


@pytest.fixture(autouse=True)
def as_before():
    Setting.value = 1.0
    NESTED.energy.inner.value = 1.0
    helpers.value = 1.0
    os.environ.pop("JLEBM_TEST_SETTING", None)
    OfADefault.forward.__defaults__[0][0] = 1.0
    yield
    os.environ.pop("JLEBM_TEST_SETTING", None)


@pytest.mark.parametrize(("make", "attributes", "change"), CASES.values(), ids=CASES)
def test_a_setting_of_a_place_that_nobody_watches(make, attributes, change):
    net = make(**attributes)
    assert blind_spot(net) is not None
    chain, plain = jf.FastLangevin(net, n_steps=4), jf.FastLangevin(lambda z: net(z), n_steps=4)
    before = chain(Z, noise_key=1)
    torch.testing.assert_close(before, plain(Z, noise_key=1))
    change(net)
    torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1))
    torch.testing.assert_close(jf.energy_and_grad(net, Z)[0], net(Z)[:, 0].detach())
    assert not torch.allclose(chain(Z, noise_key=1), before, atol=1e-3)


class Options(Energy):
    """Everything that is watched."""

    kind = "elu"

    def __init__(self):
        super().__init__()
        self.args, self.table = argparse.Namespace(scale=1.0), {"scale": 1.0}
        self.unused, self.device = collections.deque([1.0]), torch.device("cpu")

    def forward(self, z):
        if self.kind not in ("elu",) or len(z) == 0:
            raise TypeError(type(z))
        h = F.elu(self.net[0](z), 1.0)
        return self.net[2](h).view(-1) * self.args.scale * self.table["scale"]

    def extra_repr(self):
        return str(self.unused)


def test_what_is_watched_is_no_blind_spot():
    assert blind_spot(Options()) is None
    assert isinstance(found(Options()), Recognised)
    for net in (nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 1)), jf.EnergyMLP(6, 4, 1)):
        assert blind_spot(net) is None


kind = object()  # a global of the name of an attribute that Options.forward looks at


def found(net):
    return EnergySource(net).found(flatten_latents(Z)[1])


def test_explain_says_what_is_looked_at():
    net = Energy(setting=np.ones(1))
    net.__class__ = OfAnAttribute
    assert isinstance(found(net), Probed)
    assert "because its code looks at attribute 'setting', a ndarray" in jf.FastLangevin(net).explain(Z)


def test_an_attribute_that_comes_to_stand_before_that_of_a_base():
    class Base(Energy):
        scale = 1.0

        def forward(self, z):
            return self.net(z) * self.scale

    class Derived(Base):
        pass

    net = Derived()
    chain = jf.FastLangevin(net, n_steps=4)
    chain(Z)
    Derived.scale = 0.3
    torch.testing.assert_close(chain(Z, noise_key=1), jf.FastLangevin(lambda z: net(z), n_steps=4)(Z, noise_key=1))


# --- what a float64 copy cannot show


class ByType(Energy):
    def forward(self, z):
        return self.net(z) * (1.0 if z.dtype == torch.float32 else 2.0)


class ByTypeAlone(Energy):
    def forward(self, z):
        return self.net(z) * 2.0 if z.element_size() == 8 else self.net(z)


@pytest.mark.parametrize("make", [ByType, ByTypeAlone])
def test_a_forward_that_looks_at_types(make):
    net = make()
    chain, plain = jf.FastLangevin(net, n_steps=4), jf.FastLangevin(lambda z: net(z), n_steps=4)
    assert isinstance(found(net), (Unrecognised, Probed))
    torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1))
    torch.testing.assert_close(jf.energy_and_grad(net, Z)[0], net(Z)[:, 0].detach())


# --- hooks of the backward


def scaled(module, grads):
    return (grads[0] * 0.1,)


@pytest.mark.parametrize("make", [lambda: jf.EnergyMLP(6, 12, 2), lambda: Options()], ids=["EnergyMLP", "module"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("kind", ["backward_pre_hook", "backward_hook"])
def test_hooks_of_the_backward_run(make, before, everywhere, kind):
    net = make()
    chain, plain = jf.FastLangevin(net, n_steps=4), jf.FastLangevin(lambda z: net(z), n_steps=4)
    if not before:
        chain(Z)
    if everywhere:
        hook = getattr(nn.modules.module, f"register_module_full_{kind}")(
            lambda m, g, *_: scaled(m, g) if m is net else None
        )
    else:
        hook = getattr(net, f"register_full_{kind}")(lambda m, g, *_: scaled(m, g))
    try:
        torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1))
        assert "a hook" in chain.explain(Z)
    finally:
        hook.remove()
    torch.testing.assert_close(chain(Z, noise_key=1), plain(Z, noise_key=1))


# --- random numbers that are not torch's


class Dropping(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 1)])

    def forward(self, z):
        h = torch.tanh(self.layers[0](z))
        if self.draw() < 0.1:
            h = torch.tanh(self.layers[1](h))
        return self.layers[2](h)


@pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["numpy", "Python"])
def test_a_forward_that_draws_elsewhere_is_named_and_the_generator_left_alone(draw):
    np.random.seed(0)
    random.seed(0)
    expected = draw()
    np.random.seed(0)
    random.seed(0)
    what = found(Dropping(draw))
    assert isinstance(what, Unrecognised)
    assert "draws from Python's or numpy's random generator" in what.reason or "another path" in what.reason
    assert draw() == expected
