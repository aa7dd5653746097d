"""Gradients in the parameters, summed over chains in one native call, against the same sums in float64."""

import pytest
import torch
from reference import random_mlp

from jlebm_fast.backends import _native, cpu_plain

pytestmark = [
    pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason())),
    pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10"),
]


def normal(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(widths, chains):
    head = "identity" if widths[-1] == 1 else "logsumexp"
    units = sum(widths[1:])
    return (
        normal(chains, widths[0]),
        random_mlp(widths, "gelu", head),
        normal(units - widths[-1], chains, seed=8),
        normal(units, chains, seed=9),
        normal(chains, seed=10),
    )


def grads(given, of_weights=True, of_biases=True):
    n = len(given[1].weights)
    flags = [[flag] * n if isinstance(flag, bool) else flag for flag in (of_weights, of_biases)]
    return cpu_plain.mlp_weight_grads(*given, *flags)


def sums(given):
    """In float64, and what float32 may lose: half an ulp of a sum of as many terms of that size, some times over."""
    z, mlp, hidden, delta, cotangent = given
    widths = mlp.spec.widths
    scaled = (delta.double() * cotangent.double()).split_with_sizes(widths[1:])
    below = [z.t().double(), *hidden.double().split_with_sizes(widths[1:-1])]
    exact = [d @ h.t() for d, h in zip(scaled, below, strict=True)], [d.sum(1) for d in scaled]
    sizes = [d.abs() @ h.abs().t() for d, h in zip(scaled, below, strict=True)], [d.abs().sum(1) for d in scaled]
    return exact, sizes


# around every tile: 3 or 4 rows of delta, 12 or 16 a unit; 4 or 6, 2, 1 of h; 4, 8, 16 lanes; 512 chains a chunk
WIDTHS = [(1, 1, 1), (2, 3, 1), (6, 4, 5, 2), (7, 12, 13, 1), (16, 50, 50, 50, 50, 1), (50, 17, 16, 3), (5, 25, 20)]
CHAINS = [0, 1, 3, 4, 7, 8, 9, 16, 37, 100, 511, 512, 513, 1030]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("chains", CHAINS)
def test_against_float64(widths, chains):
    given = problem(widths, chains)
    exact, sizes = sums(given)
    for found, expected, size in zip(grads(given), exact, sizes, strict=True):
        for a, b, s in zip(found, expected, size, strict=True):
            assert a.shape == b.shape
            assert ((a.double() - b).abs() <= 5e-7 * s + 1e-30).all()


def test_only_what_is_asked_for():
    given = problem((6, 9, 8, 1), 37)
    weights, biases = grads(given)
    found = grads(given, [True, False, True], [False, True, False])
    assert [g is None for g in found[0]] == [False, True, False]
    assert [g is None for g in found[1]] == [True, False, True]
    assert torch.equal(found[0][0], weights[0])
    assert torch.equal(found[0][2], weights[2])
    assert torch.equal(found[1][1], biases[1])


def test_no_bit_depends_on_threads():
    given = problem((16, 50, 60, 1), 1000)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(grads(given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(other[0] + other[1], found[0][0] + found[0][1], strict=True):
            assert torch.equal(a, b)


def test_a_nan_reaches_the_sums_it_belongs_to_and_no_other():
    given = problem((6, 9, 8, 1), 21)
    given[2][4, 20] = float("nan")  # the fifth unit of the first hidden layer, in the last chain
    weights, biases = grads(given)
    expected = torch.zeros(8, 9, dtype=torch.bool)
    expected[:, 4] = True
    assert torch.equal(weights[1].isnan(), expected)
    assert not any(g.isnan().any() for g in (weights[0], weights[2], *biases))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, normal(20, 6)),
        (0, normal(6, 21).t()),
        (2, normal(16, 21)),
        (2, normal(17, 21).double()),
        (3, normal(17, 21)),
        (3, normal(21, 18).t()),
        (4, normal(20)),
        (4, normal(1).expand(21)),
        (4, torch._neg_view(normal(21))),
    ],
)
def test_what_does_not_fit_is_left_to_torch(place, value):
    given = list(problem((6, 9, 8, 1), 21))
    given[place] = value
    assert grads(given) is None
