"""Plain calls: which calls are answered natively in one go, with the bits of the backend; all others are left alone."""

import pytest
import torch
from reference import moved, plain_update, random_mlp
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import jlebm_fast as jf
from jlebm_fast import fused_energy, ops, rng
from jlebm_fast.backends import _native, cpu, cpu_plain
from jlebm_fast.problem import MLP, MLPSpec, Record, Update

pytestmark = [
    pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason())),
    pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10"),
]


def normal(*shape, seed=31):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CHAINS, DIM, STEPS = 7, 6, 3


def problem(head="identity", context=False):
    logits = 1 if head == "identity" else 3
    return normal(CHAINS, DIM), random_mlp((DIM, 8, 5, logits), "gelu", head, chains=CHAINS, context=context)


UPDATES = {
    "plain": {},
    "no prior": {"prior_precision": None},
    "prior per dimension": {"prior_mean": normal(DIM), "prior_precision": normal(DIM).exp()},
    "prior per chain": {"prior_mean": normal(CHAINS, DIM), "prior_precision": normal(CHAINS, DIM).exp()},
    "coefficients per chain": {"chain_coefficients": normal(CHAINS, 3).exp()},
    "frozen dimensions": {"frozen": normal(DIM) > 0},
    "frozen per chain": {"frozen": normal(CHAINS, DIM) > 0},
    "key as a tensor": {"noise_key": torch.tensor([-5])},
    "key as a scalar tensor": {"noise_key": torch.tensor(2**62)},
    "largest key": {"noise_key": 2**64 - 1},
    "place": {"first_step": 2**32 - 1, "first_chain": 70000},
    "extra gradient": {"extra_grad": normal(CHAINS, DIM, seed=5)},
}


def assert_same(found, expected):
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("changes", UPDATES.values(), ids=UPDATES)
def test_chains_and_steps_have_the_bits_of_the_backend(changes):
    z, mlp = problem()
    for more in ({}, {"noise": True}):
        noise = {"noise": normal(STEPS, CHAINS, DIM, seed=9)} if more else {}
        update = plain_update(STEPS, DIM, **changes, **noise)
        by_number = update._replace(noise_key=ops.key_number(update.noise_key))
        for record in (Record(), Record(diagnostics=True), Record(trajectory=True, thin=2), Record(True, True, 9)):
            found = cpu_plain.mlp_langevin_chain(z, mlp, update, STEPS, record)
            assert_same(found, cpu.mlp_langevin_chain(z, mlp, by_number, STEPS, record))
        first, first_by_number = update.at_step(0), by_number.at_step(0)
        found = cpu_plain.langevin_step(z, z + 1, first)
        assert torch.equal(found, cpu.langevin_step(z, z + 1, first_by_number))


NOISE = (5, 3, 2, 7, 1, 4, 2, torch.device("cpu"), torch.float32)  # key, shape, place, stream


def test_noise_has_the_bits_of_the_backend():
    for key in (0, 5, 2**64 - 1):
        found = cpu_plain.langevin_noise(key, *NOISE[1:])
        assert torch.equal(found, cpu.langevin_noise(key, 3, 2, 7, first_step=1, first_chain=4, stream=2))
        assert torch.equal(found, cpu_plain.langevin_noise(rng.key_tensor(key), *NOISE[1:]))
    assert cpu_plain.langevin_noise(5, 3, 0, 7, *NOISE[4:]).shape == (3, 0, 7)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(0, key) for key in (-1, 2**64, True, 1.0, None, torch.tensor([1.0]), torch.tensor([1, 2]))],
        *[(place, size) for place in (1, 2, 3) for size in (-1, True, 2.0, None)],
        *[(place, counter) for place in (4, 5, 6) for counter in (-1, 2**32, True, 1.0, None)],
        (7, torch.device("meta")),
        (8, torch.float64),
        (8, torch.float16),
    ],
)
def test_noise_that_is_not_plain_is_left_to_the_checks(place, value, monkeypatch):
    arguments = (*NOISE[:place], value, *NOISE[place + 1 :])
    assert cpu_plain.langevin_noise(*arguments) is None

    def run():
        try:
            return ops.direct_noise(*arguments, "cpu")
        except ValueError as error:
            return str(error)

    found = run()
    monkeypatch.setattr(cpu_plain, "_kernels", lambda: None)
    assert found == run()
    assert isinstance(found, str)


