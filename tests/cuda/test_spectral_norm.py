"""The spectral norms of a net's weights in one launch, through the kernels' host build, against float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from host_build import H100, host_module, on_host

import jlebm_fast as jf
from jlebm_fast import registration, spectral
from jlebm_fast.backends import eager
from jlebm_fast.problem import MLP

TOLERANCE = 1e-4
SHAPES = [(50, 16), (50, 50), (1, 50), (17, 3), (33, 700), (600, 40), (3, 1), (1, 1)]


def normal(*shape, seed=51):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(n, seed=52):
    return torch.nn.functional.normalize(normal(n, seed=seed), dim=0)


def residual(weight, u, v, sigma):
    """Of the rule in `spectral.py`, relative to sigma²: |W Wᵀ u − sigma² u|."""
    weight, u = weight.double(), u.double()
    return ((weight @ (weight.T @ u) - sigma.double() ** 2 * u).norm() / sigma.double() ** 2).item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_largest_singular_values(seed):
    """All shapes in one launch, whatever the order of the threads."""
    pairs = [(normal(*shape, seed=i), start(shape[0])) for i, shape in enumerate(SHAPES)]
    for (weight, _), (u, v, sigma, normalised) in zip(
        pairs, on_host(seed).top_singulars(pairs, TOLERANCE), strict=True
    ):
        exact = torch.linalg.matrix_norm(weight.double(), 2)
        torch.testing.assert_close(sigma.double(), exact.reshape(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(normalised.double(), weight.double() / exact, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(u @ weight @ v, sigma[0], rtol=1e-5, atol=0)
        assert residual(weight, u, v, sigma) <= 2 * TOLERANCE
        torch.testing.assert_close(u.norm(), torch.tensor(1.0))
        torch.testing.assert_close(v.norm(), torch.tensor(1.0))


def test_result_does_not_depend_on_the_order_of_threads():
    pairs = [(normal(*shape, seed=i), start(shape[0])) for i, shape in enumerate(SHAPES)]
    first, second = (on_host(seed).top_singulars(pairs, TOLERANCE) for seed in (3, 4))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_start_near_the_answer_stays():
    weight = normal(50, 50)
    ((u, _, sigma, _),) = on_host().top_singulars([(weight, start(50))], 1e-6)
    ((again, _, _, _),) = on_host().top_singulars([(weight, u)], TOLERANCE)
    exact = torch.linalg.matrix_norm(weight.double(), 2).item()
    assert sigma.item() == pytest.approx(exact, rel=1e-6)
    torch.testing.assert_close(again, u, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad_start", [0.0, math.nan, math.inf])
def test_a_start_of_no_use_is_replaced(bad_start):
    weight = normal(20, 12)
    ((u, _, sigma, _),) = on_host().top_singulars([(weight, torch.full((20,), bad_start))], TOLERANCE)
    assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-5)
    assert torch.isfinite(u).all()


def test_close_singular_values_converge():
    """Where the squares differ by 2.7e-4, power iterations are slowest, and still within the kernel's bound."""
    weight = torch.diag(torch.tensor([1.0, math.sqrt(1 - 2.7e-4), 0.5]))
    u = torch.nn.functional.normalize(torch.tensor([0.35, 0.93, 0.1]), dim=0)
    ((u, v, sigma, _),) = on_host().top_singulars([(weight, u)], TOLERANCE)
    assert residual(weight, u, v, sigma) <= 1.1 * TOLERANCE
    assert sigma.item() == pytest.approx(1.0, abs=2e-4)


def test_weights_without_a_norm():
    """As on the CPU: zero has sigma 0, and what is not finite has sigma NaN and a weight that says so."""
    sick = normal(5, 5)
    sick[2, 3] = math.inf
    found = on_host().top_singulars([(torch.zeros(3, 4), start(3)), (sick, start(5))], TOLERANCE)
    assert found[0][2].item() == 0.0
    assert math.isnan(found[1][2].item())
    assert found[1][3].isnan().all()


def test_kept_vectors_are_written_where_there_is_a_norm():
    weights = [normal(6, 4), normal(5, 3).fill_(math.nan), torch.zeros(3, 4)]
    buffers = [(start(w.shape[0]), start(w.shape[1])) for w in weights]
    before = [tuple(b.clone() for b in pair) for pair in buffers]
    pairs = [(w, pair[0]) for w, pair in zip(weights, buffers, strict=True)]
    found = on_host().top_singulars(pairs, TOLERANCE, buffers)
    assert torch.equal(buffers[0][0], found[0][0])
    assert torch.equal(buffers[0][1], found[0][1])
    for i in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(buffers[i], before[i], strict=True))


