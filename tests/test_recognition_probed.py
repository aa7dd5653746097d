"""Energies that are an MLP however they are written: read by running their forward, against the published loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import published_loop
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as new_spectral_norm

import jlebm_fast as jf
from jlebm_fast.energy_source import EnergySource
from jlebm_fast.latents import flatten_latents
from jlebm_fast.recognition.examining import Unrecognised
from jlebm_fast.recognition.probing import Probed

CHAINS, DIM = 6, 10
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z, NOISE = normal(CHAINS, DIM), normal(5, CHAINS, DIM, seed=32)


class Written(nn.Module):
    """An energy by a function of (module, z) over three linear layers and some numbers."""

    def __init__(self, forward, logits=1):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(DIM, 12), nn.Linear(12, 9), nn.Linear(9, logits)
        self.scale, self.offset = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mean", normal(DIM, seed=4))
        self.register_buffer("std", normal(DIM, seed=5).abs() + 0.5)
        self.w, self.v = nn.Parameter(normal(DIM, 12, seed=6)), nn.Parameter(normal(12, seed=7))
        self.written = forward

    def forward(self, z, *given, **named):
        return self.written(self, z, *given, **named)


def mlp(net, z, act=F.gelu):
    return net.c(act(net.b(act(net.a(z)))))


def hand_gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def hand_tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Equalised(nn.Module):
    """A weight that is scaled where it is used."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(n_out, n_in, seed=8)), nn.Parameter(normal(n_out, seed=9))

    def forward(self, x):
        return F.linear(x, self.weight * (1 / math.sqrt(x.shape[1])), self.bias)


def batch_norm():
    net = nn.Sequential(nn.Linear(DIM, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 1))
    for _ in range(3):
        net(5 * normal(64, DIM) + 1)
    return net.eval()


def normed(norm):
    net = Written(lambda m, z: mlp(m, z, F.silu) * math.sqrt(2))
    norm(net.a), norm(net.b)
    return net


FORMS = {
    "mish by hand": lambda: Written(lambda m, z: mlp(m, z, lambda x: x * torch.tanh(F.softplus(x)))),
    "gelu by hand": lambda: Written(lambda m, z: mlp(m, z, hand_gelu)),
    "tanh gelu by hand": lambda: Written(lambda m, z: mlp(m, z, hand_tanh_gelu)),
    "silu by exponentials": lambda: Written(lambda m, z: mlp(m, z, lambda x: x / (1 + torch.exp(-x)))),
    "scaled activation": lambda: Written(lambda m, z: mlp(m, z, lambda x: F.leaky_relu(x, 0.2) * math.sqrt(2))),
    "celu and a number": lambda: Written(lambda m, z: mlp(m, z, F.celu) / math.sqrt(2)),
    "scalar parameter added": lambda: Written(lambda m, z: mlp(m, z).squeeze(1) + m.offset),
    "number subtracted": lambda: Written(lambda m, z: 1.5 - mlp(m, z)),
    "learned temperature": lambda: Written(lambda m, z: mlp(m, z) / m.scale.exp()),
    "temperature inside logsumexp": lambda: Written(
        lambda m, z: 2.5 * torch.logsumexp(mlp(m, z) / 2.5, dim=1) + 0.3, logits=4
    ),
    "number of unknown origin": lambda: Written(lambda m, z: mlp(m, z)[:, 0] / math.sqrt(DIM)),
    "standardised latents": lambda: Written(lambda m, z: mlp(m, (z - m.mean) / m.std)),
    "weights on the right": lambda: Written(lambda m, z: m.c(torch.tanh(m.b(F.relu(z @ m.w + m.v))))),
    "addmm": lambda: Written(lambda m, z: m.c(torch.tanh(m.b(F.relu(torch.addmm(m.v, z, m.w)))))),
    "einsum": lambda: Written(lambda m, z: m.c(torch.tanh(m.b(F.relu(torch.einsum("bi,io->bo", z, m.w)))))),
    "transposed weight": lambda: Written(lambda m, z: m.c(F.relu(m.b(F.relu(F.linear(z, m.w.t(), m.v)))))),
    "two products before an activation": lambda: Written(lambda m, z: m.c(F.silu(m.b(F.silu(m.a(z) + z @ m.w))))),
    "equalised": lambda: nn.Sequential(Equalised(DIM, 12), nn.LeakyReLU(0.2), Equalised(12, 1)),
    "batch norm of running means": batch_norm,
    "convolution over length one": lambda: Written(
        lambda m, z: m.c(torch.tanh(m.b(F.relu(F.conv1d(z.unsqueeze(2), m.w.t().unsqueeze(2)).squeeze(2)))))
    ),
    "mean of logits": lambda: Written(lambda m, z: mlp(m, z).mean(1), logits=4),
    "difference of logits": lambda: Written(lambda m, z: (lambda f: f[:, 1] - f[:, 0])(mlp(m, z)), logits=4),
    "tanh, then a number": lambda: Written(lambda m, z: 3.0 * torch.tanh(mlp(m, z)) - 1.0),
    "sigmoid": lambda: Written(lambda m, z: torch.sigmoid(mlp(m, z) + m.offset)),
    "cast to float32": lambda: Written(lambda m, z: mlp(m, z.float()).float()),
    "two networks and a constant": lambda: Written(
        lambda m, z: (mlp(m, z) + F.gelu(F.gelu(z @ m.w) @ m.b.weight.t()).sum(1, keepdim=True)) * m.scale
    ),
    "one net on several slots": lambda: Written(
        lambda m, z: F.linear(torch.tanh(F.linear(z.view(-1, 2, 5), m.w[:5].t())), m.v).sum(1)
    ),
    "in place": lambda: Written(lambda m, z: mlp(m, z, lambda x: x.tanh_()).add_(1.0)),
    "old spectral norm beside a number": lambda: normed(old_spectral_norm),
    "new spectral norm beside a number": lambda: normed(new_spectral_norm),
}