@pytest.mark.parametrize("head", ["identity", "logsumexp", "logit"])
@pytest.mark.parametrize("context", [False, True])
def test_energies_have_the_bits_of_the_backend(head, context):
    z, mlp = problem(head, context)
    parameters = mlp._replace(weights=[nn.Parameter(w) for w in mlp.weights], biases=[None, *mlp.biases[1:]])
    for given in (mlp, parameters):
        for a, b in zip(cpu_plain.mlp_energy_grad(z, given), cpu.mlp_energy_grad(z, given), strict=True):
            assert torch.equal(a, b)
            assert not a.requires_grad
        for layers, grad in ((False, False), (True, False), (True, True)):
            found = cpu_plain.mlp_energy_layers(z, given, layers=layers, grad=grad)
            for a, b in zip(found, cpu.mlp_energy_layers(z, given, layers=layers, grad=grad), strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b)


@pytest.mark.parametrize(("chains", "n_steps"), [(0, 3), (1, 0), (1, 1)])
def test_nothing_to_do(chains, n_steps):
    mlp, update = random_mlp((DIM, 8, 1)), plain_update(n_steps, DIM)
    z = normal(chains, DIM)
    for record in (Record(), Record(True, True)):
        found = cpu_plain.mlp_langevin_chain(z, mlp, update, n_steps, record)
        assert_same(found, cpu.mlp_langevin_chain(z, mlp, update, n_steps, record))
    energy, grad = cpu_plain.mlp_energy_grad(z, mlp)
    assert energy.shape == (chains,)
    assert grad.shape == (chains, DIM)


class Subclass(torch.Tensor):
    pass


def _layer(mlp, **changes):
    """The MLP with other first entries."""
    return mlp._replace(**{name: (value, *getattr(mlp, name)[1:]) for name, value in changes.items()})


