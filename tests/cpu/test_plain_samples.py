"""FastLangevin's usual calls, which give latents to the kernel as they are: with the bits, structure and draws of all
others; and the calls that are left to the general way, with its results and its words."""

import numpy as np
import pytest
import torch
from reference import plain_update
from torch import nn

import jlebm_fast as jf
from jlebm_fast import sampler as sampler_module
from jlebm_fast.backends import _native, cpu_plain
from jlebm_fast.problem import ChainResult

pytestmark = [
    pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason())),
    pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10"),
]
DIMS, CHAINS = (2, 1, 3), 21
DIM = sum(DIMS)


def normal(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def energy(**options):
    torch.manual_seed(0)
    return jf.EnergyMLP(DIMS, 9, 2, **options)


class JointEnergy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(DIM, 7), nn.GELU(), nn.Linear(7, 1))

    def forward(self, zs):
        return self.net(torch.cat(zs, 1)).squeeze(1)


def layers():
    return [normal(CHAINS, d, seed=d) for d in DIMS]


def flat(result):
    """All tensors of a result."""
    if result is None or isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def general(monkeypatch):
    monkeypatch.setattr(jf.FastLangevin, "_sample_plain", lambda *arguments: (None, None))


def outcome(sampler, z, options):
    """Results, or the error's words, and what is drawn next from the generators."""
    torch.manual_seed(3)
    generator = options.get("generator")
    generator = generator.manual_seed(8) if isinstance(generator, torch.Generator) else None
    try:
        result = sampler.sample(z, **options)
    except (ValueError, TypeError) as error:
        result = f"{type(error).__name__}: {error}"
    return result, torch.rand(1), None if generator is None else torch.rand(1, generator=generator)


def assert_same(found, expected):
    assert type(found[0]) is type(expected[0])
    if isinstance(found[0], str):
        assert found == expected
        return
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)
            assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (b.shape, b.dtype, b.stride(), False)
            assert type(a) is torch.Tensor
            assert not a.is_inference()


