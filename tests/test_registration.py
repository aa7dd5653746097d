"""The operators of torch.library: schema, fakes, autograd, and the same results as the functions of ops.py."""

import dataclasses

import pytest
import torch
from reference import moved, plain_update, random_mlp
from torch.library import opcheck

import jlebm_fast as jf
from jlebm_fast import ops, registration, rng
from jlebm_fast.backends import cpu_plain, eager
from jlebm_fast.problem import MLP, MLPSpec, Record, Update

OPERATORS = registration.operators


def normal(*shape, seed=71):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(backend, head="identity", chains=5, context=True):
    mlp = random_mlp((6, 8, 8, 1 if head == "identity" else 3), "gelu", head, chains=chains, context=context)
    return normal(chains, 6).to(backend.device), moved(mlp, backend.device)


def arguments_of_chain(z, mlp, update, n_steps, record, backend):
    return (
        z,
        *registration.spread_mlp(mlp),
        *registration.spread_update(update),
        n_steps,
        *record,
        backend.name,
        None,
    )


def attached(mlp):
    """The same MLP with parameters that want a gradient."""
    leaf = lambda t: None if t is None else t.detach().clone().requires_grad_()  # noqa: E731
    return MLP(mlp.spec, tuple(map(leaf, mlp.weights)), tuple(map(leaf, mlp.biases)), leaf(mlp.context_bias), mlp.logit)


@pytest.mark.parametrize("record", [Record(True, True, 2), Record()], ids=["all", "nothing"])
@pytest.mark.parametrize("head", ["identity", "logit"])
def test_opcheck_of_the_chain(backend, record, head):
    z, mlp = problem(backend, head)
    update = moved(plain_update(4, 6), backend.device)
    opcheck(OPERATORS.mlp_langevin_chain.default, arguments_of_chain(z, mlp, update, 4, record, backend))
    wanting = arguments_of_chain(z.clone().requires_grad_(), attached(mlp), update, 4, record, backend)
    opcheck(OPERATORS.mlp_langevin_chain.default, wanting)


def test_opcheck_of_energy_and_gradient(backend):
    z, mlp = problem(backend)
    for inputs in ((z, mlp), (z.clone().requires_grad_(), attached(mlp)), (z, attached(mlp))):
        opcheck(OPERATORS.mlp_energy_grad.default, (inputs[0], *registration.spread_mlp(inputs[1]), backend.name, None))


def test_opcheck_of_step_and_noise(backend):
    z, _ = problem(backend)
    update = moved(plain_update(1, 6, prior_mean=normal(6), frozen=normal(6) > 0), backend.device)
    opcheck(OPERATORS.langevin_step.default, (z, z + 1, *registration.spread_update(update), backend.name))
    device = torch.device(backend.device)
    place = (rng.key_tensor(2**63 + 1), 3, 5, 6, 1, 2, 0, device, torch.float32, backend.name)
    opcheck(OPERATORS.langevin_noise.default, place)


def test_opcheck_of_the_spectral_norm():
    for weight in (normal(8, 6), normal(8, 6).requires_grad_()):
        opcheck(OPERATORS.top_singular.default, (weight, torch.nn.functional.normalize(normal(8), dim=0)))


def test_operators_are_the_functions(backend):
    z, mlp = problem(backend)
    update, record = moved(plain_update(4, 6), backend.device), Record(True, True, 2)
    ours = OPERATORS.mlp_langevin_chain.default(*arguments_of_chain(z, mlp, update, 4, record, backend))
    for a, b in zip(ours, ops.mlp_langevin_chain(z, mlp, update, 4, record, backend=backend.name), strict=True):
        assert torch.equal(a, b)
    ours = OPERATORS.mlp_energy_grad.default(z, *registration.spread_mlp(mlp), backend.name, None)
    for a, b in zip(ours, ops.mlp_energy_grad(z, mlp, backend=backend.name), strict=True):
        assert torch.equal(a, b)