# z, mlp, update, n_steps -> the same call, not plain
NOT_PLAIN = {
    "z of another width": lambda z, m, u, n: (z[:, :4].contiguous(), m, u, n),
    "z of one dimension": lambda z, m, u, n: (z[0], m, u, n),
    "z transposed": lambda z, m, u, n: (z.t().contiguous().t(), m, u, n),
    "z with gaps": lambda z, m, u, n: (normal(CHAINS, 2 * DIM)[:, ::2], m, u, n),
    "z in float64": lambda z, m, u, n: (z.double(), m, u, n),
    "z in float16": lambda z, m, u, n: (z.half(), m, u, n),
    "z sparse": lambda z, m, u, n: (z.to_sparse(), m, u, n),
    "z without values": lambda z, m, u, n: (z.to("meta"), m, u, n),
    "z of a subclass": lambda z, m, u, n: (z.as_subclass(Subclass), m, u, n),
    "z as its negative": lambda z, m, u, n: (torch._neg_view(z), m, u, n),
    "z without memory": lambda z, m, u, n: (torch._efficientzerotensor(CHAINS, DIM), m, u, n),
    "weight as its negative": lambda z, m, u, n: (z, _layer(m, weights=torch._neg_view(m.weights[0])), u, n),
    "bias as its negative": lambda z, m, u, n: (z, _layer(m, biases=torch._neg_view(m.biases[0])), u, n),
    "coefficients as their negatives": lambda z, m, u, n: (
        z, m, u._replace(step_coefficients=torch._neg_view(u.step_coefficients)), n
    ),
    "mean as its negative": lambda z, m, u, n: (z, m, u._replace(prior_mean=torch._neg_view(normal(DIM))), n),
    "noise as its negative": lambda z, m, u, n: (
        z, m, u._replace(noise=torch._neg_view(normal(STEPS, CHAINS, DIM))), n
    ),
    "extra gradient as its negative": lambda z, m, u, n: (z, m, u._replace(extra_grad=torch._neg_view(z)), n),
    "weight without memory": lambda z, m, u, n: (z, _layer(m, weights=torch._efficientzerotensor(8, DIM)), u, n),
    "weight of a class of its own": lambda z, m, u, n: (z, _layer(m, weights=TwoTensor(*2 * [m.weights[0]])), u, n),
    "z no tensor": lambda z, m, u, n: (z.numpy(), m, u, n),
    "weight of another shape": lambda z, m, u, n: (z, _layer(m, weights=normal(8, 5)), u, n),
    "weight transposed": lambda z, m, u, n: (z, _layer(m, weights=normal(DIM, 8).t()), u, n),
    "weight in float64": lambda z, m, u, n: (z, _layer(m, weights=m.weights[0].double()), u, n),
    "weight of a subclass": lambda z, m, u, n: (z, _layer(m, weights=m.weights[0].as_subclass(Subclass)), u, n),
    "weight sparse": lambda z, m, u, n: (z, _layer(m, weights=m.weights[0].to_sparse()), u, n),
    "weight missing": lambda z, m, u, n: (z, _layer(m, weights=None), u, n),
    "too few weights": lambda z, m, u, n: (z, m._replace(weights=m.weights[:2]), u, n),
    "too many biases": lambda z, m, u, n: (z, m._replace(biases=(*m.biases, m.biases[0])), u, n),
    "bias of another shape": lambda z, m, u, n: (z, _layer(m, biases=normal(8, 1)), u, n),
    "bias in float64": lambda z, m, u, n: (z, _layer(m, biases=normal(8).double()), u, n),
    "context of another shape": lambda z, m, u, n: (z, m._replace(context_bias=normal(8)), u, n),
    "logit without its head": lambda z, m, u, n: (z, m._replace(logit=torch.zeros(CHAINS, dtype=torch.int64)), u, n),
    "head without its logit": lambda z, m, u, n: (z, m._replace(spec=MLPSpec(*_fields(m.spec), "logit")), u, n),
    "unknown activation": lambda z, m, u, n: (
        z, m._replace(spec=MLPSpec(m.spec.widths, ("sine", "gelu"), (0.0, 0.0))), u, n
    ),
    "coefficients of another length": lambda z, m, u, n: (z, m, u, n + 1),
    "coefficients in float64": lambda z, m, u, n: (
        z, m, u._replace(step_coefficients=u.step_coefficients.double()), n
    ),
    "coefficients per chain of another shape": lambda z, m, u, n: (z, m, u._replace(chain_coefficients=normal(3)), n),
    "prior of another shape": lambda z, m, u, n: (z, m, u._replace(prior_mean=normal(CHAINS)), n),
    "precision of another shape": lambda z, m, u, n: (z, m, u._replace(prior_precision=normal(1, DIM)), n),
    "mask of floats": lambda z, m, u, n: (z, m, u._replace(frozen=z), n),
    "mask of bytes": lambda z, m, u, n: (z, m, u._replace(frozen=torch.ones(DIM, dtype=torch.uint8)), n),
    "noise of another shape": lambda z, m, u, n: (z, m, u._replace(noise=z), n),
    "extra gradient of another shape": lambda z, m, u, n: (z, m, u._replace(extra_grad=z[0]), n),
    "negative key": lambda z, m, u, n: (z, m, u._replace(noise_key=-1), n),
    "key beyond 64 bits": lambda z, m, u, n: (z, m, u._replace(noise_key=2**64), n),
    "key of a bool": lambda z, m, u, n: (z, m, u._replace(noise_key=True), n),
    "key of two": lambda z, m, u, n: (z, m, u._replace(noise_key=torch.tensor([1, 2])), n),
    "key of none": lambda z, m, u, n: (z, m, u._replace(noise_key=torch.tensor([], dtype=torch.int64)), n),
    "key of floats": lambda z, m, u, n: (z, m, u._replace(noise_key=torch.tensor([1.0])), n),
    "negative first step": lambda z, m, u, n: (z, m, u._replace(first_step=-1), n),
    "first chain beyond 32 bits": lambda z, m, u, n: (z, m, u._replace(first_chain=2**32), n),
    "first chain of a float": lambda z, m, u, n: (z, m, u._replace(first_chain=1.0), n),
    "negative steps": lambda z, m, u, n: (z, m, u, -1),
    "steps of a bool": lambda z, m, u, n: (z, m, u._replace(step_coefficients=u.step_coefficients[:1]), True),
    "an update of other fields": lambda z, m, u, n: (z, m, u[:-1], n),
}  # fmt: skip