# energy, what its sampler is told, z
CALLS = {
    "list": (energy, {}, layers),
    "tuple": (energy, {}, lambda: tuple(layers())),
    "tensor": (energy, {}, lambda: normal(CHAINS, DIM)),
    "image-shaped tensor": (energy, {}, lambda: normal(CHAINS, DIM, 1, 1)),
    "parameters": (energy, {}, lambda: [nn.Parameter(layer) for layer in layers()]),
    "a layer twice": (lambda: jf.EnergyMLP((3, 3), 9, 2), {}, lambda: [normal(CHAINS, 3)] * 2),
    "no chain": (energy, {}, lambda: [torch.empty(0, d) for d in DIMS]),
    "one chain": (energy, {}, lambda: [torch.ones(1, d) for d in DIMS]),
    "energies": (energy, {"maximize": False}, layers),
    "no prior": (energy, {"prior": None}, layers),
    "prior and schedule": (
        energy,
        {"prior": jf.GaussianPrior(0.5, 2.0), "step_size": [0.1, 0.2, 0.3, 0.2, 0.1], "noise_scale": 0.5},
        layers,
    ),
    "named backend": (energy, {"backend": "cpu"}, layers),
    "spectral norm": (lambda: energy(spectral_norm=True), {}, layers),
    "logits": (lambda: energy(out_features=4, head="logsumexp"), {}, layers),
    "recognised module": (JointEnergy, {}, layers),
    "recognised module, energies": (JointEnergy, {"maximize": False}, layers),
    "no step": (energy, {"n_steps": 0}, layers),
}
OPTIONS = {
    "plain": {},
    "info": {"return_info": True},
    "trajectory": {"return_trajectory": True, "thin": 2},
    "both, thinned": {"return_info": True, "return_trajectory": True, "thin": np.int64(3)},
    "key": {"noise_key": 2**64 - 3},
    "key as a tensor": {"noise_key": torch.tensor([-3])},
    "place": {"first_step": np.int32(7), "first_chain": 2**32 - 4},
    "generator": {"generator": torch.Generator()},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_usual_calls_are_the_general_ones(call, monkeypatch):
    make, arguments, latents = call
    sampler = jf.FastLangevin(make(), **{"n_steps": 5} | arguments)
    z = latents()
    before = [layer.clone() for layer in flat(z)]
    outcome(sampler, z, {})  # the first call of a sampler is a general one
    found = [outcome(sampler, z, options) for options in OPTIONS.values()]
    assert all(torch.equal(a, b) for a, b in zip(flat(z), before, strict=True))
    general(monkeypatch)
    for one, options in zip(found, OPTIONS.values(), strict=True):
        assert_same(one, outcome(sampler, z, options))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_usual_calls_do_not_take_the_general_way(call, monkeypatch):
    make, arguments, latents = call
    sampler = jf.FastLangevin(make(), **{"n_steps": 5} | arguments)
    sampler(latents())

    def never(*arguments):
        raise AssertionError("the general way")

    monkeypatch.setattr(sampler_module, "flatten_latents", never)
    for options in OPTIONS.values():
        outcome(sampler, latents(), options)
    with torch.inference_mode():
        assert not flat(sampler(latents()))[0].is_inference()
    with torch.autocast("cpu"):
        sampler(latents())


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("latents", [layers, lambda: normal(CHAINS, DIM), lambda: normal(30_000, DIM)])
@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_what_is_made_while_other_threads_compute(latents, n_threads, threads, monkeypatch):
    """The end and the diagnostics are made by the calling thread while others write what they will hold."""
    threads(n_threads)
    sampler = jf.FastLangevin(energy(), n_steps=40)
    sampler(latents())
    options = ({}, {"return_info": True}, {"return_info": True, "thin": 7}, {"return_info": True, "thin": 41})
    found = [sampler.sample(latents(), noise_key=4, **each) for each in options]
    general(monkeypatch)
    for one, each in zip(found, options, strict=True):
        assert_same([one], [sampler.sample(latents(), noise_key=4, **each)])


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_memory_that_is_refused_while_threads_compute(n_threads, fails, threads, monkeypatch):
    """They compute to the end, what they wrote is dropped, and the general way says what happened, or does it."""
    threads(n_threads)
    sampler = jf.FastLangevin(energy(), n_steps=30)
    expected = sampler.sample(layers(), noise_key=4, return_info=True)
    make, made = torch.empty_like, []

    def refuse(tensor, *arguments, **options):
        made.append(tensor)
        if len(made) == fails + 1:
            raise RuntimeError("no memory")
        return make(tensor, *arguments, **options)

    monkeypatch.setattr(torch, "empty_like", refuse)
    assert_same([sampler.sample(layers(), noise_key=4, return_info=True)], [expected])
    assert len(made) > fails + 1


@pytest.mark.parametrize("n_threads", [1, 2])
def test_memory_that_is_refused_always(n_threads, threads, monkeypatch):
    threads(n_threads)
    sampler = jf.FastLangevin(energy(), n_steps=30)
    expected = sampler.sample(layers(), noise_key=4)

    def refuse(*arguments, **options):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", refuse)
        with pytest.raises(RuntimeError, match="no memory"):
            sampler.sample(layers(), noise_key=4)
    assert_same([sampler.sample(layers(), noise_key=4)], [expected])


OTHER_LATENTS = {
    "float64": lambda: [layer.double() for layer in layers()],
    "one layer in float64": lambda: [layers()[0].double(), *layers()[1:]],
    "float16": lambda: normal(CHAINS, DIM).half(),
    "too wide": lambda: [normal(CHAINS, 4), *layers()[1:]],
    "too many layers": lambda: [*layers(), normal(CHAINS, 1)],
    "other chains": lambda: [normal(CHAINS - 1, 2), *layers()[1:]],
    "tensor too wide": lambda: normal(CHAINS, DIM + 1),
    "transposed": lambda: normal(DIM, CHAINS).t(),
    "every other column": lambda: [normal(CHAINS, 4)[:, ::2], *layers()[1:]],
    "expanded": lambda: torch.ones(1, DIM).expand(CHAINS, DIM),
    "negative": lambda: torch._neg_view(normal(CHAINS, DIM)),
    "a negative layer": lambda: [torch._neg_view(normal(CHAINS, 2)), *layers()[1:]],
    "image-shaped layers": lambda: [layer[..., None, None] for layer in layers()],
    "an image": lambda: normal(CHAINS, DIM, 2, 2),
    "three dimensions": lambda: normal(CHAINS, DIM, 1),
    "one dimension": lambda: normal(DIM),
    "a number": lambda: 3,
    "nothing": lambda: [],
    "numbers": lambda: [1.0, 2.0],
    "a dictionary": lambda: {"z": normal(CHAINS, DIM)},
    "sparse": lambda: normal(CHAINS, DIM).to_sparse(),
    "meta": lambda: normal(CHAINS, DIM).to("meta"),
    "nested": lambda: torch.nested.nested_tensor([normal(2, DIM), normal(3, DIM)]),
    "large": lambda: [normal(cpu_plain._LARGEST_COPY // DIM + 1, d) for d in DIMS],
}


@pytest.mark.parametrize("latents", OTHER_LATENTS.values(), ids=OTHER_LATENTS)
def test_other_latents_go_the_general_way(latents, monkeypatch):
    sampler = jf.FastLangevin(energy(), n_steps=3)
    sampler(layers())
    sampler(normal(CHAINS, DIM))
    found = outcome(sampler, latents(), {})
    general(monkeypatch)
    assert_same(found, outcome(sampler, latents(), {}))


LAYOUTS = [cpu_plain.plain_layout(latents()) for _, _, latents in CALLS.values()] if cpu_plain.available() else []


@pytest.mark.parametrize("latents", [call[2] for call in CALLS.values()] + list(OTHER_LATENTS.values()))
def test_latents_lie_as_a_layout_says_or_not(latents):
    """What the kernel's module says at once is what the layout made anew says."""
    z = latents()
    for layout in LAYOUTS:
        assert cpu_plain.lies_as(z, layout) == (cpu_plain.plain_layout(z) == layout)


def test_latents_of_another_structure_come_in_turn():
    sampler = jf.FastLangevin(energy(), n_steps=3)
    expected = {}
    for _ in range(2):
        for name in ("list", "tuple", "tensor", "image-shaped tensor", "one chain", "no chain"):
            z = CALLS[name][2]()
            found = sampler.sample(z, noise_key=4)
            for a, b in zip(flat(found), flat(expected.setdefault(name, found)), strict=True):
                assert torch.equal(a, b)
            assert type(found) is type(z)
            assert [layer.shape for layer in flat(found)] == [layer.shape for layer in flat(z)]


OTHER_OPTIONS = {
    "key and generator": {"noise_key": 3, "generator": torch.Generator()},
    "key of a bool": {"noise_key": True},
    "key too large": {"noise_key": 2**64},
    "key of two": {"noise_key": torch.tensor([1, 2])},
    "no generator": {"generator": 3},
    "negative step": {"first_step": -1},
    "chain of a float": {"first_chain": 1.5},
    "chain beyond 32 bits": {"first_chain": 2**32},
    "thin of nothing": {"thin": 0, "return_info": True},
    "thin of a float": {"thin": 1.0},
    "thin of a bool": {"thin": True},
    "noise": {"noise": normal(3, CHAINS, DIM)},
    "mask": {"mask": [True, False, False]},
    "likelihood": {"log_likelihood": lambda z: -sum((layer**2).sum(1) for layer in z)},
    "context": {"context": normal(CHAINS, 2)},
    "logit": {"y": 1},
}


@pytest.mark.parametrize("options", OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_other_options_go_the_general_way(options, monkeypatch):
    sampler = jf.FastLangevin(energy(), n_steps=3)
    sampler(layers())
    found = outcome(sampler, layers(), options)
    general(monkeypatch)
    assert_same(found, outcome(sampler, layers(), options))


def test_parameters_are_read_at_every_call_and_checked():
    f = energy()
    sampler = jf.FastLangevin(f, n_steps=3)
    z, first = layers(), sampler.sample(layers(), noise_key=1)
    with torch.no_grad():
        f.layers[0].weight.mul_(2)
    second = sampler.sample(z, noise_key=1)
    expected = jf.FastLangevin(f, n_steps=3, backend="eager").sample(z, noise_key=1)
    assert not torch.equal(first[0], second[0])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(second, expected, strict=True))
    f.layers[1].weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"weight 1 of the energy must be \[9, 9\]"):
        sampler(z)
    f.double()
    with pytest.raises(ValueError, match="float64 on cpu"):
        sampler(z)


def test_an_energy_that_ceases_to_be_an_mlp_is_no_longer_taken_for_one():
    net = JointEnergy()
    sampler = jf.FastLangevin(net, n_steps=3)
    z, before = layers(), sampler.sample(layers(), noise_key=1)
    net.net.register_forward_hook(lambda module, inputs, output: 2 * output)
    after = sampler.sample(z, noise_key=1)
    expected = jf.FastLangevin(lambda z: net(z), n_steps=3).sample(z, noise_key=1)
    assert not torch.equal(before[2], after[2])
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    assert not sampler._source.was_mlp


def test_a_key_drawn_in_vain_is_the_one_that_the_general_way_uses(monkeypatch):
    """The kernel may refuse what only it looks at: the generator has then moved on, once."""
    sampler = jf.FastLangevin(energy(), n_steps=3)
    sampler(layers())
    expected = outcome(sampler, layers(), {})
    monkeypatch.setattr(cpu_plain, "chain_of_latents", lambda *arguments: None)
    assert_same(outcome(sampler, layers(), {}), expected)


@pytest.mark.parametrize("make", [jf.EnergyMLP, lambda *sizes: jf.EnergyMLP(*sizes, spectral_norm=True), None])
def test_wide_layers_are_read_once(make, monkeypatch):
    """They run through torch's products: nothing is to be normalised or drawn first and in vain."""
    net = nn.Sequential(nn.Linear(DIM, 1100), nn.GELU(), nn.Linear(1100, 1)) if make is None else make(DIM, 1100, 1)
    sampler, z = jf.FastLangevin(net, n_steps=2), normal(CHAINS, DIM)
    expected = sampler.sample(z, noise_key=1)
    assert sampler._source.was_mlp
    asked = []
    monkeypatch.setattr(sampler_module, "noise_key_of", lambda key, *others: asked.append(key) or key)
    assert torch.equal(sampler.sample(z, noise_key=1), expected)
    assert asked == [1]


def test_a_compiler_s_neighbours_see_operators():
    """Modes and transforms look on through the registered operators, whatever the call before was."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    sampler = jf.FastLangevin(energy(), n_steps=3)
    expected = sampler.sample(layers(), noise_key=1)
    with Watch():
        found = sampler.sample(layers(), noise_key=1)
    assert any("mlp_langevin_chain" in name for name in seen)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("z", "end"),
    [
        (lambda z: [z[0], z[1][:-1].contiguous(), z[2]], lambda end: end),
        (lambda z: [z[0], z[1][:-1].contiguous(), z[2]], lambda end: [end[0], end[1][:-1].contiguous(), end[2]]),
        (lambda z: z, lambda end: [end[2], end[1], end[0]]),
        (lambda z: z, lambda end: end[:2]),
        (lambda z: z, lambda end: [layer[:-1].contiguous() for layer in end]),
        (lambda z: z, lambda end: torch.cat(end, 1)),
        (lambda z: [*z, torch.empty(CHAINS, 0)] * 22, lambda end: end),
        (lambda z: [], lambda end: []),
    ],
)
def test_the_native_call_itself_refuses_layers_that_do_not_fit(z, end):
    """It would read or write beyond them."""
    native = cpu_plain._kernels()
    mlp, update = energy().mlp(None), plain_update(3, DIM)
    begin, memory = layers(), [torch.zeros(CHAINS, d) for d in DIMS]
    assert native.plain_mlp_langevin_chain(begin, mlp, update, 3, 1, ChainResult(memory), 1)
    written = [layer.clone() for layer in memory]
    assert not native.plain_mlp_langevin_chain(z(begin), mlp, update, 3, 1, ChainResult(end(memory)), 1)
    assert all(torch.equal(a, b) for a, b in zip(memory, written, strict=True))