def test_results_that_nobody_asked_for_are_absent(backend):
    z, mlp = problem(backend)
    update = moved(plain_update(4, 6), backend.device)
    for record in (Record(), Record(diagnostics=True), Record(trajectory=True, thin=2)):
        found = OPERATORS.mlp_langevin_chain.default(*arguments_of_chain(z, mlp, update, 4, record, backend))
        direct = ops.mlp_langevin_chain(z, mlp, update, 4, record, backend=backend.name)
        for a, b in zip(found, [value for value in direct if value is not None], strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not cpu_plain.available(), reason="plain calls are not answered here")
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("chosen", ["auto", "cpu"])
def test_plain_operators_are_one_native_call(context, n_threads, chosen, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    z, update = normal(37, 6), plain_update(4, 6, noise_key=torch.tensor([-7]))
    mlp = random_mlp((6, 8, 5, 1), "gelu", chains=37, context=context)
    records = (Record(), Record(diagnostics=True), Record(diagnostics=True, thin=3), Record(diagnostics=True, thin=9))
    spread = registration.spread_mlp(mlp)

    def runs():
        arguments = [(z, *spread, *registration.spread_update(update), 4, *record, chosen, None) for record in records]
        found = [tensor for each in arguments for tensor in OPERATORS.mlp_langevin_chain.default(*each)]
        return [*found, *OPERATORS.mlp_energy_grad.default(z, *spread, chosen, None)]

    def never(*arguments, **options):
        raise AssertionError("the general way")

    try:
        with monkeypatch.context() as patched:
            patched.setattr(ops, "direct_chain", never)
            patched.setattr(ops, "direct_energy_grad", never)
            found = runs()
        monkeypatch.setattr(cpu_plain, "chain_operator", lambda *arguments: None)
        monkeypatch.setattr(cpu_plain, "energy_grad_operator", lambda *arguments: None)
        for a, b in zip(found, runs(), strict=True):
            assert torch.equal(a, b)
            assert (a.shape, a.stride(), a.dtype, a.requires_grad) == (b.shape, b.stride(), b.dtype, False)
    finally:
        torch.set_num_threads(before)


NOT_PLAIN_OPERATORS = {
    "z in float64": lambda z, rest: (z.double(), *rest),
    "z transposed": lambda z, rest: (z.t().contiguous().t(), *rest),
    "z of four dimensions": lambda z, rest: (z[..., None, None], *rest),
    "z too wide": lambda z, rest: (torch.cat([z, z], 1), *rest),
    "another backend": lambda z, rest: (z, *rest[:-2], "eager", rest[-1]),
    "nobody's backend": lambda z, rest: (z, *rest[:-2], "nobody", rest[-1]),
    "too few weights": lambda z, rest: (z, rest[0][:1], *rest[1:]),
    "a weight as its negative": lambda z, rest: (z, [torch._neg_view(rest[0][0]), *rest[0][1:]], *rest[1:]),
    "another net": lambda z, rest: (z, *rest[:4], "6-8-1 gelu:0.0 identity", *rest[5:]),
    "no net": lambda z, rest: (z, *rest[:4], "6-8", *rest[5:]),
}


@pytest.mark.skipif(not cpu_plain.available(), reason="plain calls are not answered here")
@pytest.mark.parametrize("change", NOT_PLAIN_OPERATORS.values(), ids=NOT_PLAIN_OPERATORS)
@pytest.mark.parametrize("name", ["mlp_langevin_chain", "mlp_energy_grad"])
def test_operators_that_are_not_plain_are_left_to_the_checks(change, name, monkeypatch):
    z, mlp = normal(37, 6), random_mlp((6, 8, 5, 1), "gelu")
    rest = registration.spread_mlp(mlp)
    if name == "mlp_langevin_chain":
        rest = (*rest, *registration.spread_update(plain_update(4, 6)), 4, True, False, 2)
    arguments = change(z, (*rest, "auto", None))
    native = cpu_plain.chain_operator if name == "mlp_langevin_chain" else cpu_plain.energy_grad_operator
    assert native(arguments, registration._checked_spec) is None

    def run():
        try:
            return getattr(OPERATORS, name).default(*arguments)
        except (ValueError, RuntimeError) as error:
            return type(error), str(error)

    found = run()
    monkeypatch.setattr(cpu_plain, "_kernels", lambda: None)
    expected = run()
    if isinstance(found[0], torch.Tensor):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("6-8-8-1 gelu:0.0 gelu:0.0", "spec must be widths, activation:parameter .* got '6-8-8-1 gelu:0.0 gelu:0.0'"),
        ("", "spec must be widths, .* got ''"),
        ("6-8-8-1 gelu:0.0 gelu:0.0 cosine", "head must be one of"),
        ("6-8-8-1 gelu:0.0 sine:0.0 identity", "activation must be one of"),
        ("6-8-8-1 gelu:0.0 identity", "activations must name 2 layers"),
        ("6-8-1 gelu:0.0 identity", "the MLP must have 2 weights and biases, got 3"),
        ("6-8-9-1 gelu:0.0 gelu:0.0 identity", r"weight 1 of the energy must be \[9, 8\]"),
    ],
)
def test_a_text_that_is_no_spec_is_refused(spec, message):
    z, mlp = normal(5, 6), random_mlp((6, 8, 8, 1), "gelu")
    weights, biases, context_bias, logit, _, out_scale = registration.spread_mlp(mlp)
    with pytest.raises(ValueError, match=message):
        OPERATORS.mlp_energy_grad.default(z, weights, biases, context_bias, logit, spec, out_scale, "auto", None)


