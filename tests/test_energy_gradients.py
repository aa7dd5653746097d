"""EnergyMLP as a plain module: derivatives of every order, modes, transforms, copies, wrappers."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn

import jlebm_fast as jf
from jlebm_fast import fused_energy
from jlebm_fast.backends import cpu_plain, eager
from jlebm_fast.problem import ACTIVATIONS


def normal(*shape, seed=81, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def energy_and_inputs(chains=37, activation="gelu", head="identity", norm=False, context=0, seed=1):
    torch.manual_seed(seed)
    logits = 3 if head in ("logsumexp", "logit") else 1
    f = jf.EnergyMLP(
        (2, 4),
        (17, 9, 12),
        3,
        activation=activation,
        head=head,
        out_features=logits,
        spectral_norm=norm,
        context_dim=context,
    )
    options = {"context": normal(chains, context, seed=82)} if context else {}
    if head == "logit":
        options["y"] = torch.arange(chains) % 3
    return f, normal(chains, 6), options


def composite(f, z, **options):
    """The formula in plain torch."""
    return eager.mlp_forward(z, f.mlp(z, **options))[0]


def gradients(function, f, z, options, create_graph=False):
    z = z.detach().clone().requires_grad_()
    options = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in options.items()}
    value = function(z, **options)
    leaves = [z, *(v for v in options.values() if v.requires_grad), *f.parameters()]
    return [value, *torch.autograd.grad((value * value).sum(), leaves, create_graph=create_graph, allow_unused=True)]


CASES = [
    *[{"activation": name} for name in ACTIVATIONS],
    *[{"head": head} for head in ("tanh", "sigmoid", "softplus", "logsumexp", "logit")],
    *[{"chains": n} for n in (0, 1, 16, 33, 130)],
    {"context": 3, "norm": True, "head": "logsumexp"},
    {"norm": True, "activation": "leaky_relu"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_first_derivatives_in_everything(case):
    """error <= 2 error(plain torch in float32) + 1e-6, both against float64."""
    f, z, options = energy_and_inputs(**case)
    ours = gradients(f, f, z, options)
    plain = gradients(lambda z, **o: composite(f, z, **o), f, z, options)
    g = copy.deepcopy(f).double()
    exact_options = {n: v.double() if v.is_floating_point() else v for n, v in options.items()}
    exact = gradients(lambda z, **o: composite(g, z, **o), g, z.double(), exact_options)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a is None) == (c is None)
        if a is None or a.numel() == 0:
            continue
        assert a.shape == c.shape
        error, allowed = ((t.double() - c).abs().max().item() for t in (a, b))
        assert error <= 2 * allowed + 1e-6 * max(1.0, c.abs().max().item())


def test_the_native_pass_serves_the_plain_case(monkeypatch):
    f, z, _ = energy_and_inputs()
    assert fused_energy.native_pass(z, f.mlp(z)) is not None
    assert "_Energy" in type(f(z).grad_fn).__name__
    assert "_Energy" in type(f.requires_grad_(False)(z.clone().requires_grad_()).grad_fn).__name__
    shallow = jf.EnergyMLP(6, 12, 2)
    assert ("_Energy" in type(shallow(z).grad_fn).__name__) == cpu_plain.available()
    monkeypatch.setattr(cpu_plain, "available", lambda: False)
    assert "_Energy" not in type(shallow(z).grad_fn).__name__, "torch's backward is the faster one then"
    assert "_Energy" not in type(f.requires_grad_().double()(z.double()).grad_fn).__name__


@pytest.mark.parametrize("context", [0, 2])
def test_gradients_where_torch_multiplies_them_out(context, monkeypatch):
    """As with a torch that shows no tensor to native code, which is one before 2.10."""
    monkeypatch.setattr(cpu_plain, "_kernels", lambda: None)
    f, z, options = energy_and_inputs(activation="silu", context=context)
    found, expected = (gradients(function, f, z, options) for function in (f, lambda z, **o: composite(f, z, **o)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_in_z_alone():
    """Frozen parameters: the native pass, whatever the depth."""
    for depth in (1, 2, 5):
        f = jf.EnergyMLP(6, 12, depth, activation="mish").requires_grad_(False)
        z = normal(2000, 6).requires_grad_()
        value = f(z)
        assert "_Energy" in type(value.grad_fn).__name__
        (grad,) = torch.autograd.grad(value.square().sum(), z)
        (exact,) = torch.autograd.grad(composite(f, z).square().sum(), z)
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_those_of_the_formula():
    f, z, options = energy_and_inputs(activation="silu", context=2, head="logsumexp")

    def penalty(function):
        found = gradients(function, f, z, options, create_graph=True)[1:]
        return torch.autograd.grad(sum((g * g).sum() for g in found), list(f.parameters()))

    ours, plain = penalty(f), penalty(lambda z, **o: composite(f, z, **o))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_latents_that_depend_on_the_weights_are_counted_once():
    f, z, _ = energy_and_inputs(activation="silu")

    def hessian_trace(function):
        moved = z + f.layers[0].weight.sum() * 0.01
        (grad,) = torch.autograd.grad(function(moved).sum(), f.layers[0].weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(f.parameters()), allow_unused=True)

    for a, b in zip(hessian_trace(f), hessian_trace(lambda z: composite(f, z)), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck_and_gradgradcheck(norm):
    f, z, options = energy_and_inputs(chains=3, activation="silu", context=2, norm=norm)
    f, z, c = f.double().eval(), z.double().requires_grad_(), options["context"].double().requires_grad_()
    names = [name for name, _ in f.named_parameters()]

    def value(z, c, *parameters):
        return torch.func.functional_call(f, dict(zip(names, parameters, strict=True)), (z, c))

    assert torch.autograd.gradcheck(value, (z, c, *f.parameters()))
    # the vectors of a spectral norm count as constants in its gradient, so second derivatives are checked in z alone
    second = (z, c) if norm else (z, c, *f.parameters())
    assert torch.autograd.gradgradcheck(lambda z, c, *p: value(z, c, *(p or f.parameters())), second)


def test_strides_and_inputs_do_not_matter():
    f, z, _ = energy_and_inputs()
    expected = f(z)
    before = z.clone()
    assert torch.equal(f(z.t().contiguous().t()), expected)
    assert torch.equal(f(z.repeat_interleave(2, 0)[::2]), expected)
    assert torch.equal(z, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm", [False, True])
def test_without_gradients(mode, norm):
    f, z, _ = energy_and_inputs(norm=norm)
    with mode():
        value = f(z)
        assert not value.requires_grad
        again = f(z.clone())
    torch.testing.assert_close(value, f(z).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(again, value)


def test_autocast_reaches_the_module_and_not_the_chain():
    f, z, _ = energy_and_inputs()
    plain = nn.Sequential(f.layers[0], nn.GELU(), f.layers[1], nn.GELU(), f.layers[2], nn.GELU(), f.layers[3])
    prior = jf.FastLangevin(f, n_steps=5)
    expected = prior(z, noise_key=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(z).dtype == plain(z).dtype == torch.bfloat16
        assert torch.equal(f(z), plain(z).squeeze(1))
        assert torch.equal(prior(z, noise_key=3), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("norm", [False, True])
def test_vmap_over_parameter_sets(norm):
    nets = [energy_and_inputs(norm=norm, seed=i)[0].eval() for i in range(3)]
    z = normal(5, 6)
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")

    def value(parameters, buffers, z):
        return torch.func.functional_call(base, (parameters, buffers), (z,))

    together = torch.vmap(value, in_dims=(0, 0, None))(parameters, buffers, z)
    torch.testing.assert_close(together, torch.stack([net(z) for net in nets]), rtol=1e-4, atol=1e-5)


def test_transforms_of_torch_func():
    f, z, _ = energy_and_inputs(activation="silu")
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda z: f(z).sum())(z), expected, rtol=1e-4, atol=1e-5)
    per_chain = torch.vmap(torch.func.grad(lambda one: f(one[None]).sum()))(z)
    torch.testing.assert_close(per_chain, expected, rtol=1e-4, atol=1e-5)
    tangent = normal(*z.shape, seed=83)
    _, forward_mode = torch.func.jvp(f, (z,), (tangent,))
    torch.testing.assert_close(forward_mode, (expected * tangent).sum(1), rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, forward_mode)


def test_functional_call_uses_the_given_parameters():
    f, z, _ = energy_and_inputs()
    g = energy_and_inputs(seed=9)[0]
    ours = torch.func.functional_call(f, dict(g.named_parameters()), (z,))
    assert torch.equal(ours, g(z))
    prior = jf.FastLangevin(f, n_steps=3)
    assert not torch.equal(prior(z, noise_key=1), jf.FastLangevin(g, n_steps=3)(z, noise_key=1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("norm", [False, True])
def test_copies_of_energy_and_sampler(copied, norm):
    f, z, _ = energy_and_inputs(norm=norm)
    prior = jf.FastLangevin(f, n_steps=4)
    expected = prior(z, noise_key=2)
    twin = copied(prior)
    assert twin.energy is not f
    torch.testing.assert_close(twin(z, noise_key=2), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(twin.energy(z), f(z), rtol=0, atol=1e-6)
    with torch.no_grad():
        twin.energy.layers[0].weight.mul_(2)
        twin.energy.layers[1].weight.neg_()
    assert not torch.allclose(twin(z, noise_key=2), expected, atol=1e-3)
    torch.testing.assert_close(prior(z, noise_key=2), expected, rtol=0, atol=1e-6)


def replaced_storage(p):
    p.data = p.data * 1.5


def changed_in_place(p):
    with torch.no_grad():
        p.mul_(1.5)


def changed_behind_autograd(p):
    p.data.mul_(1.5)


@pytest.mark.parametrize("change", [replaced_storage, changed_in_place, changed_behind_autograd])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["energy", "recognised"])
def test_never_yesterdays_weights(change, norm, kind):
    f, z, _ = energy_and_inputs(norm=norm)
    net = f
    if kind == "recognised":
        net = nn.Sequential(f.layers[0], nn.GELU(), f.layers[1], nn.GELU(), f.layers[2], nn.GELU(), f.layers[3])
    if kind == "recognised" and norm:
        net = nn.Sequential(*[nn.utils.spectral_norm(nn.Linear(a, b)) for a, b in ((6, 17), (17, 1))])
        net.insert(1, nn.GELU())
    prior = jf.FastLangevin(net, n_steps=4)
    before = prior(z, noise_key=2)
    for p in net.parameters():
        # of a spectral norm's weight the factor goes, so the biases are changed
        if p.dim() == 1 or not norm:
            change(p)
    fresh = jf.FastLangevin(net, n_steps=4)(z, noise_key=2)
    torch.testing.assert_close(prior(z, noise_key=2), fresh, rtol=0, atol=1e-6)
    assert not torch.allclose(before, fresh, atol=1e-3)
    if not norm:
        layer = (f.layers if kind == "energy" else net)[0]
        layer.weight = nn.Parameter(layer.weight.detach() * 2)
        assert torch.equal(prior(z, noise_key=2), jf.FastLangevin(net, n_steps=4)(z, noise_key=2))
        assert not torch.equal(prior(z, noise_key=2), fresh)


def _ddp_rank(rank, port, results):
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    f, z, _ = energy_and_inputs(chains=8, norm=True)
    wrapped = nn.parallel.DistributedDataParallel(f)
    prior = jf.FastLangevin(wrapped, n_steps=4)
    mine = slice(4 * rank, 4 * rank + 4)
    z_neg = prior(z[mine], noise_key=5, first_chain=4 * rank)
    (wrapped(z_neg).mean() - wrapped(z[mine]).mean()).backward()
    if rank == 0:
        results.put([p.grad.numpy() for p in f.parameters()])
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_ddp_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    ours = results.get()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    f, z, _ = energy_and_inputs(chains=8, norm=True)
    z_neg = jf.FastLangevin(f, n_steps=4)(z, noise_key=5)
    (f(z_neg).mean() - f(z).mean()).backward()
    for a, p in zip(ours, f.parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), p.grad, rtol=1e-4, atol=1e-6)