def _fields(spec):
    return spec.widths, spec.activations, spec.activation_params


@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_left_to_the_checks(change, monkeypatch):
    z, mlp = problem()
    z, mlp, update, n_steps = change(z, mlp, plain_update(STEPS, DIM), STEPS)
    for record in (Record(), Record(True, True)):
        if isinstance(update, Update) or record == Record():
            assert cpu_plain.mlp_langevin_chain(z, mlp, update, n_steps, record) is None
    if not isinstance(update, Update):
        return

    def run():
        try:
            return ops.mlp_langevin_chain(z, mlp, update, n_steps).z
        except (ValueError, AttributeError, TypeError, RuntimeError) as error:
            return type(error), str(error)

    found = run()
    monkeypatch.setattr(cpu_plain, "_kernels", lambda: None)
    expected = run()
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
    if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
        by_formulas = ops.mlp_langevin_chain(z, mlp, update, n_steps, backend="eager").z
        torch.testing.assert_close(found, by_formulas, rtol=1e-4, atol=1e-5)


def test_calls_that_are_not_plain_in_what_only_they_take():
    z, mlp = problem()
    update = plain_update(1, DIM)
    assert cpu_plain.langevin_step(z, z[:3], update) is None
    assert cpu_plain.langevin_step(z, z.t().contiguous().t(), update) is None
    assert cpu_plain.langevin_step(z, None, update) is None
    assert cpu_plain.mlp_energy_grad(z[0], mlp) is None
    wide = random_mlp((DIM, cpu.WIDEST_LANES_LAYER + 1, 1))
    assert cpu_plain.mlp_energy_grad(z, wide) is None
    assert cpu_plain.mlp_langevin_chain(z, wide, update, 1, Record()) is None