def converge(net):
    """Of spectral norms the power iterations, as a chain has them."""
    if any(name.endswith("_u") for name, _ in net.named_buffers()):
        for _ in range(500):
            net(Z)


def found(net, z=Z):
    return EnergySource(net).found(flatten_latents(z)[1])


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_an_mlp_however_written(make):
    net = make()
    what = found(net)
    assert isinstance(what, Probed), what
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    ours = jf.FastLangevin(net, n_steps=5)(Z, noise=NOISE)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    converge(net)
    torch.testing.assert_close(ours, published_loop(net, Z, 0.4, NOISE), rtol=0, atol=2e-5)
    value, grad = jf.energy_and_grad(net, Z)
    leaf = Z.clone().requires_grad_()
    torch.testing.assert_close(value, net(leaf).reshape(-1).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(net(leaf).sum(), leaf)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_parameters_and_numbers_of_the_moment(make):
    net = make()
    sampler = jf.FastLangevin(net, n_steps=5)
    before = sampler(Z, noise=NOISE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3).add_(0.01)
    after = sampler(Z, noise=NOISE)
    assert not torch.allclose(before, after, atol=1e-4)
    converge(net)
    torch.testing.assert_close(after, published_loop(net, Z, 0.4, NOISE), rtol=0, atol=2e-5)
    assert EnergySource(net).examinations(Z, flatten_latents(Z)[1], None, None)[0] == 1


@pytest.mark.parametrize("norm", [old_spectral_norm, new_spectral_norm])
def test_explain_says_that_spectral_norms_are_converged(norm):
    traced = nn.Sequential(norm(nn.Linear(DIM, 12)), nn.SiLU(), nn.Linear(12, 1))
    for net in (traced, normed(norm)):
        assert "spectral norms as they converge" in jf.FastLangevin(net).explain(Z)
    plain = nn.Sequential(nn.Linear(DIM, 12), nn.SiLU(), nn.Linear(12, 1))
    assert "spectral" not in jf.FastLangevin(plain).explain(Z)


def test_a_spectral_norm_that_never_ran_is_converged_all_the_same():
    net = normed(new_spectral_norm).eval()
    ours = jf.FastLangevin(net, n_steps=5)(Z, noise=NOISE)
    net.train()
    converge(net)
    torch.testing.assert_close(ours, published_loop(net.eval(), Z, 0.4, NOISE), rtol=0, atol=2e-5)


def test_layers_of_other_widths_are_read_anew():
    net = FORMS["scalar parameter added"]()
    sampler = jf.FastLangevin(net, n_steps=5)
    sampler(Z, noise=NOISE)
    net.a, net.c = nn.Linear(DIM, 7), nn.Linear(9, 1)
    net.b = nn.Linear(7, 9)
    torch.testing.assert_close(sampler(Z, noise=NOISE), published_loop(net, Z, 0.4, NOISE), rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", ["in place", "wrapped", "a child"])
def test_what_is_compiled_runs_uncompiled_for_its_parameters(how):
    torch._dynamo.reset()
    net = FORMS["scalar parameter added"]()
    expected = published_loop(net, Z, 0.4, NOISE)
    energy = net
    if how == "in place":
        net.compile(backend="eager")
    elif how == "wrapped":
        energy = torch.compile(net, backend="eager")
    else:
        net.b = torch.compile(net.b, backend="eager")
    energy(Z)
    sampler = jf.FastLangevin(energy, n_steps=5)
    assert "by a run of its own forward" in sampler.explain(Z)
    torch.testing.assert_close(sampler(Z, noise=NOISE), expected, rtol=0, atol=2e-5)


# --- what a plan does not hold for any more


class Switched(Written):
    def __init__(self):
        super().__init__(None)
        self.slope, self.deep, self.beta, self.negative = 0.2, True, 1.0, True

    def forward(self, z):
        h = F.leaky_relu(self.a(z), self.slope)
        h = torch.tanh(self.b(h)) if self.deep else h[:, :9]
        f = self.c(h).squeeze(1) * self.beta / math.sqrt(DIM)
        return -f if self.negative else f


CHANGES = {
    "a slope": lambda net: setattr(net, "slope", 0.7),
    "a branch": lambda net: setattr(net, "deep", False),
    "another forward": lambda net: setattr(net, "forward", lambda z: net.c(F.relu(net.b(F.relu(net.a(z))))).exp()),
    "a width": lambda net: (setattr(net, "a", nn.Linear(DIM, 5)), setattr(net, "b", nn.Linear(5, 9))),
    "an operation less": lambda net: setattr(net, "negative", False),
    "a number behind": lambda net: setattr(net, "beta", -2.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change):
    net = Switched()
    assert isinstance(found(net), Probed)
    sampler = jf.FastLangevin(net, n_steps=5)
    sampler(Z, noise=NOISE)
    change(net)
    torch.testing.assert_close(sampler(Z, noise=NOISE), published_loop(net, Z, 0.4, NOISE), rtol=1e-4, atol=2e-5)


def test_an_annealed_number_costs_no_examination():
    net = Switched()
    sampler = jf.FastLangevin(net, n_steps=2)
    for _ in range(5):
        sampler(Z, noise=NOISE[:2])
        net.beta *= 0.9
    torch.testing.assert_close(sampler(Z, noise=NOISE[:2]), published_loop(net, Z, 0.4, NOISE[:2]), rtol=0, atol=2e-5)
    assert "examined" not in sampler.explain(Z)


def test_an_annealed_number_of_a_traced_module_is_read_by_a_plan_in_the_end():
    class Annealed(nn.Sequential):
        beta = 1.0

        def forward(self, z):
            return self.beta * super().forward(z)

    net = Annealed(nn.Linear(DIM, 9), nn.GELU(), nn.Linear(9, 1))
    net.beta = 1.0
    sampler = jf.FastLangevin(net, n_steps=5)
    kinds = []
    for _ in range(6):
        net.beta *= 0.9
        ours = sampler(Z, noise=NOISE)
        torch.testing.assert_close(ours, published_loop(net, Z, 0.4, NOISE), rtol=0, atol=2e-5)
        kinds.append(type(found(net)).__name__)
    assert kinds == ["Recognised"] * 3 + ["Probed"] * 3


def test_a_path_that_never_repeats_runs_through_autograd():
    class Restless(Written):
        calls = 0

        def forward(self, z):
            Restless.calls += 1
            for _ in range(Restless.calls):
                z = z * math.sqrt(2) / math.sqrt(2)
            return mlp(self, z)

    net = Restless(None)
    sampler = jf.FastLangevin(net, n_steps=5)
    torch.testing.assert_close(sampler(Z, noise=NOISE), published_loop(net, Z, 0.4, NOISE), rtol=0, atol=2e-5)
    assert isinstance(found(net), Unrecognised)


class Wide(Written):
    """Another path for many chains."""

    def forward(self, z, context):
        if len(z) > 100:
            z = z * 1.0
        return mlp(self, z + context * math.sqrt(2))


def test_a_plan_that_never_holds_is_given_up():
    net, z, context = Wide(None), normal(200, DIM), normal(200, DIM, seed=5)
    plain = jf.FastLangevin(lambda z, context: net(z, context), n_steps=5)
    sampler = jf.FastLangevin(net, n_steps=5)
    for n in (10, 200, 10):
        ours = sampler(z[:n], context=context[:n], noise_key=1)
        torch.testing.assert_close(ours, plain(z[:n], context=context[:n], noise_key=1), rtol=0, atol=2e-5)
    assert "its forward takes another path at every call" in sampler.explain(z, context=context)


# --- what must not be taken for an MLP


REFUSED = {
    "clamped far away": (lambda m, z: mlp(m, z).clamp(-1e3, 1e3), "clamp is not an operation"),
    "latents clamped": (lambda m, z: mlp(m, z.clamp(-50, 50)), "clamp"),
    "nan_to_num": (lambda m, z: torch.nan_to_num(mlp(m, z)), "nan_to_num"),
    "where": (lambda m, z: torch.where(z.sum(1, keepdim=True) > 1e3, 0.0, mlp(m, z)), "where|gt"),
    "absolute value": (lambda m, z: mlp(m, z, torch.abs), "abs"),
    "gated": (lambda m, z: m.c(torch.tanh(m.b(torch.tanh(m.a(z)) * torch.sigmoid(m.a(z))))), "two values"),
    "gate of its own": (lambda m, z: mlp(m, z, lambda x: torch.tanh(x) * torch.sigmoid(x)), "no activation of the cat"),
    "residual": (lambda m, z: m.c(m.b(m.a(z) + torch.tanh(m.a(z)))), "no activation of the catalogue|different layers"),
    "skip": (lambda m, z: m.c(m.b(F.gelu(m.a(z)))) + z.sum(1, keepdim=True), "joins values of different layers"),
    "a quartic": (lambda m, z: mlp(m, z)[:, 0] - z.pow(4).sum(1), "no Gaussian in z"),
    "centred over the batch": (lambda m, z: mlp(m, z - z.mean(0)), "does not reproduce|another path"),
    "detached part": (lambda m, z: mlp(m, torch.cat([z[:, :5].detach(), z[:, 5:]], 1)), "does not reproduce"),
    "rounded": (lambda m, z: mlp(m, z.round(decimals=12)), "round"),
    "rounded division": (lambda m, z: mlp(m, torch.div(z, 1e-9, rounding_mode="floor")), "rounding_mode|div"),
    "normalised": (lambda m, z: mlp(m, F.normalize(z)), "normalize"),
    "learned slope": (lambda m, z: mlp(m, z, lambda x: F.prelu(x, m.scale)), "prelu"),
    "learned swish": (lambda m, z: mlp(m, z, lambda x: x * torch.sigmoid(m.scale * x)), "two values|catalogue|sigmoid"),
    "drawn": (lambda m, z: mlp(m, z + torch.randn(DIM)), "random draw"),
    "no hidden layer": (lambda m, z: z @ m.w.sum(1) + m.offset, "no hidden layer"),
    "two values": (lambda m, z: (mlp(m, z), z), "not a tensor"),
    "constant": (lambda m, z: mlp(m, m.mean.expand(len(z), -1)), "not a tensor"),
    "numbers of z": (lambda m, z: mlp(m, z) * float(z.abs().max() < 1e3), "abs|reads values|lt|max"),
    "another number for each batch": (lambda m, z: mlp(m, z) / len(z), "does not reproduce"),
    "unequal depth": (lambda m, z: mlp(m, z) + m.c(m.b(F.gelu(m.a(z)))), "joins values of different layers"),
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_mlp_is_named(forward, reason):
    net = Written(forward)
    what = found(net)
    assert isinstance(what, Unrecognised), what.spec
    assert any(word in what.reason for word in reason.split("|")), what.reason
    if "random" not in reason and "not a tensor" not in reason:
        ours = jf.FastLangevin(net, n_steps=5)(Z, noise=NOISE)
        torch.testing.assert_close(ours, published_loop(net, Z, 0.4, NOISE), rtol=0, atol=2e-5)


# --- methods


class Model(nn.Module):
    """A generative model that has its energy as a method, as published ones do."""

    def __init__(self, norm=lambda layer: layer):
        super().__init__()
        torch.manual_seed(3)
        self.ebm = nn.Sequential(norm(nn.Linear(DIM, 12)), nn.GELU(), norm(nn.Linear(12, 4)))
        self.decoder, self.beside = nn.Linear(DIM, 30), nn.Linear(3, DIM)
        self.temperature = 1.7

    def forward(self, x):
        raise AssertionError("the training step, which is no energy")

    def energy(self, z):
        return self.temperature * (self.ebm(z) / self.temperature).logsumexp(dim=1)

    def plain(self, z):
        return self.ebm(z).logsumexp(dim=1)

    def conditional(self, z, context):
        return -self.ebm(z + self.beside(context.detach().clone())).logsumexp(dim=1)


@pytest.mark.parametrize("method", ["energy", "plain"])
@pytest.mark.parametrize("norm", [lambda m: m, old_spectral_norm, new_spectral_norm], ids=["plain", "old", "new"])
def test_a_method_of_a_module(method, norm):
    model = Model(norm)
    for _ in range(2):
        sampler = jf.FastLangevin(getattr(model, method), n_steps=5)
        assert f"energy    {method}: 10 -> 12 -> 4, gelu, head" in sampler.explain(Z)
        ours = sampler(Z, noise=NOISE)
        for _ in range(300):
            model.ebm(Z)  # until power iterations have converged
        torch.testing.assert_close(ours, published_loop(getattr(model, method), Z, 0.4, NOISE), rtol=0, atol=2e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
    assert sampler._source.examinations(Z, flatten_latents(Z)[1], None, None)[0] == 1


def test_a_conditional_method_and_both_side_by_side():
    model, context = Model(), normal(CHAINS, 3)
    for _ in range(2):
        conditional = jf.FastLangevin(model.conditional, n_steps=5)
        assert "in one call" in conditional.explain(Z, context=context)
        expected = published_loop(lambda z: model.conditional(z, context), Z, 0.4, NOISE)
        torch.testing.assert_close(conditional(Z, noise=NOISE, context=context), expected, rtol=0, atol=2e-5)
        ours = jf.FastLangevin(model.plain, n_steps=5)(Z, noise=NOISE)
        torch.testing.assert_close(ours, published_loop(model.plain, Z, 0.4, NOISE), rtol=0, atol=2e-5)
    assert jf.verify(jf.FastLangevin(model.conditional, n_steps=5), Z, context=context, show=False).passed
    assert jf.verify(jf.FastLangevin(model.energy, n_steps=5), Z, show=False).passed
    value, grad = jf.energy_and_grad(model.energy, Z)
    torch.testing.assert_close(value, model.energy(Z).detach())
    assert grad.shape == Z.shape


def test_a_method_put_on_one_module_alone_runs_through_autograd():
    model = Model()
    model.own = (lambda self, z: self.plain(z) * 2).__get__(model)
    sampler = jf.FastLangevin(model.own, n_steps=5)
    assert "not recognised" in sampler.explain(Z)
    torch.testing.assert_close(sampler(Z, noise=NOISE), published_loop(model.own, Z, 0.4, NOISE), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["mish by hand", "temperature inside logsumexp", "standardised latents"])
def test_a_copy_as_an_energy_mlp(name):
    net = FORMS[name]()
    energy = jf.EnergyMLP.from_module(net, DIM)
    torch.testing.assert_close(energy(Z), net(Z).reshape(-1), rtol=1e-5, atol=1e-5)
