"""Whatever changes about a recognised module after the first call is seen, or the module was never trusted."""

import dataclasses
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import published_loop
from torch import nn

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition.examining import Recognised
from jlebm_fast.recognition.probing import Probed

OUTSIDE = {"scale": 1.0}


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z, NOISE = normal(6, 10), normal(8, 6, 10, seed=32)


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 1))


class Scaled(nn.Module):
    """f scaled by what `scale` finds, each in its own way."""

    def __init__(self, scale, **attributes):
        super().__init__()
        self.net, self.scale = mlp(), scale
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z):
        return self.net(z) * self.scale(self)


@dataclasses.dataclass
class Options:
    beta: float = 1.0


def with_buffer(scale):
    module = Scaled(scale)
    module.register_buffer("beta", torch.ones(()))
    return module


class Act(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.act = nn.Linear(10, 14), nn.Linear(14, 1), F.relu

    def forward(self, z):
        return self.b(self.act(self.a(z)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 1)
        self.b.weight = self.a.weight

    def forward(self, z):
        return self.c(torch.relu(self.b(torch.relu(self.a(z)))))


class Clamped(nn.Module):
    """A hook on a gradient that does nothing as long as the weights are small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(10, 14), nn.Linear(14, 1)

    def forward(self, z):
        h = self.a(z)
        h.register_hook(lambda g: g.clamp(-5, 5))
        return self.b(torch.tanh(h))


class Ordered(nn.Module):
    """f of z in another order, which `order` finds in its own way."""

    def __init__(self, order, index):
        super().__init__()
        self.net, self.order, self.index = mlp(), order, index

    def forward(self, z):
        return self.net(self.order(z, self.index))


def by_index(z, index):
    return z[:, index]


def rolled(z, n):
    return torch.cat([z[:, n:], z[:, :n]], 1)


def long_index(z, index):
    return torch.cat([z] * 10, 1)[:, index][:, 60:70]


def hooked(scale):
    net = mlp()
    net.register_forward_hook(lambda module, inputs, output: output * scale["by"])
    return net


def patched(scale, net=None):
    net = mlp() if net is None else net
    net.forward = types.MethodType(lambda self, z: nn.Sequential.forward(self, z) * scale, net)
    return net


def outer_scale():
    return GLOBAL


GLOBAL = 1.0


def with_global(scale):
    globals()["GLOBAL"] = 1.0
    return Scaled(scale, known=1.0)


class OfItsClass(Scaled):
    beta = 1.0

    def factor(self):
        return self.beta


def with_class(scale, *, beta=1.0, factor=OfItsClass.factor):
    OfItsClass.beta, OfItsClass.factor = beta, factor
    return OfItsClass(scale, known=1.0)


class Closure:
    """A variable of a function that a module's code sees."""

    def module(self):
        scale = 1.0

        def change(value):
            nonlocal scale
            scale = value

        self.change = change
        return Scaled(lambda m: scale, known=1.0)


CLOSURE = Closure()
HOOK = {"by": 1.0}
CHANGES = {
    "item of a buffer": (lambda: with_buffer(lambda m: m.beta.item()), lambda m: m.beta.fill_(5.0)),
    "float of a buffer": (lambda: with_buffer(lambda m: float(m.beta)), lambda m: m.beta.fill_(5.0)),
    "a float": (lambda: Scaled(lambda m: m.beta, beta=1.5), lambda m: setattr(m, "beta", 5.0)),
    "a dataclass": (lambda: Scaled(lambda m: m.o.beta, o=Options()), lambda m: setattr(m.o, "beta", 5.0)),
    "a list": (lambda: Scaled(lambda m: m.betas[0], betas=[1.0]), lambda m: m.betas.__setitem__(0, 5.0)),
    "a global": (lambda: Scaled(lambda m: OUTSIDE["scale"]), lambda m: OUTSIDE.update(scale=5.0)),
    "a function": (Act, lambda m: setattr(m, "act", torch.tanh)),
    "a tie": (Tied, lambda m: setattr(m.b, "weight", nn.Parameter(normal(10, 10)))),
    "a gradient hook": (Clamped, lambda m: m.b.weight.data.mul_(300)),
    "a forward hook": (lambda: hooked(HOOK), lambda m: HOOK.update(by=5.0)),
    # 1.0 is an attribute as well: as a number its origin seems known
    "a global like an attribute": (lambda: with_global(lambda m: GLOBAL), lambda m: globals().update(GLOBAL=5.0)),
    "a global of a helper": (lambda: with_global(lambda m: outer_scale()), lambda m: globals().update(GLOBAL=5.0)),
    "an attribute of the class": (lambda: with_class(lambda m: m.beta), lambda m: setattr(type(m), "beta", 5.0)),
    "a method": (lambda: with_class(lambda m: m.factor()), lambda m: setattr(type(m), "factor", lambda self: 5.0)),
    "a closure": (CLOSURE.module, lambda m: CLOSURE.change(5.0)),
    "a tensor": (lambda: Scaled(lambda m: m.beta, beta=torch.ones(())), lambda m: setattr(m, "beta", 5 * m.beta)),
    "a tensor for a number": (
        lambda: Scaled(lambda m: m.beta, beta=1.5),
        lambda m: setattr(m, "beta", 5 * torch.ones(())),
    ),
    "an index": (lambda: Ordered(by_index, list(range(9, -1, -1))), lambda m: m.index.sort()),
    "an index in a tensor": (lambda: Ordered(by_index, torch.arange(10)), lambda m: m.index.copy_(m.index.flip(0))),
    "an index in an array": (lambda: Ordered(by_index, np.arange(10)), lambda m: m.index.__setitem__(0, 5)),
    "a tensor of rows": (
        lambda: Ordered(lambda z, t: z.index_select(1, t), torch.arange(10)),
        lambda m: m.index.copy_(m.index.flip(0)),
    ),
    "the end of a slice": (lambda: Ordered(rolled, 2), lambda m: setattr(m, "index", 5)),
    "the end of a slice in a tensor": (lambda: Ordered(rolled, torch.tensor(2)), lambda m: m.index.fill_(5)),
    "the end of a long index": (
        lambda: Ordered(long_index, [*range(60), *range(10)]),
        lambda m: m.index.__setitem__(69, 60),
    ),
    "a weight that is no parameter": (
        lambda: Scaled(lambda m: F.linear(torch.ones(1), m.w), w=torch.ones(1, 1)),
        lambda m: setattr(m, "w", torch.full((1, 1), 5.0)),
    ),
    "a second forward": (lambda: patched(1.5), lambda m: patched(5.0, m)),
}
WATCHED = (
    "a float", "a dataclass", "a list", "a function", "a tie", "a global like an attribute", "a global of a helper",
    "an attribute of the class", "a method", "a closure", "a tensor for a number",
    "an index", "the end of a slice",
)  # fmt: skip


def assert_right(prior, module):
    got = prior.sample(Z, noise=NOISE)
    expected = published_loop(module.double(), Z.double(), 0.4, NOISE.double())
    module.float()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what):
    make, change = CHANGES[what]
    module = make()
    prior = jf.FastLangevin(module, n_steps=8, step_size=0.4)
    assert_right(prior, module)
    found = EnergySource(module).found(flatten_latents(Z)[1])
    assert isinstance(found, Recognised) == (what in WATCHED), found
    change(module)
    assert_right(prior, module)


@pytest.mark.parametrize("make", [mlp, lambda: jf.EnergyMLP(10, 14, 1, activation="tanh")], ids=["mlp", "EnergyMLP"])
def test_a_hook_of_all_modules_runs(make):
    module = make()
    prior = jf.FastLangevin(module, n_steps=8, step_size=0.4)
    assert_right(prior, module)
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, output: 5 * output if m is module else None)
    try:
        assert_right(prior, module)
        assert "every module" in prior.explain(Z)
    finally:
        hook.remove()
    assert_right(prior, module)