def test_the_text_of_a_spec_gives_it_back():
    for spec in (
        MLPSpec((3, 4, 5, 2), ("leaky_relu", "softplus"), (0.1 + 0.2, 1e-7), "logsumexp", -2.5),
        MLPSpec((1, 1, 1), ("elu",), (1,), "tanh"),
    ):
        assert MLPSpec.of_text(spec.text, spec.out_scale) == spec
        assert spec.negated.text == spec.text
        assert dataclasses.replace(spec, head="logit").text.endswith("logit")


def test_keys_as_tensors(backend):
    z, mlp = problem(backend)
    for key in (0, 5, 2**63, 2**64 - 1):
        tensor = rng.key_tensor(key)
        assert tensor.shape == (1,)
        assert rng.key_number(tensor) == key
        results = [
            ops.mlp_langevin_chain(
                z, mlp, moved(plain_update(3, 6, noise_key=k), backend.device), 3, backend=backend.name
            ).z
            for k in (key, tensor)
        ]
        assert torch.equal(*results)
        fields = [ops.langevin_noise(k, 1, 2, 3, device=backend.device, backend=backend.name) for k in (key, tensor)]
        assert torch.equal(*fields)


def test_results_of_chain_and_step_are_detached(backend):
    z, mlp = problem(backend)
    mlp, z = attached(mlp), z.requires_grad_()
    update = moved(plain_update(3, 6), backend.device)
    chain = OPERATORS.mlp_langevin_chain.default(*arguments_of_chain(z, mlp, update, 3, Record(True, True, 1), backend))
    direct = ops.mlp_langevin_chain(z, mlp, update, 3, Record(True, True, 1), backend=backend.name)
    step = ops.langevin_step(z, z, update.at_step(0), backend=backend.name)
    assert not any(t.requires_grad for t in (*chain, *direct, step))


def leaves_of(z, mlp):
    return [z, *mlp.weights, *mlp.biases, mlp.context_bias]


@pytest.mark.parametrize("use", ["energy", "grad", "both"])
def test_gradients_of_energy_and_gradient(backend, use):
    """Against autograd through the formulas, in float32 as the backends compute."""
    z, mlp = problem(backend)

    def run(function):
        z_leaf, mlp_leaf = z.detach().clone().requires_grad_(), attached(mlp)
        energy, grad = function(z_leaf, mlp_leaf)
        value = (energy * energy.detach().cos()).sum() if use != "grad" else 0.0
        value = value + ((grad * grad.detach().sin()).sum() if use != "energy" else 0.0)
        return torch.autograd.grad(value, leaves_of(z_leaf, mlp_leaf), allow_unused=True)

    ours = run(lambda z, mlp: ops.mlp_energy_grad(z, mlp, backend=backend.name))
    for a, b in zip(ours, run(eager.mlp_energy_grad), strict=True):
        if a is None or b is None:  # the gradient does not depend on the last bias
            assert a is None or not a.any()
            continue
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradcheck_and_gradgradcheck():
    z, mlp = normal(3, 4).double(), moved(random_mlp((4, 5, 5, 1), "silu", chains=3, context=True), dtype=torch.float64)

    def value(z, w0, w1, w2, b0, b1, b2, context):
        return ops.mlp_energy_grad(z, MLP(mlp.spec, (w0, w1, w2), (b0, b1, b2), context), backend="eager")

    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(z, mlp)]
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


def test_export_holds_the_operator():
    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.f = jf.EnergyMLP(4, 5, 1)
            self.register_buffer("step_coefficients", plain_update(2, 4).step_coefficients)

        def forward(self, z):
            return ops.mlp_langevin_chain(z, self.f.mlp(z), Update(self.step_coefficients, noise_key=9), 2).z

    chain, z = Chain(), normal(3, 4)
    program = torch.export.export(chain, (z,))
    assert "jlebm_fast.mlp_langevin_chain" in str(program.graph)
    assert torch.equal(program.module()(z), chain(z))


