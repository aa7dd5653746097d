"""The spectral norm's rule: the largest singular value, from any start, for any weight."""

import math

import pytest
import torch

from jlebm_fast import spectral
from jlebm_fast.backends import _native
from jlebm_fast.spectral import normalised_weights, top_singular_triple, top_singulars

SHAPES = [(50, 16), (50, 50), (1, 50), (17, 3), (300, 300), (3, 1)]


def normal(*shape, seed=51):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(n):
    return torch.nn.functional.normalize(normal(n, seed=52), dim=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_singular_vectors(shape, dtype):
    weight, u = normal(*shape).to(dtype), start(shape[0]).to(dtype)
    before = u.clone()
    (top,) = top_singulars([(weight, u)])
    exact = torch.linalg.matrix_norm(weight.double(), 2).item()
    assert top.sigma == pytest.approx(exact, rel=1e-5)
    assert top.u @ weight @ top.v == pytest.approx(exact, rel=1e-5)
    torch.testing.assert_close(top.normalised, weight / exact, rtol=1e-5, atol=1e-7)
    assert torch.equal(normalised_weights([(weight, u)])[0], top.normalised)
    assert torch.equal(u, before)


def test_many_at_once_are_each_alone():
    pairs = [(normal(*shape, seed=i), start(shape[0])) for i, shape in enumerate(SHAPES)]
    for top, pair in zip(top_singulars(pairs), pairs, strict=True):
        (alone,) = top_singulars([pair])
        assert top.sigma == alone.sigma
        assert torch.equal(top.u, alone.u)


def test_native_iterations_agree_with_the_matrix_library():
    weight, u = normal(50, 50), start(50)
    (top,) = top_singulars([(weight, u)])
    sigma = top_singular_triple(weight, u)[2]
    assert top.sigma == pytest.approx(sigma, rel=1e-6)


def with_singular_values(n_out, n_in, values):
    left, right = (torch.linalg.qr(normal(n, len(values), seed=n).double())[0] for n in (n_out, n_in))
    return left @ torch.diag(values) @ right.T


@pytest.mark.skipif(_native.unavailable_reason() is not None, reason="the compiled module is missing")
@pytest.mark.parametrize("shape", [(50, 50), (2, 2), (50, 16), (10, 90), (120, 130), (250, 250)])
@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
def test_close_singular_values_need_no_decomposition(shape, gap, monkeypatch):
    """A norm in training brings them together; power iterations alone would take thousands of products."""
    values = torch.linspace(1 - gap, 0.2, min(shape), dtype=torch.float64)
    values[0], values[1] = 1.0, 1 - gap
    weight = 3 * with_singular_values(*shape, values)
    monkeypatch.setattr(spectral, "_of_one", None)
    for seed in range(5):
        u = torch.nn.functional.normalize(normal(shape[0], seed=seed), dim=0)
        (top,) = top_singulars([(weight.float(), u)])
        residual = weight @ (weight.T @ top.u.double()) - top.sigma**2 * top.u.double()
        tolerance = spectral.TOLERANCE[torch.float32]
        assert residual.norm() <= tolerance * top.sigma**2
        # of second order in the residual, and never more than it
        assert top.sigma == pytest.approx(3.0, rel=min(tolerance, tolerance**2 / max(gap, 1e-12)) + 3e-7)
        assert top.u.norm() == pytest.approx(1.0, rel=1e-5)
        assert top.v.norm() == pytest.approx(1.0, rel=1e-5)


def test_weights_that_power_iterations_cannot_serve():
    twice = torch.diag(torch.tensor([1.0, 1.0 - 1e-5, 0.5]))
    zero = torch.zeros(3, 4)
    orthogonal = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    for weight, exact in ((twice, 1.0), (zero, 0.0), (orthogonal, 2.0)):
        u = torch.zeros(weight.shape[0])
        u[-1 if weight is orthogonal else 0] = 1.0
        (top,) = top_singulars([(weight, u)])
        assert top.sigma == pytest.approx(exact, abs=1e-4)
    sick = normal(5, 5)
    sick[2, 3] = math.inf
    assert math.isnan(top_singulars([(sick, start(5))])[0].sigma)
    assert normalised_weights([(sick, start(5))])[0].isnan().all()
