"""What is remembered of a module: told by its objects at once, by their values after a look, and never kept alive."""

import dataclasses
import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn

import jlebm_fast as jf
from jlebm_fast.backends import _native
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition import examining
from jlebm_fast.recognition.examining import Recognised
from jlebm_fast.recognition.watching import Guards


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z = normal(6, 10)


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 1))


class Holding(nn.Module):
    """An MLP with attributes."""

    def __init__(self, **attributes):
        super().__init__()
        self.net = mlp()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z):
        return self.net(z)


class WithMethod(nn.Module):
    """Names itself among its attributes, in one of the ways that modules do."""

    def __init__(self, kept):
        super().__init__()
        self.net = mlp()
        self.kept = kept(self)

    def inner(self, z):
        return self.net(z)

    def forward(self, z):
        return self.inner(z)


def closure_of(module):
    return lambda z: module.inner(z)


def given_to_a_child(module):
    object.__setattr__(module.net[0], "parent", module)


WAYS_TO_NAME_ITSELF = {
    "method": lambda m: m.inner,
    "list of methods": lambda m: [m.inner],
    "dict by module": lambda m: {m.net: m.inner},
    "closure": closure_of,
    "partial": lambda m: functools.partial(WithMethod.inner, m),
    "object": lambda m: types.SimpleNamespace(owner=m),
    "child": given_to_a_child,
}


@pytest.mark.parametrize("kept", WAYS_TO_NAME_ITSELF.values(), ids=WAYS_TO_NAME_ITSELF)
def test_what_is_known_keeps_no_module_alive_that_names_itself(kept):
    module = WithMethod(kept)
    for _ in range(2):
        jf.FastLangevin(module, n_steps=1)(Z)
    assert isinstance(EnergySource(module).found(flatten_latents(Z)[1]), Recognised)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def old_norm(norm):
    return nn.Sequential(norm(nn.Linear(10, 14)), nn.LeakyReLU(0.2), norm(nn.Linear(14, 1)))


class Remembering(nn.Module):
    """Leaves tensors of its forward among its attributes."""

    def __init__(self):
        super().__init__()
        self.net, self.last, self.all = mlp(), None, []

    def forward(self, z):
        self.last = self.net(z)
        self.all = [z, self.last]
        return self.last


