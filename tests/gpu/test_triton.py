"""The Triton kernels on a device; with TRITON_INTERPRET=1 JLEBM_GPU_DRY_RUN=1 rehearsed by Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from mlp_host import cast, coefficients, make_mlp, plain_energy_grad, rms, typical_rms

from jlebm_fast import backends, precision
from jlebm_fast.backends import eager
from jlebm_fast.backends import triton as ours
from jlebm_fast.backends.triton_kernels import tiles
from jlebm_fast.problem import Record, Update

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("triton") is not None, reason=str(backends.unavailable_reason("triton"))
)
REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
SHAPES = {"HS": [16, 50, 50, 50, 50, 1], "FID": [50, 100, 100, 1], "LEBM": [100, 200, 200, 1]}
KEY = 0x0123456789ABCDEF
# seeds of 5000 starts from which no unit of the leaky nets comes closer to its kink than 8e-6: no slope hangs on
# float32's rounding
NO_KINK = {"HS": 23, "FID": 33, "LEBM": 2}


def to(record):
    def one(value):
        if isinstance(value, tuple):
            return tuple(one(v) for v in value)
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    return record._replace(**{f: one(v) for f, v in record._asdict().items() if f != "spec"})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(shape, chains, n_steps, seed=1):
    mlp = make_mlp(SHAPES[shape], "gelu" if shape == "LEBM" else "leaky_relu", seed=seed)
    dim = mlp.spec.dim
    update = Update(coefficients(n_steps), prior_precision=torch.ones(dim), noise=normal(n_steps, chains, dim, seed=5))
    return mlp, normal(chains, dim, seed=NO_KINK[shape]), update


def rounded(t):
    return t.bfloat16().float()


def plain(z, mlp, name):
    """f and its gradient in plain torch; in bf16 with the operands of every product rounded and nothing else."""
    if name != "bf16":
        return plain_energy_grad(z, mlp, name)
    h, slopes = z, []
    kinds = zip(mlp.weights, mlp.biases, mlp.spec.activations, mlp.spec.activation_params)  # the last pair is left out
    for weight, bias, kind, parameter in kinds:
        a = rounded(h) @ rounded(weight).T + bias
        slopes.append(eager.activation_slope(kind, parameter, a))
        h = eager.activation(kind, parameter, a)
    logits = rounded(h) @ rounded(mlp.weights[-1]).T + mlp.biases[-1]
    energy, slope = eager.head_value_and_slope(mlp, logits)
    delta = rounded(slope) @ rounded(mlp.weights[-1])
    for weight, slope in zip(reversed(mlp.weights[:-1]), reversed(slopes), strict=True):
        delta = rounded(delta * slope) @ rounded(weight)
    return energy, delta


@pytest.mark.parametrize(("n_steps", "chains", "dim"), [(3, 7, 10), (2, 1, 1), (1, 1000, 100), (60, 100, 16)])
def test_noise_is_that_of_the_cpu(n_steps, chains, dim):
    where = {"first_step": 2**32 - 2, "first_chain": 2**32 - 5, "stream": 1}
    got = ours.langevin_noise(KEY, n_steps, chains, dim, device=DEVICE, **where)
    assert torch.equal(got.cpu(), eager.langevin_noise(KEY, n_steps, chains, dim, **where))


def test_noise_of_a_chain_is_that_of_the_cpu():
    """A flat energy and c_grad = c_prior = 0: a chain of one step adds c_noise eps, in both regimes, bit for bit."""
    mlp, z, update = problem("HS", 40, 1)
    rows = torch.tensor([[0.0, 0.0, 1.0]])
    update = update._replace(step_coefficients=rows, prior_precision=None, noise=None, noise_key=KEY)
    flat = torch.zeros_like(z)
    for regime in ("resident", "streamed"):
        with tiles.override(regime=regime), precision.using("bf16"):
            got = ours.mlp_langevin_chain(flat.to(DEVICE), to(mlp), to(update), 1, Record()).z
        assert torch.equal(got.cpu(), eager.langevin_noise(KEY, 1, *z.shape)[0])


@pytest.mark.parametrize("name", precision.NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chains", [1, 100, 5000])
def test_energy_and_gradient(name, shape, chains):
    # twenty chains at least, one by one where one is asked for: the error of a single number is a matter of luck
    mlp, z, _ = problem(shape, 20 if REHEARSAL else max(chains, 20), 1)
    with precision.using(name):
        calls = [ours.mlp_energy_grad(part.to(DEVICE), to(mlp)) for part in z.split(chains)]
    got = [torch.cat(parts) for parts in zip(*calls, strict=True)]
    exact = eager.mlp_energy_grad(z.double(), cast(mlp, torch.float64))
    for mine, theirs, oracle in zip(got, plain(z, mlp, name), exact, strict=True):
        error = rms if name == "fp32" else typical_rms
        assert error(mine.cpu(), oracle) <= 2 * error(theirs, oracle) + 1e-6


@pytest.mark.parametrize("name", precision.NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_chain(name, shape):
    n_steps = 4
    mlp, z, update = problem(shape, 20 if REHEARSAL else 300, n_steps, seed=3)
    with precision.using(name):
        got = ours.mlp_langevin_chain(z.to(DEVICE), to(mlp), to(update), n_steps, Record(True, True))
    wide = cast(mlp, torch.float64), cast(update, torch.float64)
    exact = eager.mlp_langevin_chain(z.double(), *wide, n_steps, Record()).z
    for step in range(n_steps):
        z = eager.langevin_step(z, plain(z, mlp, name)[1], update.at_step(step))
    assert rms(got.z.cpu(), exact) <= 2 * rms(z, exact) + 1e-6
    assert torch.equal(got.trajectory[-1], got.z)
    assert got.first_bad_step.eq(-1).all()


@pytest.mark.parametrize("regime", ["resident", "streamed"])
def test_repeated_calls_agree_in_every_bit(regime):
    """A missing barrier shows as a difference between calls."""
    mlp, z, update = problem("HS", 20 if REHEARSAL else 3000, 3)
    with tiles.override(regime=regime), precision.using("tf32"):
        ends = [ours.mlp_langevin_chain(z.to(DEVICE), to(mlp), to(update), 3, Record()).z for _ in range(4)]
    assert all(torch.equal(end, ends[0]) for end in ends)


@pytest.mark.skipif(REHEARSAL, reason="needs a device: graphs are not rehearsed")
@pytest.mark.parametrize("shape", ["HS", "LEBM"])
def test_a_replayed_graph_draws_fresh_noise(shape):
    mlp, z, update = problem(shape, 100, 5)
    mlp, z = to(mlp), z.to(DEVICE)
    key = torch.tensor([7], device=DEVICE)
    update = to(update._replace(noise=None))._replace(noise_key=key)

    def chain():
        end = ours.mlp_langevin_chain(z, mlp, update, 5, Record()).z
        ours.advance_noise_key(key)
        return end

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end = chain()
    for _ in range(3):
        before = int(key) % (1 << 64)
        graph.replay()
        expected = ours.mlp_langevin_chain(z, mlp, update._replace(noise_key=before), 5, Record()).z
        assert torch.equal(end, expected)
        assert int(key) % (1 << 64) != before


@pytest.mark.skipif(REHEARSAL, reason="needs a device: graphs are not rehearsed")
@pytest.mark.parametrize("regime", ["resident", "streamed"])
def test_a_first_call_in_a_capture_is_refused(regime):
    mlp = to(make_mlp([12, 40, 40, 1], "silu"))  # a shape and an activation that no other test has
    z = normal(30, 12).to(DEVICE)

    def captured():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            energy, _ = ours.mlp_energy_grad(z + 0.0, mlp)
        graph.replay()
        return energy

    with tiles.override(regime=regime):
        with pytest.raises(RuntimeError, match="once before the capture"):
            captured()
        energy, _ = ours.mlp_energy_grad(z, mlp)
        assert torch.equal(captured(), energy)


@pytest.mark.parametrize("shape", [(50, 16), (50, 50), (1, 50), (20, 100)])
def test_spectral_norms(shape):
    pairs = [(normal(*shape, seed=i), torch.nn.functional.normalize(normal(shape[0]), dim=0)) for i in range(3)]
    there = [tuple(t.to(DEVICE) for t in pair) for pair in pairs]
    for (weight, _), (u, v, sigma, normalised) in zip(pairs, ours.top_singulars(there, 1e-4), strict=True):
        exact = torch.linalg.matrix_norm(weight.double(), 2)
        torch.testing.assert_close(sigma.cpu().double(), exact.reshape(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(normalised.cpu().double(), weight.double() / exact, rtol=1e-5, atol=1e-7)
        assert float(u.cpu() @ weight @ v.cpu()) == pytest.approx(float(exact), rel=1e-5)
