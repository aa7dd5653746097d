"""Launching as on a GPU, as far as that goes without one: Triton's own binding, specialisation and compile cache.

A stand-in driver tells Triton that the current device is an H100; `warmup` does all of a launch but the launch.
"""

from __future__ import annotations

import needs_compiler  # noqa: F401
import pytest
import torch
import triton
from compiled import CHIPS

from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import launch, tiles
from jlebm_fast.problem import MLP, ChainResult, MLPSpec, Update

TARGET, CHIP = CHIPS["sm_90"]


class Driver:
    """What a launch asks of Triton's driver before the kernel is loaded."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The list of kernels compiled so far."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
    names = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: names.append(told["src"].name))
    return names


def warm(call):
    return call.kernel.warmup(*call.arguments, **call.constants, **call.options, grid=call.grid)


def test_noise_compiles_once_for_all_keys_and_offsets(compiled):
    for key in (0, 1, 16, (1 << 31) + 5, (1 << 63) + (1 << 31), (1 << 64) - 1):
        for offset in (0, 1, 16, (1 << 32) - 1):
            kernel = warm(launch.noise_call(torch.zeros(6, 10, 50), key, offset, offset, offset & 3))
    warm(launch.noise_call(torch.zeros(1, 1, 64), 3, 0, 0, 0))
    assert compiled == ["langevin_noise"]
    assert kernel.metadata.enable_fp_fusion is False
    warm(launch.noise_call(torch.zeros(6, 10, 50), torch.zeros(1, dtype=torch.int64), 0, 0, 0))
    assert compiled == ["langevin_noise"] * 2


def test_a_chain_compiles_once_per_shape(compiled):
    spec = MLPSpec((16, 32, 1), ("gelu",), (0.0,))
    mlp = MLP(spec, (torch.zeros(32, 16), torch.zeros(1, 32)), (torch.zeros(32), torch.zeros(1)))

    def call(n_steps, chains, thin=1, sign=1.0, **change):
        z = torch.zeros(chains, 16)
        net = mlp._replace(spec=MLPSpec(spec.widths, spec.activations, spec.activation_params, "identity", sign))
        update = Update(torch.zeros(n_steps, 3), prior_precision=torch.ones(16))._replace(**change)
        chosen = tiles.choose(spec, chains, "tf32", CHIP)
        return launch.chain_call(z, net, update, n_steps, thin, ChainResult(z), chosen, "tf32", CHIP)

    for n_steps in (1, 16, 60):
        for chains in (1, 16, 100):
            kernel = warm(call(n_steps, chains))
    warm(call(60, 100, thin=16, sign=-1.0, noise_key=(1 << 64) - 1, first_step=1, first_chain=16))
    warm(call(60, 100, prior_precision=torch.ones(100, 16)))
    assert compiled == ["mlp_langevin_chain"]
    assert kernel.metadata.enable_fp_fusion is False
    warm(call(60, 100, frozen=torch.zeros(16, dtype=torch.bool)))
    assert compiled == ["mlp_langevin_chain"] * 2


def test_a_streamed_chain_compiles_once_per_stride(compiled):
    def call(depth, width, chains):
        spec = MLPSpec((100, *[width] * depth, 1), ("gelu",) * depth, (0.0,) * depth)
        shapes = list(zip(spec.widths[1:], spec.widths))
        mlp = MLP(spec, tuple(torch.zeros(s) for s in shapes), tuple(torch.zeros(s[0]) for s in shapes))
        z = torch.zeros(chains, 100)
        update = Update(torch.zeros(9, 3), prior_precision=torch.ones(100))
        chosen = tiles.choose(spec, chains, "tf32x3", CHIP)
        assert chosen.regime == "streamed"
        return launch.chain_call(z, mlp, update, 9, 1, ChainResult(z), chosen, "tf32x3", CHIP)

    warm(call(2, 300, 100))
    warm(call(2, 300, 7))
    assert compiled == ["mlp_langevin_chain"]


def test_a_step_compiles_once_for_all_steps(compiled):
    """A row of the coefficients is 12 bytes from the last one's, and noise stands anywhere."""
    for chains in (100, 3):
        z = torch.zeros(chains, 50)
        for noise in (None, torch.zeros(6, chains, 50)):
            update = Update(torch.zeros(6, 3), prior_precision=torch.ones(50), noise=noise, noise_key=3)
            for step in range(6):
                warm(launch.step_call(z, z, update.at_step(step), z))
    assert compiled == ["langevin_step"] * 2


def test_packing_compiles_once_for_all_widths(compiled):
    for width in (300, 310, 500):
        spec = MLPSpec((100, width, width, 1), ("gelu",) * 2, (0.0,) * 2)
        shapes = list(zip(spec.widths[1:], spec.widths))
        mlp = MLP(spec, tuple(torch.zeros(s) for s in shapes), tuple(torch.zeros(s[0]) for s in shapes))
        z, energy = torch.zeros(7, 100), torch.zeros(7)
        chosen = tiles.choose(spec, 7, "tf32x3", CHIP)
        (packing,) = launch.energy_grad_call(z, mlp, energy, z, chosen, "tf32x3", CHIP).before
        warm(packing)
    assert compiled == ["pack_weights"]


def test_nothing_is_compiled_during_a_capture(compiled, monkeypatch):
    call = launch.noise_call(torch.zeros(6, 10, 50), 3, 0, 0, 0, groups=2)  # as no other test has it
    monkeypatch.setattr(launch, "_is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        call.run()
    spec = MLPSpec((100, 290, 290, 1), ("gelu",) * 2, (0.0,) * 2)
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        launch._tables(spec, 64, torch.device("cpu"))
    assert compiled == []
    assert triton.knobs.runtime.jit_cache_hook is None
    warm(call)
    with launch._nothing_new():
        warm(call)  # compiled already
    assert compiled == ["langevin_noise"]


def test_without_a_gpu_it_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "torch.cuda.is_available() is False" in backend.unavailable_reason()
    assert "CUDA or ROCm tensors, got cpu" in backend.unsupported_reason(
        "langevin_step", device=torch.device("cpu"), dtype=torch.float32
    )
