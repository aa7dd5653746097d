"""Results below 2^-126 are 0 in the CPU kernels, in all threads and whatever mode the caller is in, and only there."""

import platform

import pytest
import torch
from reference import plain_update, random_mlp

from jlebm_fast import ops
from jlebm_fast.backends import _native
from jlebm_fast.problem import Update

pytestmark = [
    pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason())),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="left to the processor elsewhere"),
]
TINY = 1e-39


@pytest.fixture(params=[False, True], ids=["as they are", "flushed by the caller"])
def flushed(request):
    if not torch.set_flush_denormal(request.param):
        pytest.skip("torch knows no such mode here")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.fixture(params=[1, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_thread_or_the_callers_mode(flushed, n_threads):
    z, grad = torch.zeros(5000, 6), torch.full((5000, 6), TINY)
    step = ops.langevin_step(z, grad, Update(torch.tensor([[1.0, 0.0, 0.0]]), noise_key=1), backend="cpu")
    assert not step.any()
    mlp = random_mlp((6, 9, 1))
    small = mlp._replace(weights=(1e-20 * mlp.weights[0], 1e-20 * mlp.weights[1]), biases=(None, None))
    energy, gradient = ops.mlp_energy_grad(torch.ones(5000, 6), small, backend="cpu")
    assert not energy.any()
    assert not gradient.any()


def test_the_callers_mode_is_left_as_it_was(flushed, n_threads):
    ops.langevin_noise(1, 3, 1000, 8, backend="cpu")
    mlp, update = random_mlp((6, 9, 1)), plain_update(4, 6)
    ops.mlp_langevin_chain(torch.ones(100, 6), mlp, update, 4, backend="cpu")
    assert bool((torch.full((3,), TINY) * 1.0).any()) is not flushed


def test_normal_numbers_are_not_touched(n_threads):
    smallest = torch.full((50, 6), 2.0**-126)
    update = Update(torch.tensor([[1.0, 0.0, 0.0]]), noise_key=1)
    assert torch.equal(ops.langevin_step(smallest, smallest, update, backend="cpu"), 2 * smallest)
    frozen = update._replace(frozen=torch.ones(6, dtype=torch.bool))
    kept = torch.full((50, 6), TINY)
    assert torch.equal(
        ops.langevin_step(kept, smallest, frozen, backend="cpu").view(torch.int32), kept.view(torch.int32)
    )