# --- torch.func.vmap --------------------------------------------------------------------------------------------------


def _energy(**options):
    torch.manual_seed(3)
    return jf.EnergyMLP(5, 8, 2, **options)


def test_vmap_over_points():
    f, z = _energy(), torch.randn(3, 4, 5)
    expected = [jf.energy_and_grad(f, each) for each in z]
    for in_dim, points in ((0, z), (1, z.transpose(0, 1))):
        energy, grad = torch.func.vmap(lambda each: jf.energy_and_grad(f, each), in_dims=in_dim)(points)
        torch.testing.assert_close(energy, torch.stack([e for e, _ in expected]))
        torch.testing.assert_close(grad, torch.stack([g for _, g in expected]))


def test_vmap_over_points_and_conditions():
    f = _energy(context_dim=2, out_features=3, head="logsumexp")
    z, context, y = torch.randn(3, 4, 5), torch.randn(3, 4, 2), torch.tensor([[0, 1, 2, 0]] * 3)
    run = lambda z, context: jf.energy_and_grad(f, z, context=context)  # noqa: E731
    energy, grad = torch.func.vmap(run)(z, context)
    for i in range(3):
        for found, expected in zip((energy[i], grad[i]), run(z[i], context[i]), strict=True):
            torch.testing.assert_close(found, expected)
    chosen = jf.energy_and_grad(f, z[0], context=context[0], y=y[0])[0]
    by_vmap = torch.func.vmap(lambda z: jf.energy_and_grad(f, z, context=context[0], y=y[0])[0])(z)
    torch.testing.assert_close(by_vmap[0], chosen)


def test_vmap_over_chains_and_over_nets():
    prior = jf.FastLangevin(_energy(), n_steps=4)
    z = torch.randn(3, 6, 5)

    def run(z):
        end, info = prior.sample(z, noise_key=7, return_info=True)
        return end, info[:4]

    ends, diagnostics = torch.func.vmap(run)(z)
    for i in range(3):
        end, expected = run(z[i])
        assert torch.equal(ends[i], end)
        assert all(torch.equal(a[i], b) for a, b in zip(diagnostics, expected, strict=True))

    class Prior(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.f = _energy()

        def forward(self, z):
            return jf.FastLangevin(self.f, n_steps=4)(z, noise_key=7)

    module = Prior()
    several = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in module.named_parameters()}
    ends = torch.func.vmap(lambda p: torch.func.functional_call(module, p, (z[0],)))(several)
    for i in range(2):
        one = torch.func.functional_call(module, {name: p[i] for name, p in several.items()}, (z[0],))
        assert torch.equal(ends[i], one)


def test_vmap_and_noise():
    """A key that is drawn inside follows vmap's own rule on randomness; a given one is that of every entry."""
    z = torch.zeros(3, 6, 5)
    for run in (jf.FastLangevin(_energy(), n_steps=2), lambda each: jf.langevin_step(each, each, step_size=0.1)):
        with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
            torch.func.vmap(run)(z)
        with pytest.raises(RuntimeError, match="different"):
            torch.func.vmap(run, randomness="different")(z)
        ends = torch.func.vmap(run, randomness="same")(z)
        assert torch.equal(ends[0], ends[1])
    step = lambda each: jf.langevin_step(each, each, step_size=0.1, noise_key=3)  # noqa: E731
    assert torch.equal(torch.func.vmap(step)(z)[1], step(z[1]))


def test_functionalize_draws_the_key_of_a_plain_call():
    z, prior = torch.randn(6, 5), jf.FastLangevin(_energy(), n_steps=2)
    for run in (prior, lambda z: jf.langevin_step(z, z), lambda z: jf.mala(prior.energy, z, n_steps=2)[0]):
        torch.manual_seed(4)
        expected = run(z)
        torch.manual_seed(4)
        assert torch.equal(torch.func.functionalize(run)(z), expected)
    for options in ({"energy": lambda z: z.sum(1)}, {"energy": prior.energy, "log_likelihood": torch.sum}):
        energy = jf.FastLangevin(options.pop("energy"), n_steps=2)
        with pytest.raises(ValueError, match=r"needs autograd at every step, which torch.func .* does not allow"):
            torch.func.functionalize(lambda z, e=energy, o=options: e(z, **o))(z)


# --- gradients by torch.func, and forward mode ------------------------------------------------------------------------