TRAINED = {
    "plain": mlp,
    "old-style spectral norm": lambda: old_norm(nn.utils.spectral_norm),
    "old-style weight norm": lambda: old_norm(nn.utils.weight_norm),
    "spectral norm": lambda: old_norm(nn.utils.parametrizations.spectral_norm),
    "a forward that remembers": Remembering,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_a_training_loop_is_examined_once(make, monkeypatch):
    """Each step runs the module's own forward, which may write attributes: the published loop of every such prior."""
    examined = []
    examine = examining.recognise
    monkeypatch.setattr(
        examining, "recognise", lambda *given, **options: examined.append(1) or examine(*given, **options)
    )
    torch.manual_seed(5)
    module = make()
    prior = jf.FastLangevin(module, n_steps=8, step_size=0.4)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    module(Z)  # what a forward leaves behind is there from now on
    for _ in range(4):
        z = prior(Z)
        optimizer.zero_grad()
        (module(z).mean() - module(Z).mean()).backward()
        optimizer.step()
    assert len(examined) == 1
    assert isinstance(EnergySource(module).found(flatten_latents(Z)[1]), Recognised)


class Counting(Holding):
    def forward(self, z):
        self.calls += 1
        return self.net(z)


def test_explain_says_what_had_a_module_examined_again():
    module = Counting(calls=0)
    prior = jf.FastLangevin(module, n_steps=1)
    assert "examined" not in prior.explain(Z)
    for _ in range(3):
        prior(Z)
        module(Z)
    assert "examined 4 times" in prior.explain(Z)
    assert "attribute 'calls' of the module itself had changed" in prior.explain(Z)
    module = Holding()
    prior = jf.FastLangevin(module, n_steps=1)
    prior(Z)
    module.net[1] = nn.Sigmoid()
    assert "child '1' of layer 'net' had changed" in prior.explain(Z)
    module.net[0].bias = None
    assert "parameter 'bias' of layer 'net.0' had changed" in prior.explain(Z)


@dataclasses.dataclass
class Shelf:
    book: object


def watched_module():
    """One whose attributes hold plain values in every way that is looked into."""
    shelf = Shelf({"a": [1, 2]})
    options = types.SimpleNamespace(lr=0.1, sizes=[10, 14], **{f"option_{i}": str(i) for i in range(70)})
    many = nn.ModuleList([nn.Identity() for _ in range(70)])
    numbers = nn.ParameterList([nn.Parameter(normal(1)) for _ in range(70)])
    return Holding(
        empty=nn.Sequential(),
        many=many,
        numbers=numbers,
        left=[1000, 2000],
        right={"x": 3000},
        shelf=shelf,
        args=options,
        pair=([5],),
    )


EXCHANGED = []


def exchange(children, i, child):
    EXCHANGED.append(children[i])  # it lives on elsewhere
    children[i] = child


# what is done to it, and whether its entries are then the same objects, and worth the same
CHANGED_ENTRIES = {
    "nothing": (lambda m: None, True, True),
    "another tensor of the same shape": (lambda m: m.net[0].weight.data.zero_(), True, True),
    "an equal number": (lambda m: m.left.__setitem__(0, int("1000")), False, True),
    "an equal list": (lambda m: setattr(m, "left", [int("1000"), int("2000")]), False, True),
    "a list of the same": (lambda m: setattr(m, "left", list(m.left)), True, True),
    "an equal object": (lambda m: setattr(m, "shelf", Shelf({"a": [1, 2]})), True, True),
    "an equal parameter": (lambda m: setattr(m.net[0], "bias", nn.Parameter(normal(14))), False, True),
    "a parameter of another shape": (lambda m: setattr(m.net[0].bias, "data", normal(15)), False, False),
    "a parameter shared": (lambda m: setattr(m.net[0], "weight", m.net[2].weight), False, False),
    "a hook": (lambda m: m.net[0].register_forward_hook(lambda *_: None), False, False),
    "another class": (lambda m: setattr(m.net[1], "__class__", nn.ReLU), False, False),
    "a number in a list": (lambda m: m.left.__setitem__(0, 1), False, False),
    "one more in a list": (lambda m: m.left.append(1), False, False),
    "one from list to dict": (lambda m: m.right.update(y=m.left.pop()), False, False),
    "a dict renamed": (lambda m: m.right.update(y=m.right.pop("x")), False, False),
    "deep in an object": (lambda m: m.shelf.book["a"].append(3), False, False),
    "an object's attribute": (lambda m: setattr(m.shelf, "other", 1), False, False),
    "a list in a tuple": (lambda m: m.pair[0].append(1), False, False),
    "the first option": (lambda m: setattr(m.args, "lr", 0.2), False, False),
    "a list of options": (lambda m: m.args.sizes.reverse(), False, False),
    "the seventieth option": (lambda m: setattr(m.args, "option_69", ""), False, False),
    "the mode of a child": (lambda m: m.net[1].eval(), False, False),
    "a child": (lambda m: m.net.__setitem__(1, nn.Tanh()), False, False),
    "the seventieth child": (lambda m: exchange(m.many, 69, nn.Identity()), False, False),
    "a child that was empty": (lambda m: m.empty.append(nn.Tanh()), False, False),
    "the seventieth parameter": (lambda m: m.numbers.__setitem__(69, nn.Parameter(normal(2))), False, False),
}


@pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the compiled module is missing")
@pytest.mark.parametrize(("change", "same", "equal"), CHANGED_ENTRIES.values(), ids=CHANGED_ENTRIES)
def test_same_objects_are_told_at_once_and_equal_ones_after_a_look(change, same, equal):
    module = watched_module()
    guards = Guards(module)
    assert guards.hold()
    change(module)
    assert guards.are_the_same() == same
    assert guards.are_equal() == equal
    assert (guards.change() is None) == equal
    assert guards.hold() == equal
    assert guards.are_the_same() == equal  # equal ones have taken the place of those that were


def test_without_the_compiled_module_entries_are_looked_at(monkeypatch):
    module = watched_module()
    guards = Guards(module)
    monkeypatch.setattr(_native, "unavailable_reason", lambda: "it is missing")
    assert guards.hold()
    module.left.append(1)
    assert not guards.hold()