def test_numbers_of_other_origin_are_read_at_every_call():
    OUTSIDE["scale"] = 1.0
    module = Scaled(lambda m: OUTSIDE["scale"])
    assert isinstance(EnergySource(module).found(flatten_latents(Z)[1]), Probed)
    prior = jf.FastLangevin(module, n_steps=8, step_size=0.4)
    for scale in (1.0, -2.0, 0.5):
        OUTSIDE["scale"] = scale
        assert_right(prior, module)
    assert "examined" not in prior.explain(Z)


def test_examining_in_one_thread_leaves_the_noise_of_another_alone():
    inside, go_on = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, z):
            if z.dtype == torch.float64:
                inside.set()
                go_on.wait(10)
            return self.net(z)

    other = jf.FastLangevin(jf.EnergyMLP(10, 8, 2), n_steps=2)
    thread = threading.Thread(target=lambda: jf.FastLangevin(Slow(), n_steps=1)(Z))
    thread.start()
    inside.wait(10)
    first = other(Z)
    go_on.set()
    thread.join()
    assert not torch.equal(first, other(Z))


class Negative(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(4)
        self.f = jf.EnergyMLP(10, 14, 2, spectral_norm=norm)

    def forward(self, z):
        return -self.f(z)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [False, True, (True, False, True)])
def test_what_wraps_an_energy_mlp_is_looked_through(norm, training):
    module = Negative(norm).train(training)
    prior = jf.FastLangevin(module, n_steps=8, step_size=0.4)
    for _ in range(2):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        assert isinstance(EnergySource(module).found(flatten_latents(Z)[1]), Recognised)
        prior(Z)
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
        assert_right(prior, module)  # the module's own forward writes them in training
        with torch.no_grad():  # what it is made of is read at every call
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn_like(parameter)


def test_a_weight_of_an_energy_mlp_that_is_divided_by_something_else_is_not_taken_for_its_norm():
    class Halved(Negative):
        def forward(self, z):
            for i, layer in enumerate(self.f.layers):
                z = nn.functional.linear(z, layer.weight / torch.tensor(2.0), layer.bias)
                z = nn.functional.leaky_relu(z, 0.2) if i < 2 else z
            return z

    module = Halved(True)
    assert isinstance(EnergySource(module).found(flatten_latents(Z)[1]), Probed)
    assert_right(jf.FastLangevin(module, n_steps=8, step_size=0.4), module.eval())


def test_modules_that_cannot_be_watched_run_through_autograd():
    scripted = torch.jit.trace(mlp(), Z)
    lazy = nn.Sequential(nn.LazyLinear(14), nn.Tanh(), nn.LazyLinear(1))
    for module, reason in ((scripted, "scripted or traced"), (lazy, "call it once")):
        found = EnergySource(module).found(flatten_latents(Z)[1])
        assert reason in found.reason
        assert jf.FastLangevin(module, n_steps=2)(Z).shape == Z.shape
    assert isinstance(EnergySource(lazy).found(flatten_latents(Z)[1]), Recognised)


def test_a_context_made_in_inference_mode():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.c = mlp(), nn.Linear(3, 10)

        def forward(self, z, context):
            return self.net(z * self.c(context))

    prior = jf.FastLangevin(Conditional(), n_steps=2)
    with torch.inference_mode():
        assert prior(Z, context=normal(6, 3)).shape == Z.shape
