"""torch.jit.trace, which sees operations of torch alone, and torch.export: right, or refused with reason and remedy."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import jlebm_fast as jf

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def normal(*shape, seed=67):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(**options):
    torch.manual_seed(8)
    return jf.EnergyMLP(6, 20, 2, **options)


# --- torch.jit.trace --------------------------------------------------------------------------------------------------


class Chosen(nn.Module):
    """A logit by number, of latents in layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.f = jf.EnergyMLP((2, 4), 20, 2, out_features=3, head="logsumexp")

    def forward(self, z, y):
        return self.f([z[:, :2], z[:, 2:, None, None]], y=y)


MODULES = {
    "plain": (mlp, ()),
    "double": (lambda: mlp().double(), ()),
    "spectral norm": (lambda: mlp(spectral_norm=True), ()),
    "logsumexp": (lambda: mlp(out_features=3, head="logsumexp"), ()),
    "context": (lambda: mlp(context_dim=3), (normal(9, 3),)),
    "logit": (Chosen, (torch.arange(9) % 3,)),
    "parametrised": (lambda: mlp(), ()),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_a_traced_energy_is_the_energy(name, training, gradients):
    """At other latents and numbers of chains, with other weights, and its gradient; nobody is warned."""
    make, more = MODULES[name]
    net = make().train(training)
    if name == "parametrised":
        nn.utils.parametrizations.weight_norm(net.layers[0])
    dtype = next(net.parameters()).dtype
    z = normal(9, 6).to(dtype)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, (z, *more))
    for chains in (9, 4):
        arguments = (normal(chains, 6, seed=chains).to(dtype).requires_grad_(), *(value[:chains] for value in more))
        ours, theirs = traced(*arguments), net(*arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        wanted = (arguments[0], next(net.parameters()))
        of_ours, of_theirs = (torch.autograd.grad(value.sum(), wanted) for value in (ours, theirs))
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.1)


@pytest.mark.parametrize("norm", [False, True])
def test_a_trace_in_eval_mode_runs_where_this_package_is_not(norm):
    net = mlp(spectral_norm=norm).eval()
    traced = torch.jit.trace(net, (normal(9, 6),))
    assert "jlebm_fast::" not in str(traced.inlined_graph)
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    z = normal(5, 6)
    torch.testing.assert_close(torch.jit.load(saved)(z), net(z), rtol=1e-5, atol=1e-6)


def test_a_trace_leaves_singular_vectors_and_later_calls_as_they_are():
    net, z = mlp(spectral_norm=True).eval(), normal(9, 6)
    before, expected = {name: buffer.clone() for name, buffer in net.named_buffers()}, net(z)
    torch.jit.trace(net, (z,))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])
    assert torch.equal(net(z), expected)


def test_the_old_exporter_to_onnx():
    pytest.importorskip("onnx")
    torch.onnx.export(mlp(spectral_norm=True).eval(), (normal(9, 6),), io.BytesIO(), dynamo=False)


CALLS = {
    "FastLangevin.sample": lambda f, z: jf.FastLangevin(f, n_steps=2)(z),
    "FastLangevin.sample with a key": lambda f, z: jf.FastLangevin(f, n_steps=2).sample(z, noise_key=1),
    "FastLangevin.sample with noise": lambda f, z: jf.FastLangevin(f, n_steps=1).sample(z, noise=z[None]),
    "FastLangevin.sample of a callable": lambda f, z: jf.FastLangevin(lambda z: f(z), n_steps=2)(z),
    "energy_and_grad": lambda f, z: jf.energy_and_grad(f, z),
    "langevin_step": lambda f, z: jf.langevin_step(z, z, noise_key=1),
    "langevin_noise": lambda f, z: z + jf.langevin_noise(1, 1, 9, 6)[0],
    "mala": lambda f, z: jf.mala(f, z, n_steps=0)[0],
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CALLS)
def test_sampling_in_a_trace_is_refused(name):
    f, z = mlp(), normal(9, 6)
    said = rf"^{name.split(' ')[0]} cannot be part of a trace .* call it outside"
    with pytest.raises(RuntimeError, match=said):
        torch.jit.trace(lambda z: CALLS[name](f, z), (z,))
    CALLS[name](f, z)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "FastLangevin.sample of a callable"])