def _energy_and_grad(function, backend):
    """(z, first weight, first bias) -> (energy, gradient), by the operator or by the formulas; as leaves as well."""
    z, mlp = problem(backend, context=False)
    options = {"backend": backend.name} if function is ops.mlp_energy_grad else {}

    def run(z, weight=mlp.weights[0], bias=mlp.biases[0]):
        weights, biases = (weight, *mlp.weights[1:]), (bias, *mlp.biases[1:])
        return function(z, mlp._replace(weights=weights, biases=biases), **options)

    return run, z, mlp.weights[0], mlp.biases[0]


def _outer_gradient(run, z, weight):
    weight = weight.clone().requires_grad_()
    inner = torch.func.grad(lambda z, w: run(z, w)[0].sin().sum(), argnums=0)(z, weight)
    return torch.autograd.grad(inner.cos().sum(), weight)


def _dual(run, z):
    with torch.autograd.forward_ad.dual_level():
        values = run(torch.autograd.forward_ad.make_dual(z, z.cos()))
        return [torch.autograd.forward_ad.unpack_dual(value).tangent for value in values]


TRANSFORMS = {
    "grad": lambda run, z, w, b: torch.func.grad(lambda z: run(z)[0].sin().sum())(z),
    "grad of the gradient": lambda run, z, w, b: torch.func.grad(lambda z: run(z)[1].sin().sum())(z),
    "grad in all": lambda run, z, w, b: torch.func.grad(lambda *a: run(*a)[1].sin().sum(), argnums=(0, 1, 2))(z, w, b),
    "grad of grad": lambda run, z, w, b: torch.func.grad(
        lambda z: torch.func.grad(lambda z: run(z)[0].sin().sum())(z).cos().sum()
    )(z),
    "vjp": lambda run, z, w, b: torch.func.vjp(run, z)[1]((z[:, 0], z.cos())),
    "jvp": lambda run, z, w, b: torch.func.jvp(run, (z,), (z.cos(),)),
    "hessian": lambda run, z, w, b: torch.func.hessian(lambda z: run(z)[0].sum())(z),
    "vmap of grad": lambda run, z, w, b: torch.func.vmap(torch.func.grad(lambda z: run(z)[0].sin().sum()))(
        torch.stack([z, 2 * z])
    ),
    "grad of vmap": lambda run, z, w, b: torch.func.grad(lambda z: torch.func.vmap(run)(z)[0].sin().sum())(
        torch.stack([z, 2 * z])
    ),
    "autograd around grad": lambda run, z, w, b: _outer_gradient(run, z, w),
    "dual numbers": lambda run, z, w, b: _dual(run, z),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_energy_and_gradient_under_transforms(backend, transform):
    ours = torch.utils._pytree.tree_leaves(transform(*_energy_and_grad(ops.mlp_energy_grad, backend)))
    plain = torch.utils._pytree.tree_leaves(transform(*_energy_and_grad(eager.mlp_energy_grad, backend)))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_transforms_refuse_what_a_plain_call_refuses():
    z, mlp = normal(5, 6), random_mlp((6, 8, 8, 1), "gelu")
    gradient = lambda mlp, backend: torch.func.grad(  # noqa: E731
        lambda z: ops.mlp_energy_grad(z, mlp, backend=backend)[0].sum()
    )
    with pytest.raises(ValueError, match=r"weight 0 of the energy must be \[8, 6\] float32"):
        gradient(moved(mlp, dtype=torch.float64), "auto")(z)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        gradient(mlp, "nobody")(z)


def test_gradients_flow_where_torch_has_no_search_for_who_requires_them(monkeypatch):
    """Torch 2.6 has none."""
    from jlebm_fast import registration

    monkeypatch.setattr(registration, "_any_requires_grad", registration._search_by_ops)
    spec = MLPSpec((2, 3, 1), ("tanh",), (0.0,))
    weights, biases = [torch.ones(3, 2), torch.ones(1, 3)], [torch.zeros(3), None]

    def energy(z, bias):
        parameters = weights, [biases[0], bias], None, None
        return torch.ops.jlebm_fast.mlp_energy_grad.default(z, *parameters, spec.text, 1.0, "auto", None)[0]

    assert not energy(torch.ones(4, 2), None).requires_grad
    assert energy(torch.ones(4, 2, requires_grad=True), None).requires_grad
    assert energy(torch.ones(4, 2), torch.zeros(1, requires_grad=True)).requires_grad
