"""The spectral norms of a net's weights in one launch, against float64."""

import math

import pytest
import torch

from jlebm_fast.backends import triton as backend

TOLERANCE = 1e-4
SHAPES = [(50, 16), (50, 50), (1, 50), (17, 3), (70, 120), (3, 1), (1, 1)]


def normal(*shape, seed=51):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(n, seed=52):
    return torch.nn.functional.normalize(normal(n, seed=seed), dim=0)


def test_largest_singular_values():
    pairs = [(normal(*shape, seed=i), start(shape[0])) for i, shape in enumerate(SHAPES)]
    for (weight, _), (u, v, sigma, normalised) in zip(pairs, backend.top_singulars(pairs, TOLERANCE), strict=True):
        exact = torch.linalg.matrix_norm(weight.double(), 2)
        torch.testing.assert_close(sigma.double(), exact.reshape(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(normalised.double(), weight.double() / exact, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(u @ weight @ v, sigma[0], rtol=1e-5, atol=0)
        off = weight.double() @ (weight.double().T @ u.double()) - sigma.double() ** 2 * u.double()
        assert off.norm() <= 2 * TOLERANCE * sigma.double() ** 2


@pytest.mark.parametrize("bad_start", [0.0, math.nan, math.inf])
def test_a_start_of_no_use_is_replaced(bad_start):
    weight = normal(20, 12)
    ((u, _, sigma, _),) = backend.top_singulars([(weight, torch.full((20,), bad_start))], TOLERANCE)
    assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-5)
    assert torch.isfinite(u).all()


def test_kept_vectors_and_weights_without_a_norm():
    """As on the other backends: zero has sigma 0, what is not finite has NaN, and neither is kept."""
    weights = [normal(6, 4), torch.zeros(3, 4), normal(5, 3).fill_(math.nan)]
    buffers = [(start(w.shape[0]), start(w.shape[1])) for w in weights]
    before = [tuple(b.clone() for b in pair) for pair in buffers]
    pairs = [(w, pair[0]) for w, pair in zip(weights, buffers, strict=True)]
    found = backend.top_singulars(pairs, TOLERANCE, buffers)
    assert torch.equal(buffers[0][0], found[0][0])
    assert torch.equal(buffers[0][1], found[0][1])
    for i in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(buffers[i], before[i], strict=True))
    assert found[1][2].item() == 0.0
    assert math.isnan(found[2][2].item())
    assert found[2][3].isnan().all()


def test_too_wide_weights_are_refused():
    assert backend.spectral_unsupported_reason([(200, 100), (20_000, 200)], torch.device("cpu")) is None
    assert "up to 8192 inputs, got 9000" in backend.spectral_unsupported_reason([(3, 9000)], torch.device("cpu"))