def test_make_fx_holds_the_operators(name):
    f, z = mlp(), normal(9, 6)
    run = lambda z: CALLS[name](f, z)  # noqa: E731
    graph = make_fx(run)(z)
    torch.manual_seed(3)
    ours = graph(normal(9, 6, seed=1))
    torch.manual_seed(3)
    torch.testing.assert_close(ours, run(normal(9, 6, seed=1)), rtol=0, atol=1e-6)


def test_make_fx_of_an_energy():
    f = mlp()
    z = normal(9, 6, seed=1)
    torch.testing.assert_close(make_fx(f)(normal(9, 6))(z), f(z), rtol=1e-5, atol=1e-6)


# --- torch.export, which by default runs Python itself ----------------------------------------------------------------


def perceptron():
    return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 1))


def normalised():
    return nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.Linear(20, 1))


class Exported(nn.Module):
    def __init__(self, energy, call):
        super().__init__()
        self.energy, self.call = energy, call
        self.sampler = jf.FastLangevin(energy, n_steps=5)

    def forward(self, z):
        return self.call(self, z)


def sampled(of, z):
    return of.sampler.sample(z, noise_key=3)


EXPORTED = {
    "energy": (mlp, lambda of, z: of.energy(z)),
    "given key": (mlp, sampled),
    "drawn key": (lambda: mlp(spectral_norm=True), lambda of, z: of.sampler.sample(z)),
    "made inside": (mlp, lambda of, z: jf.FastLangevin(of.energy, n_steps=5).sample(z, noise_key=3)),
    "gradient": (mlp, lambda of, z: jf.energy_and_grad(of.energy, z)[1]),
    "mala": (mlp, lambda of, z: jf.mala(of.energy, z, n_steps=2, noise_key=3)[0]),
    "recognised before": (perceptron, sampled),
}


@pytest.mark.parametrize(("make", "call"), EXPORTED.values(), ids=EXPORTED)
def test_export(make, call):
    module, z = Exported(make(), call), normal(9, 6)
    module.sampler(z, noise_key=3)
    program = torch.export.export(module, (z,))
    z = normal(9, 6, seed=1)
    torch.manual_seed(3)
    ours = program.module()(z)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, module(z), rtol=0, atol=1e-6)


REFUSED = {
    "no MLP": (normalised, sampled, "call the sampler once outside"),
    "not called yet": (perceptron, sampled, "call the sampler once outside"),
    "made inside": (
        perceptron,
        lambda of, z: jf.FastLangevin(of.energy, n_steps=5)(z),
        "not recognised yet by this sampler",
    ),
    "callable": (mlp, lambda of, z: jf.FastLangevin(lambda z: of.energy(z), n_steps=5)(z), "the energy is no MLP"),
    "likelihood": (
        mlp,
        lambda of, z: of.sampler.sample(z, log_likelihood=lambda z: -(z**2).sum()),
        "log_likelihood takes autograd at every step",
    ),
    "generator": (mlp, lambda of, z: of.sampler.sample(z, generator=torch.Generator()), "pass noise_key= as a tensor"),
    "gradient": (perceptron, lambda of, z: jf.energy_and_grad(of.energy, z), "energy_and_grad reads an energy"),
    "mala": (perceptron, lambda of, z: jf.mala(of.energy, z, n_steps=2, noise_key=3)[0], "energy_and_grad reads"),
}


@pytest.mark.parametrize(("make", "call", "reason"), REFUSED.values(), ids=REFUSED)
def test_export_refuses_with_the_remedy(make, call, reason):
    """It used to call itself until Python gave up."""
    with pytest.raises(RuntimeError, match=f"torch.export cannot hold this call.*{reason}") as refused:
        torch.export.export(Exported(make(), call), (normal(9, 6),))
    assert not isinstance(refused.value, RecursionError)
