"""The four operations on every backend of this machine: accuracy, invariances, edges, messages."""

import pytest
import torch
from reference import ONE_LOGIT_HEADS, assert_accurate, moved, plain_update, random_mlp

from jlebm_fast import ops
from jlebm_fast.backends import eager
from jlebm_fast.problem import ACTIVATIONS, Record, Update


def normal(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_chain(backend, mlp, update, z, n_steps, record=Record(True, True, 1)):
    device = backend.device
    ours = ops.mlp_langevin_chain(
        z.to(device), moved(mlp, device), moved(update, device), n_steps, record, backend=backend.name
    )
    plain = eager.mlp_langevin_chain(z, mlp, update, n_steps, record)
    double = {"dtype": torch.float64}
    exact = eager.mlp_langevin_chain(z.double(), moved(mlp, **double), moved(update, **double), n_steps, record)
    for field in ours._fields:
        value = getattr(ours, field)
        if value is None:
            assert getattr(plain, field) is None, field
        elif field == "first_bad_step":
            assert torch.equal(value.cpu(), plain.first_bad_step)
        else:
            assert_accurate(value, getattr(plain, field), getattr(exact, field), field)
    return ours


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_energy_and_gradient_of_every_activation(backend, activation):
    mlp = random_mlp((10, 24, 17, 1), activation)
    z = 2 * normal(37, 10)
    ours = ops.mlp_energy_grad(z.to(backend.device), moved(mlp, backend.device), backend=backend.name)
    plain = eager.mlp_energy_grad(z, mlp)
    exact = eager.mlp_energy_grad(z.double(), moved(mlp, dtype=torch.float64))
    for name, a, b, c in zip(("energy", "grad"), ours, plain, exact, strict=True):
        assert_accurate(a, b, c, name)


@pytest.mark.parametrize("head", [*ONE_LOGIT_HEADS, "logsumexp", "logit"])
def test_chain_of_every_head_with_context(backend, head):
    mlp = random_mlp((6, 16, 16, 1 if head in ONE_LOGIT_HEADS else 5), "silu", head, chains=19, context=True)
    check_chain(backend, mlp, plain_update(5, 6), normal(19, 6), 5)


UPDATES = {
    "no prior": {"prior_precision": None},
    "prior mean per dimension": {"prior_mean": normal(9), "prior_precision": normal(9).exp()},
    "prior per chain": {"prior_mean": normal(21, 9), "prior_precision": normal(21, 9).exp()},
    "coefficients per chain": {"chain_coefficients": normal(21, 3).exp()},
    "frozen dimensions": {"frozen": torch.tensor([True, False, False] * 3)},
    "frozen per chain": {"frozen": normal(21, 9) > 0},
    "noise from outside": {"noise": normal(6, 21, 9)},
    "no noise": {"step_coefficients": torch.tensor([[0.04, 0.04, 0.0]]).repeat(6, 1)},
    "steps that differ": {"step_coefficients": normal(6, 3).abs() / 5},
    "place in the noise field": {"first_step": 1000, "first_chain": 70000, "noise_key": 2**64 - 1},
}


@pytest.mark.parametrize("changes", UPDATES.values(), ids=UPDATES)
def test_chain_under_every_update(backend, changes):
    mlp = random_mlp((9, 20, 20, 1), "gelu")
    result = check_chain(backend, mlp, plain_update(6, 9, **changes), normal(21, 9), 6)
    if "frozen" in changes:
        frozen = changes["frozen"].expand(21, 9)
        assert torch.equal(result.z.cpu()[frozen], normal(21, 9)[frozen])


@pytest.mark.parametrize("changes", UPDATES.values(), ids=UPDATES)
def test_step_under_every_update(backend, changes):
    z, grad = normal(21, 9), normal(21, 9, seed=8)
    update = plain_update(1, 9, **changes)
    update = update._replace(step_coefficients=update.step_coefficients[:1])
    if update.noise is not None:
        update = update._replace(noise=update.noise[:1])
    ours = ops.langevin_step(
        z.to(backend.device), grad.to(backend.device), moved(update, backend.device), backend=backend.name
    )
    exact = eager.langevin_step(z.double(), grad.double(), moved(update, dtype=torch.float64))
    assert_accurate(ours, eager.langevin_step(z, grad, update), exact)


def test_extra_gradient(backend):
    mlp = random_mlp((9, 20, 1))
    check_chain(backend, mlp, plain_update(1, 9, extra_grad=normal(21, 9, seed=9)), normal(21, 9), 1)


@pytest.mark.parametrize("chains", [0, 1, 2, 17, 130])
@pytest.mark.parametrize("dim", [1, 3, 4, 33])
def test_sizes(backend, chains, dim):
    check_chain(backend, random_mlp((dim, 15, 1), "tanh"), plain_update(3, dim), normal(chains, dim), 3)


@pytest.mark.parametrize("n_steps", [0, 1, 5])
@pytest.mark.parametrize("thin", [1, 2, 9])
def test_thinning(backend, n_steps, thin):
    record = Record(True, True, thin)
    result = check_chain(
        backend, random_mlp((4, 9, 1), "silu"), plain_update(n_steps, 4), normal(5, 4), n_steps, record
    )
    assert result.trajectory.shape == (n_steps // thin, 5, 4)


@pytest.mark.parametrize("widths", [(3, 1, 1), (5, 64, 2, 31, 1), (2, *([6] * 16), 1), (4, 520, 1)])
def test_widths_and_depths(backend, widths):
    check_chain(backend, random_mlp(widths, "mish"), plain_update(3, widths[0]), normal(11, widths[0]), 3)


def test_splitting_chains_and_steps_changes_nothing(backend):
    mlp, z = moved(random_mlp((7, 20, 20, 1)), backend.device), normal(40, 7).to(backend.device)

    def run(z, n_steps, **place):
        update = moved(plain_update(n_steps, 7, **place), backend.device)
        return ops.mlp_langevin_chain(z, mlp, update, n_steps, backend=backend.name).z

    whole = run(z, 10)
    torch.testing.assert_close(torch.cat([run(z[:13], 10), run(z[13:], 10, first_chain=13)]), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(run(run(z, 4), 6, first_step=4), whole, rtol=0, atol=1e-5)


def test_nan_stays_in_its_chain_and_is_named(backend):
    mlp, z = moved(random_mlp((7, 20, 1)), backend.device), normal(40, 7).to(backend.device)
    update = moved(plain_update(6, 7, noise=normal(6, 40, 7)), backend.device)
    clean = ops.mlp_langevin_chain(z, mlp, update, 6, Record(True), backend=backend.name)
    sick, noise = z.clone(), update.noise.clone()
    sick[3, 2] = float("nan")
    noise[4, 11, 0] = float("inf")
    result = ops.mlp_langevin_chain(sick, mlp, update._replace(noise=noise), 6, Record(True), backend=backend.name)
    others = [i for i in range(40) if i not in (3, 11)]
    assert torch.equal(result.z[others], clean.z[others])
    expected = torch.full((40,), -1)
    expected[3], expected[11] = 0, 4
    assert torch.equal(result.first_bad_step.cpu(), expected)


def test_a_move_beyond_float32_between_finite_points_is_not_bad(backend):
    mlp, z = moved(random_mlp((7, 20, 1)), backend.device), normal(40, 7).to(backend.device)
    z[5, 2] = 3e38
    noise = torch.zeros(2, 40, 7)
    noise[0, 5, 2] = -3e38  # the prior takes z to 0, the noise to the other end
    coefficients = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    update = moved(Update(coefficients, prior_precision=torch.ones(7), noise=noise), backend.device)
    result = ops.mlp_langevin_chain(z, mlp, update, 2, Record(True), backend=backend.name)
    assert result.z[5, 2] == -3e38
    assert (result.first_bad_step == -1).all()


def test_inputs_are_untouched_and_strides_do_not_matter(backend):
    mlp = moved(random_mlp((6, 12, 1)), backend.device)
    update = moved(plain_update(4, 6), backend.device)
    z = normal(6, 15).to(backend.device).t()
    before = z.clone()
    out = ops.mlp_langevin_chain(z, mlp, update, 4, backend=backend.name).z
    assert torch.equal(z, before)
    assert torch.equal(out, ops.mlp_langevin_chain(z.contiguous(), mlp, update, 4, backend=backend.name).z)
    assert torch.equal(z, before)


BAD = {
    "z of another width": (
        lambda z, m, u: (z[:, :4], m, u),
        r"z must be \[chains, 6\] float32 or float64, got \[5, 4\]",
    ),
    "half precision z": (lambda z, m, u: (z.half(), m, u), r"z must be .* got \[5, 6\] float16 on cpu"),
    "weights in float64": (lambda z, m, u: (z, moved(m, dtype=torch.float64), u), r"weight 0 of the energy must be"),
    "too few steps": (lambda z, m, u: (z, m, u._replace(step_coefficients=u.step_coefficients[:2])), "step_coeff"),
    "noise of another shape": (
        lambda z, m, u: (z, m, u._replace(noise=z)),
        r"noise must be \[4, 5, 6\] float32 on cpu",
    ),
    "prior of another shape": (lambda z, m, u: (z, m, u._replace(prior_mean=z[:, 0])), r"prior_mean must be \[6\] or"),
    "mask of floats": (
        lambda z, m, u: (z, m, u._replace(frozen=z)),
        r"mask must be bool \[6\] or \[5, 6\] on cpu, got",
    ),
    "negative key": (
        lambda z, m, u: (z, m, u._replace(noise_key=-1)),
        r"noise_key must be an integer in \[0, 2\*\*64\)",
    ),
    "first_chain beyond 32 bits": (lambda z, m, u: (z, m, u._replace(first_chain=2**32)), "first_chain must be"),
    "logit without its head": (lambda z, m, u: (z, m._replace(logit=torch.zeros(5)), u), "head 'logit'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_gives_the_same_message_on_every_backend(backend, change, message):
    if backend.device != "cpu":
        pytest.skip("the messages name the device; one device is enough")
    z, mlp, update = change(torch.zeros(5, 6), random_mlp((6, 12, 1)), plain_update(4, 6))
    with pytest.raises(ValueError, match=message):
        ops.mlp_langevin_chain(z, mlp, update, 4, backend=backend.name)


def test_tensors_that_torch_keeps_as_their_negatives(backend):
    """The imaginary part of a conjugate is such a one; its memory alone would be read with the wrong sign."""

    def kept_as(tensor):
        return torch._neg_view(-tensor)

    mlp = moved(random_mlp((6, 8, 5, 1), "gelu", chains=9, context=True), backend.device)
    update = plain_update(4, 6, prior_mean=normal(6), extra_grad=normal(9, 6), chain_coefficients=normal(9, 3).exp())
    update, z = moved(update, backend.device), normal(9, 6).to(backend.device)
    of_mlp = mlp._replace(
        weights=tuple(map(kept_as, mlp.weights)),
        biases=tuple(map(kept_as, mlp.biases)),
        context_bias=kept_as(mlp.context_bias),
    )
    floats = {k: v for k, v in update._asdict().items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    of_update = update._replace(**{k: kept_as(v) for k, v in floats.items()})
    assert len(floats) >= 4
    expected = ops.mlp_langevin_chain(z, mlp, update, 4, Record(True), backend=backend.name)
    found = ops.mlp_langevin_chain(kept_as(z), of_mlp, of_update, 4, Record(True), backend=backend.name)
    for a, b in zip(found[:5], expected[:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        ops.mlp_energy_grad(kept_as(z), of_mlp, backend=backend.name),
        ops.mlp_energy_grad(z, mlp, backend=backend.name),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
