"""torch.compile without graph breaks: the same noise and values as eager, for training steps and sampling alone."""

import copy
import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import spectral_norm as new_spectral_norm

import jlebm_fast as jf

COMPILERS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def normal(*shape, seed=61):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(z):
    return z if isinstance(z, torch.Tensor) else torch.cat(list(z), 1)


@pytest.mark.parametrize(
    ("compiler", "norm", "as_list"),
    [
        ("aot_eager", False, True),
        ("aot_eager", True, False),
        ("inductor", False, False),
        ("inductor", True, True),
    ],
)
def test_a_training_step(compiler, norm, as_list):
    """Chain and loss in one graph, its backward compiled with it; Dynamo itself traces no optimiser's zero_grad."""
    torch.manual_seed(1)
    f = jf.EnergyMLP((2, 3), 12, 2, activation="gelu", spectral_norm=norm)
    g = copy.deepcopy(f)
    z0, z_pos = ([normal(8, d, seed=i + d) for d in (2, 3)] for i in (10, 20))
    if not as_list:
        z0, z_pos = whole(z0), whole(z_pos)
    runs = []
    for energy in (f, g):
        prior = jf.FastLangevin(energy, n_steps=6)

        def loss_of(z0, z_pos, energy=energy, prior=prior):
            z_neg = prior(z0, generator=None)
            return energy(z_neg).mean() - energy(z_pos).mean(), z_neg

        if energy is g:
            loss_of = torch.compile(loss_of, fullgraph=True, backend=compiler)
        optimiser = torch.optim.SGD(energy.parameters(), lr=0.1)
        torch.manual_seed(2)
        for _ in range(3):
            optimiser.zero_grad()
            loss, z_neg = loss_of(z0, z_pos)
            loss.backward()
            optimiser.step()
            runs.append((loss.detach(), whole(z_neg)))
        runs.append(torch.rand(1))
    for (loss, z), (compiled_loss, compiled_z) in zip(runs[:3], runs[4:7], strict=True):
        torch.testing.assert_close(compiled_z, z, rtol=0, atol=2e-6)
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
        assert not compiled_z.requires_grad
    assert torch.equal(runs[3], runs[7]), "the global generator stands elsewhere"
    assert not torch.isclose(runs[4][1], runs[5][1], atol=1e-3).all()
    for p, q in zip(f.parameters(), g.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(f.named_buffers(), g.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="needs torch.autograd.grad in graphs"
)
@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_a_whole_step_with_its_gradient_in_one_graph(compiler):
    torch.manual_seed(1)
    f = jf.EnergyMLP((2, 3), 12, 2, activation="gelu", spectral_norm=True)
    prior = jf.FastLangevin(f, n_steps=6)
    parameters = list(f.parameters())

    def step(z0, z_pos):
        loss = f(prior(z0)).mean() - f(z_pos).mean()
        return [p.detach() - 0.1 * g for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)]

    z0, z_pos = normal(8, 5), normal(8, 5, seed=62)
    torch.manual_seed(2)
    expected = step(z0, z_pos)
    torch.manual_seed(2)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        ours = torch.compile(step, fullgraph=True, backend=compiler)(z0, z_pos)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_hook_of_an_energy_mlp_runs_under_a_compiler():
    f = jf.EnergyMLP(5, 12, 2)
    f.register_forward_hook(lambda module, inputs, output: 5 * output)
    prior = jf.FastLangevin(f, n_steps=4)
    compiled = torch.compile(lambda z: prior.sample(z, noise_key=1), backend="aot_eager")
    z = normal(6, 5)
    torch.testing.assert_close(compiled(z), prior.sample(z, noise_key=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_two_calls_in_one_graph_draw_as_eager_does(compiler):
    f = jf.EnergyMLP(5, 12, 2)
    prior = jf.FastLangevin(f, n_steps=4)

    def twice(z):
        first = prior(z)
        prior(z)  # dropped, but its key is drawn
        return first, prior(z)

    compiled = torch.compile(twice, fullgraph=True, backend=compiler)
    z = normal(6, 5)
    for seed in (3, 4):
        torch.manual_seed(seed)
        eager = (*twice(z), torch.rand(1))
        torch.manual_seed(seed)
        ours = (*compiled(z), torch.rand(1))
        for a, b in zip(eager, ours, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(ours[0], ours[1])


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net = nn.Sequential(wrap(nn.Linear(5, 12)), nn.GELU(), wrap(nn.Linear(12, 1)))

    def forward(self, z):
        return -self.net(torch.cat(z, 1)).squeeze(1)


@pytest.mark.parametrize(
    ("compiler", "wrap"),
    [
        ("inductor", lambda m: m),
        ("aot_eager", old_spectral_norm),
        ("aot_eager", new_spectral_norm),
        ("aot_eager", weight_norm),
    ],
)
def test_recognised_modules_after_one_call_outside(compiler, wrap):
    torch.manual_seed(5)
    prior = jf.FastLangevin(Wrapped(wrap), n_steps=5, maximize=False)
    z = [normal(6, 2), normal(6, 3)]
    expected = prior(z, noise_key=9)
    compiled = torch.compile(lambda z: prior(z, noise_key=9), fullgraph=True, backend=compiler)
    for a, b in zip(compiled(z), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with torch.no_grad():
        next(prior.energy.parameters()).mul_(1.5)
    changed = prior(z, noise_key=9)
    assert not torch.allclose(changed[0], expected[0], atol=1e-5)
    torch.testing.assert_close(compiled(z)[0], changed[0], rtol=0, atol=1e-6)


class OwnSlope(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.slope = nn.Linear(5, 12), nn.Linear(12, 1), 0.2

    def forward(self, z):
        return self.last(nn.functional.leaky_relu(self.first(z), self.slope))


def three_layers(activation):
    return nn.Sequential(nn.Linear(5, 12), activation, nn.Linear(12, 1))


CHANGED = {
    "slope": (lambda: three_layers(nn.LeakyReLU(0.2)), lambda net: setattr(net[1], "negative_slope", 0.6)),
    "approximate": (lambda: three_layers(nn.GELU()), lambda net: setattr(net[1], "approximate", "tanh")),
    "beta": (lambda: three_layers(nn.Softplus()), lambda net: setattr(net[1], "beta", 3.0)),
    "a slope of one's own": (OwnSlope, lambda net: setattr(net, "slope", 0.6)),
    "another layer": (lambda: three_layers(nn.Tanh()), lambda net: net.__setitem__(1, nn.SiLU())),
}


@pytest.mark.parametrize(("make", "change"), CHANGED.values(), ids=CHANGED)
def test_a_changed_activation_is_seen_by_the_very_next_compiled_call(make, change):
    torch.manual_seed(5)
    net, z = make(), 3 * normal(6, 5)
    prior = jf.FastLangevin(net, n_steps=5)
    before = prior(z, noise_key=9)
    compiled = torch.compile(lambda z: prior(z, noise_key=9), backend="aot_eager")
    torch.testing.assert_close(compiled(z), before, rtol=0, atol=1e-6)
    change(net)
    first, second = compiled(z), compiled(z)
    expected = jf.FastLangevin(net, n_steps=5)(z, noise_key=9)
    assert not torch.allclose(expected, before, atol=1e-5)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-6)
    whole_again = torch.compile(lambda z: prior(z, noise_key=9), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole_again(z), expected, rtol=0, atol=1e-6)


def test_a_module_around_an_energy_mlp_after_one_call_outside():
    class Negative(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = jf.EnergyMLP((2, 3), 12, 2, spectral_norm=True)

        def forward(self, z):
            return -self.f(z)

    torch.manual_seed(5)
    prior = jf.FastLangevin(Negative(), n_steps=5, maximize=False)
    z = [normal(6, 2), normal(6, 3)]
    expected = prior(z, noise_key=9)
    compiled = torch.compile(lambda z: prior(z, noise_key=9), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(z), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_options(compiler):
    f = jf.EnergyMLP(5, 12, 2, out_features=3, head="logsumexp", context_dim=2)
    prior = jf.FastLangevin(f, n_steps=6, step_size=torch.full((7,), 0.3), prior=jf.GaussianPrior(0.2, 0.5))
    z, c = normal(7, 5), normal(7, 2)

    def call(z, c, y, key):
        return prior.sample(
            z,
            context=c,
            y=y,
            mask=torch.tensor([True, False, False, False, False]),
            noise_key=key,
            return_info=True,
            return_trajectory=True,
            thin=2,
            first_step=3,
        )

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for key in (2**63 + 5, torch.tensor([77])):
        end, info = call(z, c, 1, key)
        compiled_end, compiled_info = compiled(z, c, 1, key)
        torch.testing.assert_close(compiled_end, end, rtol=0, atol=1e-6)
        for name in info._fields:
            torch.testing.assert_close(getattr(compiled_info, name), getattr(info, name), rtol=1e-5, atol=1e-6)
    noise = normal(6, 7, 5)
    compiled = torch.compile(lambda: prior(z, context=c, noise=noise), fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(), prior(z, context=c, noise=noise), rtol=0, atol=1e-6)


@pytest.mark.parametrize("energy", ["callable", "likelihood", "generator", "numpy"])
def test_what_no_graph_can_hold_runs_between_two(energy):
    f = jf.EnergyMLP(5, 12, 2)
    prior = jf.FastLangevin((lambda z: f(z)) if energy == "callable" else f, n_steps=4)
    options = {"noise_key": 4}
    if energy == "numpy":
        options["first_step"] = np.int64(3)
    if energy == "likelihood":
        options["log_likelihood"] = lambda z: -(z**2).sum()
    z = normal(6, 5)

    def call(z):
        if energy == "generator":
            return prior(z + 1, generator=torch.Generator().manual_seed(1)) * 2
        return prior(z + 1, **options) * 2

    compiled = torch.compile(call, backend="aot_eager")
    torch.testing.assert_close(compiled(z), call(z), rtol=0, atol=1e-6)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, backend="aot_eager", fullgraph=True)(z)


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_other_batches_and_weights_without_a_new_graph(compiler):
    f = jf.EnergyMLP(5, 12, 2)
    prior = jf.FastLangevin(f, n_steps=4)
    compiled = torch.compile(lambda z: prior(z, noise_key=1), fullgraph=True, backend=compiler, dynamic=True)
    for chains in (6, 9, 17):
        z = normal(chains, 5)
        with torch.no_grad():
            f.layers[0].weight.add_(0.1)
        torch.testing.assert_close(compiled(z), prior(z, noise_key=1), rtol=0, atol=1e-6)


def test_functions_in_a_graph(backend):
    z, grad = (normal(6, 5, seed=i).to(backend.device) for i in (1, 2))
    options = {"backend": backend.name}

    def call(z, grad):
        eps = jf.langevin_noise(5, 1, 6, 5, device=backend.device, **options)[0]
        return jf.langevin_step(z, grad, noise=eps, **options), jf.langevin_step(z, grad, noise_key=5, **options)

    given, drawn = torch.compile(call, fullgraph=True, backend="aot_eager")(z, grad)
    assert torch.equal(given, drawn)
    assert torch.equal(drawn, call(z, grad)[1])


PLACE = {"noise_key": 1}
BAD = {
    "no latents": (lambda f, z: jf.FastLangevin(f)("z"), "z must be a tensor .* got str"),
    "no layers": (lambda f, z: jf.FastLangevin(f)([]), "z must be a tensor .* got an empty list"),
    "thin": (lambda f, z: jf.FastLangevin(f)(z, thin=0), "thin must be an integer >= 1, got 0"),
    "half thin": (lambda f, z: jf.FastLangevin(f)(z, thin=1.5), "thin must be an integer >= 1, got 1.5"),
    "first_step": (lambda f, z: jf.FastLangevin(f)(z, first_step=1.5), r"first_step must be an integer in .* got 1.5"),
    "first_chain": (lambda f, z: jf.FastLangevin(f)(z, first_chain=1 << 64), "first_chain must be an integer in"),
    "noise": (lambda f, z: jf.FastLangevin(f, n_steps=6)(z, noise=z), r"noise must be \[6, 4, 5\] float32 on cpu, got"),
    "generator": (lambda f, z: jf.FastLangevin(f)(z, generator=3), "generator must be a torch.Generator or None"),
    "likelihood": (lambda f, z: jf.FastLangevin(f)(z, log_likelihood=3), "log_likelihood must be a callable or None"),
    "n_steps": (lambda f, z: jf.FastLangevin(f, n_steps=-1)(z), "n_steps must be an integer >= 0, got -1"),
    "step sizes": (
        lambda f, z: jf.FastLangevin(f, n_steps=6, step_size=[0.1] * 5)(z),
        "step_size as a sequence must have n_steps = 6 entries, got 5",
    ),
    "backend": (lambda f, z: jf.FastLangevin(f, backend="gpu")(z), "backend must be 'auto' or one of .* got 'gpu'"),
    "step": (lambda f, z: jf.langevin_step(z, z, first_chain=1.5, **PLACE), "first_chain must be an integer in"),
    "key": (lambda f, z: jf.langevin_noise(-1, 1, 3, 2), r"key must be an integer in \[0, 2\*\*64\), got -1"),
    "shape": (lambda f, z: jf.langevin_noise(1, 1.5, 3, 2), "n_steps must be an integer >= 0, got 1.5"),
}


def refusal(call, f, z, kind, **options):
    """What it says, without the lines of this file that Dynamo shows."""
    with pytest.raises(kind) as refused:
        torch.compile(lambda z: call(f, z), backend="aot_eager", **options)(z)
    return str(refused.value).partition("from user code")[0]


def raising(f, z):
    raise ValueError("a sentence")


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named_as_outside(call, message, fullgraph):
    """Between two graphs by the same ValueError; in one, inside what Dynamo says of any exception."""
    f, z = jf.EnergyMLP(5, 12, 2), normal(4, 5)
    with pytest.raises(ValueError, match=message):
        call(f, z)
    kind = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    if fullgraph and "a sentence" not in refusal(raising, f, z, kind, fullgraph=True):
        pytest.skip("this torch does not say which exception it saw")
    assert re.search(message, refusal(call, f, z, kind, fullgraph=fullgraph))


REFUSED = {
    "likelihood": ({"log_likelihood": lambda z: -(z**2).sum()}, "takes autograd at every step"),
    "generator": ({"generator": torch.Generator()}, "draw outside, and pass noise_key= as a tensor"),
    "numpy": ({"thin": np.int64(2)}, "give thin, first_step and first_chain as int"),
    "energy": ({}, "call the sampler once outside the graph"),
}


@pytest.mark.skipif(
    "reason" not in inspect.signature(torch.compiler.disable).parameters, reason="torch has no place for a reason"
)
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_graph_can_hold_is_refused_with_its_remedy(options, message):
    energy = jf.EnergyMLP(5, 12, 2) if options else nn.Sequential(nn.Linear(5, 1))
    prior = jf.FastLangevin(energy, n_steps=4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"reason: .*{message}"):
        torch.compile(lambda z: prior(z, **options), fullgraph=True, backend="aot_eager")(normal(4, 5))


def test_a_sampler_made_inside():
    f, z = jf.EnergyMLP(5, 12, 2), normal(4, 5)

    def call(z):
        usual = jf.FastLangevin(f, n_steps=4)(z, noise_key=1)
        return usual, jf.FastLangevin(f, n_steps=4, prior=jf.GaussianPrior(std=2.0))(z, noise_key=1)

    for ours, theirs in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(z), call(z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", [jf.energy_and_grad, lambda f, z: jf.mala(f, z, n_steps=2, noise_key=1)])
def test_functions_of_a_module_of_ones_own_run_between_two_graphs(call):
    net, z = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 1)), normal(4, 5)
    run = lambda z: call(net, z + 1)[0] * 2  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(z), run(z), rtol=1e-5, atol=1e-6)


def test_mala_of_an_energy_mlp_in_one_graph():
    f, z = jf.EnergyMLP(5, 12, 2), normal(4, 5)
    run = lambda z: jf.mala(f, z, n_steps=3, noise_key=1)[0]  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), run(z), rtol=0, atol=1e-6)
