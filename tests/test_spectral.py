"""The spectral norm's rule: the largest singular value, from any start, for any weight."""

import math

import pytest
import torch

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
