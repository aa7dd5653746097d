"""EnergyMLP: values, gradients of every order, heads, spectral norm, the papers' checkpoints, copies of modules."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as new_spectral_norm

import jlebm_fast as jf
from jlebm_fast.problem import ACTIVATIONS

MODULES = {
    "leaky_relu": nn.LeakyReLU(0.2),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(),
    "identity": nn.Identity(),
}


def normal(*shape, seed=21, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_the_sequential(activation):
    torch.manual_seed(1)
    f = jf.EnergyMLP((2, 3), hidden=(7, 9), depth=2, activation=activation)
    net = nn.Sequential(nn.Linear(5, 7), MODULES[activation], nn.Linear(7, 9), MODULES[activation], nn.Linear(9, 1))
    net.load_state_dict({f"{2 * int(k[7])}.{k[9:]}": v for k, v in f.state_dict().items()})
    z = normal(11, 5)
    torch.testing.assert_close(f(z), net(z).squeeze(1), rtol=2e-6, atol=1e-6)
    assert torch.equal(f.double()(z.double()), net.double()(z.double()).squeeze(1))
    f.float()
    assert torch.equal(f([z[:, :2], z[:, 2:]]), f(z))
    assert torch.equal(f((z[:, :2], z[:, 2:])), f(z))
    assert torch.equal(f(z[..., None, None]), f(z))
    assert torch.equal(f([z[:, :2, None, None], z[:, 2:]]), f(z))


@pytest.mark.parametrize("head", ["identity", "tanh", "sigmoid", "softplus", "logsumexp"])
def test_gradients_of_first_and_second_order(head):
    torch.manual_seed(2)
    logits = 3 if head == "logsumexp" else 1
    f = jf.EnergyMLP(4, 6, 2, activation="silu", head=head, out_features=logits, context_dim=2, spectral_norm=True)
    f = f.double().eval()
    z, c = (normal(3, d, dtype=torch.float64).requires_grad_() for d in (4, 2))
    parameters = list(f.parameters())

    def value(z, c, *parameters):
        names = [name for name, _ in f.named_parameters()]
        return torch.func.functional_call(f, dict(zip(names, parameters, strict=True)), (z, c))

    assert torch.autograd.gradcheck(value, (z, c, *parameters), atol=1e-6)
    # the vectors of a spectral norm count as constants in its gradient, so second derivatives are checked in z alone
    assert torch.autograd.gradgradcheck(lambda z, c: f(z, c), (z, c))


def test_double_backward_reaches_parameters():
    f = jf.EnergyMLP(4, 6, 2, activation="gelu")
    z = normal(3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad is not None for p in f.layers[0].parameters())


def test_logsumexp_and_chosen_logit():
    f = jf.EnergyMLP(4, 6, 1, out_features=5, head="logsumexp")
    z = normal(8, 4)
    logits = torch.stack([f(z, y=j) for j in range(5)], dim=1)
    torch.testing.assert_close(f(z), logits.logsumexp(1))
    y = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    assert torch.equal(f(z, y=y), logits.gather(1, y[:, None])[:, 0])
    only = jf.EnergyMLP(4, 6, 1, out_features=5, head="logit")
    with pytest.raises(ValueError, match="y must name a logit"):
        only(z)


def test_context_is_a_further_input():
    f = jf.EnergyMLP(4, 6, 2, context_dim=3)
    plain = jf.EnergyMLP(7, 6, 2)
    plain.load_state_dict(f.state_dict())
    z, c = normal(8, 4), normal(8, 3, seed=22)
    torch.testing.assert_close(f(z, c), plain(torch.cat([z, c], 1)))
    torch.testing.assert_close(f(z, c[0]), plain(torch.cat([z, c[:1].expand(8, 3)], 1)))


def with_layer(layer):
    f = jf.EnergyMLP(4, 5, 1)
    f.layers[1] = layer
    return f


BAD = {
    "no latents": (lambda: jf.EnergyMLP((), 5, 1), "latent_dims must be one or more positive integers"),
    "depth": (lambda: jf.EnergyMLP(4, 5, 0), "depth must be an integer >= 1, got 0"),
    "too deep": (lambda: jf.EnergyMLP(4, 5, 17), "1 to 16 hidden layers, got 17"),
    "widths": (lambda: jf.EnergyMLP(4, (5, 6), 3), r"hidden must be one width or 3 widths"),
    "activation": (lambda: jf.EnergyMLP(4, 5, 1, activation="swish"), "activation must be one of identity, .*'swish'"),
    "head": (lambda: jf.EnergyMLP(4, 5, 1, head="exp"), "head must be one of"),
    "logits without head": (lambda: jf.EnergyMLP(4, 5, 1, out_features=3), "takes one logit, got 3; use 'logsumexp'"),
    "slope": (lambda: jf.EnergyMLP(4, 5, 1, negative_slope=float("nan")), "negative_slope must be finite"),
    "context": (lambda: jf.EnergyMLP(4, 5, 1, context_dim=-1), "context_dim must be an integer >= 0"),
    "a float of latents": (lambda: jf.EnergyMLP(16.0, 8, 2), "latent_dims must be one or more positive .*, got 16.0"),
    "a word of latents": (lambda: jf.EnergyMLP("16", 8, 2), "latent_dims must be one or more positive .*, got '16'"),
    "a float of units": (lambda: jf.EnergyMLP(16, 8.0, 2), r"hidden must be one width or 2 widths .*, got 8.0"),
    "floats of units": (
        lambda: jf.EnergyMLP(16, (8, 8.0), 2),
        r"widths must be positive integers, got \(16, 8, 8.0, 1\)",
    ),
    "a layer of another class": (
        lambda: with_layer(nn.Linear(5, 1))(normal(3, 4)),
        "the layers of an EnergyMLP must stay its own, got Linear",
    ),
    "a sparse z": (lambda: jf.EnergyMLP(4, 5, 1)(normal(3, 4).to_sparse()), r"got \[3, 4\] .* \(sparse_coo\)"),
    "slope of letters": (lambda: jf.EnergyMLP(4, 5, 1, negative_slope="a"), "negative_slope must be finite, got 'a'"),
    "a word of norms": (
        lambda: jf.EnergyMLP(16, 50, 2, spectral_norm="yes"),
        "must be a bool or 3 bools .*, got 'yes'",
    ),
    "numbers of norms": (lambda: jf.EnergyMLP(16, 50, 2, spectral_norm=(1, 0, 1)), r"3 bools .*, got \(1, 0, 1\)"),
    "no norm": (lambda: jf.EnergyMLP(16, 50, 2, spectral_norm=None), "must be a bool or 3 bools .*, got None"),
    "a function": (lambda: jf.EnergyMLP.from_module(lambda z: z, 4), "net must be a torch.nn.Module, got function"),
    "norms": (lambda: jf.EnergyMLP(4, 5, 1, spectral_norm=[True]), r"spectral_norm must be a bool or 2 bools"),
    "missing context": (
        lambda: jf.EnergyMLP(4, 5, 1, context_dim=2)(normal(3, 4)),
        r"context must be \[3, 2\] or \[2\]",
    ),
    "y of one logit": (lambda: jf.EnergyMLP(4, 5, 1)(normal(3, 4), y=0), "y chooses a logit of a logsumexp or logit"),
    "y out of range": (
        lambda: jf.EnergyMLP(4, 5, 1, out_features=2, head="logsumexp")(normal(3, 4), y=2),
        r"entries in \[0, 2\), got 2",
    ),
    "z": (lambda: jf.EnergyMLP(4, 5, 1)(normal(3, 5)), r"z must be \[chains, 4\] float32 on cpu, got \[3, 5\]"),
    "layers": (lambda: jf.EnergyMLP((2, 2), 5, 1)([normal(3, 4)]), r"widths \(2, 2\), got \(4,\)"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_half_precision_are_refused_by_their_name(dtype):
    f = jf.EnergyMLP((2, 2), 5, 1).bfloat16()
    z = normal(3, 4).to(dtype)
    for call in (lambda: f(z), lambda: f([z[:, :2], z[:, 2:]])):
        with pytest.raises(ValueError, match=r"^parameters of the energy must be float32 or float64, got bfloat16$"):
            call()
    with pytest.raises(ValueError, match="parameters of the energy must be float32 or float64, got bfloat16"):
        jf.FastLangevin(f)(normal(3, 4))


def test_spectral_norm_is_the_largest_singular_value():
    torch.manual_seed(3)
    f = jf.EnergyMLP(16, 50, 4, spectral_norm=True)
    for step in range(3):
        for layer in f.layers:
            exact = layer.weight / torch.linalg.matrix_norm(layer.weight, 2)
            torch.testing.assert_close(layer.effective_weight(), exact, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                layer.weight += 0.1 ** (step + 1) * torch.randn_like(layer.weight)


def test_only_a_training_forward_writes_the_vectors():
    torch.manual_seed(4)
    f = jf.EnergyMLP(4, 6, 2, spectral_norm=True)
    with torch.no_grad():
        f.layers[1].weight += torch.randn(6, 6)
    before = {k: v.clone() for k, v in f.state_dict().items()}

    def changed():
        return [k for k, v in f.state_dict().items() if not torch.equal(v, before[k])]

    jf.FastLangevin(f, n_steps=3)(normal(5, 4))
    jf.FastLangevin(f, n_steps=3, backend="eager")(normal(5, 4))
    f.eval()(normal(5, 4))
    assert changed() == []
    f.train()(normal(5, 4))
    assert "layers.1.weight_u" in changed()


def test_spectral_norm_of_weights_that_are_not_finite():
    f = jf.EnergyMLP(4, 6, 2, spectral_norm=True)
    with torch.no_grad():
        f.layers[0].weight[0, 0] = float("nan")
    assert f(normal(5, 4)).isnan().all()
    info = jf.FastLangevin(f, n_steps=3).sample(normal(5, 4), return_info=True)[1]
    assert (info.first_bad_step == 0).all()


def named(prefix, wrap, ins=16, hidden=20):
    names = OrderedDict()
    for i, (a, b) in enumerate(((ins, hidden), (hidden, hidden), (hidden, 1))):
        names[f"fc{i + 1}"] = wrap(nn.Linear(a, b))
        if b != 1:
            names[f"act{i + 1}"] = nn.LeakyReLU(0.2)
    net = nn.Module()
    net.add_module(prefix, nn.Sequential(names))
    return net, getattr(net, prefix)


@pytest.mark.parametrize("wrap", [lambda m: m, old_spectral_norm, new_spectral_norm], ids=["plain", "old", "new"])
@pytest.mark.parametrize("names", ["energy.fc1", "ebm.0"])
def test_checkpoints_of_the_papers_load(wrap, names):
    torch.manual_seed(5)
    net, forward = named("energy", wrap)
    if names == "ebm.0":
        net = nn.Module()
        net.ebm = forward = nn.Sequential(*forward)
    for _ in range(300):
        forward(normal(2, 16))
    state = net.state_dict()
    assert any(key.startswith(names + ".") for key in state)
    f = jf.EnergyMLP((6, 10), 20, 2, spectral_norm=any(key.endswith("_u") for key in state))
    assert f.load_state_dict(state).missing_keys == []
    z = normal(9, 16)
    torch.testing.assert_close(f.eval()(z), forward.eval()(z).squeeze(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled"])
@pytest.mark.parametrize("last", ["out", "fc12", "a_last"])
def test_layers_are_ordered_by_their_number(order, last):
    torch.manual_seed(6)
    names = [f"fc{i}" for i in range(1, 12)] + [last]
    layers = {name: nn.Linear(7, 1 if name == last else 7) for name in names}
    net = nn.Sequential(OrderedDict(layers))
    keys = sorted(net.state_dict())
    if order == "reversed":
        keys.reverse()
    elif order == "shuffled":
        keys = [keys[i] for i in torch.randperm(len(keys)).tolist()]
    f = jf.EnergyMLP(7, 7, 11)
    f.load_state_dict({f"ebm.{key}": net.state_dict()[key] for key in keys})
    for layer, expected in zip(f.layers, net, strict=True):
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)


def test_checkpoints_that_do_not_fit_are_refused():
    plain, _ = named("energy", lambda m: m)
    normalised, _ = named("energy", old_spectral_norm)
    with pytest.raises(ValueError, match="make this EnergyMLP with spectral_norm=True"):
        jf.EnergyMLP(16, 20, 2).load_state_dict(normalised.state_dict())
    with pytest.raises(ValueError, match="make this EnergyMLP with spectral_norm=False"):
        jf.EnergyMLP(16, 20, 2, spectral_norm=True).load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        jf.EnergyMLP(16, 21, 2).load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        jf.EnergyMLP(16, 20, 3).load_state_dict(plain.state_dict())


def test_checkpoints_with_a_plain_output_layer_load():
    net, forward = named("energy", old_spectral_norm)
    forward.fc3 = nn.Linear(20, 1)
    for _ in range(300):
        forward(normal(2, 16))
    with pytest.raises(ValueError, match=r"spectral_norm=\(True, True, False\)"):
        jf.EnergyMLP(16, 20, 2, spectral_norm=True).load_state_dict(net.state_dict())
    f = jf.EnergyMLP(16, 20, 2, spectral_norm=(True, True, False))
    f.load_state_dict(net.state_dict())
    z = normal(9, 16)
    torch.testing.assert_close(f.eval()(z), forward.eval()(z).squeeze(1), rtol=1e-4, atol=1e-6)


def test_state_dict_round_trip_inside_another_module(tmp_path):
    f = nn.ModuleDict({"energy": jf.EnergyMLP(4, 6, 2, spectral_norm=True)})
    torch.save(f.state_dict(), tmp_path / "f.pt")
    g = nn.ModuleDict({"energy": jf.EnergyMLP(4, 6, 2, spectral_norm=True)})
    g.load_state_dict(torch.load(tmp_path / "f.pt", weights_only=True))
    assert torch.equal(f["energy"](normal(3, 4)), g["energy"](normal(3, 4)))
    twin = copy.deepcopy(f["energy"])
    assert torch.equal(twin(normal(3, 4)), f["energy"](normal(3, 4)))


def test_widths_may_be_integers_of_numpy():
    f = jf.EnergyMLP(np.array([1, 3]), np.int64(5), np.int64(2), out_features=np.int64(3), head="logit")
    assert f.latent_dims == (1, 3)
    assert f.spec.widths == (4, 5, 5, 3)
    assert all(type(width) is int for width in (*f.latent_dims, *f.spec.widths))
    assert torch.equal(f(normal(2, 4), y=np.int64(1)), f(normal(2, 4), y=1))


def test_spectral_norm_after_deferred_initialisation():
    with torch.device("meta"):
        f = jf.EnergyMLP(4, 6, 2, spectral_norm=True)
    f.to_empty(device="cpu")
    for layer in f.layers:
        for buffer in (layer.weight_u, layer.weight_v):
            buffer.fill_(torch.nan)  # as memory may be that nobody has written
        layer.reset_parameters()
    sigma = torch.linalg.matrix_norm(torch.stack([f.layers[1].effective_weight()]), ord=2)
    torch.testing.assert_close(sigma, torch.ones(1), rtol=1e-4, atol=0)
    assert torch.isfinite(f(normal(3, 4))).all()


def test_hooks_that_would_never_run_are_refused():
    f = jf.EnergyMLP(4, 6, 2)
    old_spectral_norm(f.layers[0])
    with pytest.raises(ValueError, match="use EnergyMLP"):
        f(normal(3, 4))
    g = jf.EnergyMLP(4, 6, 2)
    new_spectral_norm(g.layers[0], n_power_iterations=300)
    g(normal(3, 4))
    z, noise = normal(3, 4), normal(5, 3, 4)
    ours = jf.FastLangevin(g, n_steps=5)(z, noise=noise)
    torch.testing.assert_close(ours, jf.FastLangevin(lambda z: g(z), n_steps=5)(z, noise=noise), rtol=0, atol=1e-5)


def test_from_module_copies():
    torch.manual_seed(6)
    net = nn.Sequential(
        old_spectral_norm(nn.Linear(16, 20)), nn.GELU(), nn.Linear(20, 8, bias=False), nn.Tanh(), nn.Linear(8, 1)
    )
    f = jf.EnergyMLP.from_module(net, (6, 10))
    for _ in range(300):
        net(normal(2, 16))
    z = normal(9, 16)
    torch.testing.assert_close(f(z), net.eval()(z).squeeze(1), rtol=1e-4, atol=1e-6)
    before = f(z)
    with torch.no_grad():
        net[2].weight.zero_()
    assert torch.equal(f(z), before)
    with pytest.raises(ValueError, match=r"cannot be copied into an EnergyMLP: layer_norm .* layer '1' \(LayerNorm\)"):
        jf.EnergyMLP.from_module(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 1)), 4)


class NegativeJoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 1))

    def forward(self, z):
        return -2 * self.net(torch.cat(z, 1)).squeeze(1)


def test_from_module_of_an_energy_mlp_is_a_copy():
    f = jf.EnergyMLP((2, 3), 6, 2, spectral_norm=True, context_dim=2)
    g = jf.EnergyMLP.from_module(f, (2, 3))
    z, c = normal(4, 5), normal(4, 2)
    assert torch.equal(f(z, c), g(z, c))
    assert g.layers[0].weight is not f.layers[0].weight


def test_from_module_keeps_sign_and_layers():
    net = NegativeJoint()
    f = jf.EnergyMLP.from_module(net, (2, 3))
    z = [normal(4, 2), normal(4, 3)]
    assert f.latent_dims == (2, 3)
    torch.testing.assert_close(f(z), net(z))