def test_more_weights_than_one_launch_takes():
    pairs = [(normal(4, 3, seed=i), start(4)) for i in range(40)]
    for (weight, _), (_, _, sigma, _) in zip(pairs, on_host().top_singulars(pairs, TOLERANCE), strict=True):
        assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-5)


def test_weights_in_other_layouts():
    weight = normal(12, 20).t()
    ((_, _, _, normalised),) = on_host().top_singulars([(weight, start(40)[::2])], TOLERANCE)
    exact = torch.linalg.matrix_norm(weight.double(), 2)
    torch.testing.assert_close(normalised.double(), weight.double() / exact, rtol=1e-5, atol=1e-7)


def test_a_weight_that_does_not_fit_is_refused():
    kernels = on_host()
    assert kernels.spectral_unsupported_reason([(50, 50), (1000, 1000)], torch.device("cpu")) is None
    reason = kernels.spectral_unsupported_reason([(50, 50), (40_000, 10)], torch.device("cpu"))
    assert "[40000, 10] need" in reason
    with pytest.raises(ValueError, match="shared memory"):
        host_module().cuda_spectral_norms(
            weights=[(40_000, 10, *[0] * 8)], tolerance=TOLERANCE, launch=(0, 0, 0, 0, 0, *H100)
        )


# --- as the package calls it, with the host build in the place of a device --------------------------------------------


@pytest.fixture
def on_a_device(monkeypatch):
    """The device's kernels serve every float32 weight; the list of launches so far."""
    launches = []

    class Device:
        @staticmethod
        def top_singulars(pairs, tolerance, keep=None):
            launches.append(len(pairs))
            return on_host().top_singulars(pairs, tolerance, keep)

    monkeypatch.setattr(
        spectral, "_device_kernels", lambda pairs: Device if pairs[0][0].dtype is torch.float32 else None
    )
    monkeypatch.setattr(spectral, "_fits_native", lambda weight, u: False)
    return launches


def energy():
    torch.manual_seed(53)
    return jf.EnergyMLP((2, 6), 12, 2, spectral_norm=True)


def old_style():
    torch.manual_seed(54)
    layers = [torch.nn.Linear(8, 12), torch.nn.Linear(12, 12), torch.nn.Linear(12, 1)]
    first, second, last = (torch.nn.utils.spectral_norm(layer) for layer in layers)
    return torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)


def test_a_training_forward_keeps_its_vectors(on_a_device):
    f, z = energy(), normal(9, 8)
    twin = copy.deepcopy(f)
    with torch.no_grad():
        for layer, other in zip(f.layers, twin.layers, strict=True):
            other.weight.copy_(layer.weight.mul_(1.1).add_(0.02 * normal(*layer.weight.shape)))
    before = f.layers[0].weight_u.clone()
    on_a_device.clear()
    f(z).sum().backward()
    assert on_a_device == [3]  # one launch for the three weights
    assert not torch.equal(f.layers[0].weight_u, before)
    exact = [layer.weight.detach().double() for layer in twin.layers]
    for layer, weight in zip(f.layers, exact, strict=True):
        sigma = layer.weight_u.double() @ weight @ layer.weight_v.double()
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(weight, 2), rtol=1e-6, atol=0)
    leaves = [w.requires_grad_() for w in exact]
    normed = [w / torch.linalg.matrix_norm(w, 2) for w in leaves]
    biases = tuple(layer.bias.double() for layer in twin.layers)
    eager.mlp_forward(z.double(), MLP(f.spec, tuple(normed), biases))[0].sum().backward()
    for layer, want in zip(f.layers, leaves, strict=True):
        torch.testing.assert_close(layer.weight.grad.double(), want.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("net", [energy, old_style])
def test_a_chain_normalises_in_one_launch(on_a_device, net):
    f, z = net(), normal(5, 8)
    sampler = jf.FastLangevin(f, n_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectral, "_device_kernels", lambda pairs: None)
        expected = sampler.sample(z, noise_key=3)
    on_a_device.clear()
    for _ in range(2):  # the second from the vectors of the first
        torch.testing.assert_close(sampler.sample(z, noise_key=3), expected, rtol=0, atol=1e-5)
    assert on_a_device == [3, 3]
    with torch.no_grad():
        next(p for p in f.parameters() if p.dim() == 2).mul_(2.0)
    torch.testing.assert_close(sampler.sample(z, noise_key=3), expected, rtol=0, atol=1e-4)


def test_the_registered_operator_gives_a_number(on_a_device):
    weight = normal(6, 4)
    u, v, sigma = registration.operators.top_singular.default(weight, start(6))
    assert on_a_device == [1]
    assert sigma.shape == ()
    assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-5)
    assert u.shape == (6,)
    assert v.shape == (4,)