def test_the_doors_come_through_here(monkeypatch):
    """Where nothing forbids it, a call of the package makes no other native call."""
    z, mlp = problem()
    update, f = plain_update(STEPS, DIM), jf.EnergyMLP(DIM, 8, 3)

    def runs():
        torch.manual_seed(1)
        return (
            ops.mlp_langevin_chain(z, mlp, update, STEPS).z,
            ops.langevin_step(z, z, update.at_step(0)),
            *ops.mlp_energy_grad(z, mlp),
            f(z).detach(),
            ops.langevin_noise(3, 1, 2, 3),
            jf.FastLangevin(f, n_steps=4)(z),
            *jf.FastLangevin(f, n_steps=4).sample(z, return_info=True, return_trajectory=True)[1],
        )

    monkeypatch.setattr(cpu_plain, "_kernels", lambda: None)
    expected = runs()
    monkeypatch.undo()
    for name in ("mlp_langevin_chain", "langevin_noise", "langevin_step", "mlp_energy_grad", "mlp_energy_layers"):
        monkeypatch.delattr(cpu, name)
    for a, b in zip(runs(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weight", [normal(2, 2), normal(8, 8).double()], ids=["shape", "dtype"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_that_does_not_fit_is_refused_by_forward(weight, plain, grad, monkeypatch):
    """The kernel would read beyond it."""
    if not plain:
        monkeypatch.setattr(cpu_plain, "_kernels", lambda: None)
    f, z = jf.EnergyMLP(DIM, 8, 3), normal(CHAINS, DIM)
    assert fused_energy.native_pass(z, f.mlp(z)) is not None
    f.layers[1].weight = nn.Parameter(weight)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"weight 1 of the energy must be \[8, 8\]"):
        f(z)


def test_another_backend_is_not_answered_here(monkeypatch):
    z, mlp = problem()
    update = plain_update(STEPS, DIM)

    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr(cpu_plain, "mlp_langevin_chain", refuse)
    ops.mlp_langevin_chain(z, mlp, update, STEPS, backend="eager")
    with pytest.raises(ValueError, match="backend must be"):
        ops.mlp_langevin_chain(z, moved(mlp), update, STEPS, backend="nobody")


@pytest.mark.parametrize("thin", [0, -1, True, 1.0, None])
@pytest.mark.parametrize("kept", [(False, False), (True, False), (False, True)])
def test_a_thinning_that_is_none_is_left_to_the_checks(thin, kept):
    z, mlp = problem()
    with pytest.raises(ValueError, match="thin must be an integer >= 1"):
        ops.mlp_langevin_chain(z, mlp, plain_update(STEPS, DIM), STEPS, Record(*kept, thin))


def test_negatives_and_lazy_zeros_outside_of_plain_calls():
    """torch keeps the imaginary part of a conjugate as its negative, and some zeros not at all."""
    z, mlp = problem()
    update = plain_update(STEPS, DIM)
    for backend in ("cpu", "eager"):
        found = ops.mlp_langevin_chain(torch._neg_view(z), mlp, update, STEPS, Record(True), backend=backend)
        assert_same(found, ops.mlp_langevin_chain(-z, mlp, update, STEPS, Record(True), backend=backend))
        assert torch.equal(
            ops.mlp_energy_grad(torch._neg_view(z), mlp, backend=backend)[1],
            ops.mlp_energy_grad(-z, mlp, backend=backend)[1],
        )
        first = update.at_step(0)
        assert torch.equal(
            ops.langevin_step(z, torch._neg_view(z), first, backend=backend),
            ops.langevin_step(z, -z, first, backend=backend),
        )
        lazy, zeros = torch._efficientzerotensor(CHAINS, DIM), torch.zeros(CHAINS, DIM)
        assert torch.equal(
            ops.mlp_energy_grad(lazy, mlp, backend=backend)[1], ops.mlp_energy_grad(zeros, mlp, backend=backend)[1]
        )


def test_mlp_records_of_other_sequences():
    z, mlp = problem()
    as_lists = MLP(mlp.spec, list(mlp.weights), list(mlp.biases))
    for a, b in zip(cpu_plain.mlp_energy_grad(z, as_lists), cpu_plain.mlp_energy_grad(z, mlp), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("thin", [1, 3])
@pytest.mark.parametrize(("n_steps", "chains"), [(7, 5), (7, 0), (1, 1), (700, 100)])  # the last: 70,000 energies
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("container", [list, tuple, torch.cat])
def test_what_a_sampler_tells_does_not_depend_on_the_way(maximize, thin, n_steps, chains, trajectory, container):
    f = jf.EnergyMLP((3, 4), 20, 2)
    sampler = jf.FastLangevin(f, n_steps=n_steps, step_size=0.1, maximize=maximize)
    layers = [normal(chains, 3), normal(chains, 4)]
    z = torch.cat(layers, 1) if container is torch.cat else container(layers)
    options = {"return_info": True, "return_trajectory": trajectory, "thin": thin, "noise_key": 5}
    sampler.sample(z)  # what is usual is known from now on
    end, info = sampler.sample(z, **options)
    other_end, other_info = sampler.sample(z, **options, mask=torch.zeros(7, dtype=torch.bool))  # not plain
    assert type(end) is type(z)
    assert type(info) is jf.LangevinInfo
    for got, expected in zip([*end, *info], [*other_end, *other_info], strict=True):
        assert (got is expected is None) or torch.equal(got, expected)
    alone = [tensor.untyped_storage().data_ptr() for tensor in info if tensor is not None and tensor.numel()]
    assert len(set(alone)) == len(alone)


def test_what_has_no_memory_is_refused_by_name():
    """Its address would be 0."""
    z, mlp = problem()
    own = MLP(mlp.spec, (TwoTensor(mlp.weights[0], mlp.weights[0]), *mlp.weights[1:]), mlp.biases)
    with pytest.raises(ValueError, match=r"memory the kernels can read was expected, got a TwoTensor \[8, 6\] float32"):
        ops.mlp_langevin_chain(z, own, plain_update(STEPS, DIM), STEPS)


def test_forward_of_weights_without_memory_is_torch_s_own():
    f, z = jf.EnergyMLP(DIM, 8, 3), normal(CHAINS, DIM)
    expected = f(z).detach()
    for layer in f.layers:
        layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()))
    torch.testing.assert_close(f(z).a.detach(), expected)
