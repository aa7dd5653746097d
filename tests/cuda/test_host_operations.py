"""langevin_noise, langevin_step and the backend's own calls, through the kernels' host build; reasons and messages."""

from __future__ import annotations

import types

import pytest
import torch
from host_build import H100, host_module, on_host

from jlebm_fast import backends, precision
from jlebm_fast.backends import _native, cuda, eager, native_fields
from jlebm_fast.problem import MLP, MLPSpec, Record, Update

KEY = 0xFEDCBA9876543210


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("chains", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 16, 50, 100])
def test_noise_equals_eager_in_every_bit(chains, dim):
    where = {"first_step": 2**32 - 1, "first_chain": 2**32 - 3, "stream": 2}
    got = on_host(chains).langevin_noise(KEY, 3, chains, dim, device="cpu", **where)
    assert torch.equal(got, eager.langevin_noise(KEY, 3, chains, dim, **where))


def test_noise_in_strides_of_the_grid():
    """One multiprocessor: threads go on beyond the grid."""
    got = on_host(limits=(1, H100[1])).langevin_noise(KEY, 2, 5000, 8, device="cpu")
    assert torch.equal(got, eager.langevin_noise(KEY, 2, 5000, 8))


def updates(chains, dim):
    rows = torch.tensor([[0.08, 0.07, 0.4]])
    yield Update(rows, noise_key=KEY)
    yield Update(torch.tensor([[0.08, 0.07, 0.0]]), prior_precision=torch.ones(dim), noise_key=KEY)
    yield Update(
        rows, noise=normal(1, chains, dim, seed=8), prior_mean=normal(dim, seed=9), prior_precision=torch.ones(dim)
    )
    yield Update(
        rows, 1 + 0.1 * normal(chains, 3, seed=4), normal(chains, dim, seed=5), 1 + normal(chains, dim, seed=6).abs(),
        normal(chains, dim, seed=7) > 0.5, None, KEY, 3, 2**32 - 2, normal(chains, dim, seed=10),
    )  # fmt: skip
    yield Update(rows, None, None, None, normal(dim, seed=7) > 0.5, None, KEY, 3, 2**32 - 2)


@pytest.mark.parametrize("chains", [1, 9, 100])
@pytest.mark.parametrize("dim", [1, 2, 16, 50])
def test_step(chains, dim):
    z, grad = normal(chains, dim, seed=1), normal(chains, dim, seed=2)
    for update in updates(chains, dim):
        got = on_host(7).langevin_step(z, grad, update)
        as_double = {f: v.double() for f, v in update._asdict().items() if torch.is_tensor(v) and v.is_floating_point()}
        exact = eager.langevin_step(z.double(), grad.double(), update._replace(**as_double))
        plain = eager.langevin_step(z, grad, update)
        allowed = 2 * (plain.double() - exact).abs().max() + 1e-6
        assert (got.double() - exact).abs().max() <= allowed
        if update.frozen is not None:
            assert torch.equal(got[update.frozen.expand(chains, dim)], z[update.frozen.expand(chains, dim)])


def test_unaligned_rows():
    """A view that begins between quadruples."""
    z, grad = normal(1 + 9 * 8, seed=1)[1:].view(9, 8), normal(9, 8, seed=2)
    update = Update(torch.tensor([[0.08, 0.07, 0.4]]), noise_key=KEY)
    assert torch.equal(on_host().langevin_step(z, grad, update), on_host().langevin_step(z.clone(), grad, update))


def test_bad_numbers_stay_in_their_chain():
    z, grad = normal(9, 8, seed=1), normal(9, 8, seed=2)
    grad[4] = float("inf")
    update = Update(torch.tensor([[0.08, 0.07, 0.4]]), prior_precision=torch.ones(8), noise_key=KEY)
    got = on_host().langevin_step(z, grad, update)
    assert torch.isfinite(got).all(dim=1).tolist() == [i != 4 for i in range(9)]


@pytest.fixture(scope="module")
def small():
    spec = MLPSpec((6, 20, 12, 1), ("gelu", "leaky_relu"), (0.0, 0.2))
    weights = tuple(normal(b, a, seed=b) / a**0.5 for a, b in zip(spec.widths, spec.widths[1:]))
    return MLP(spec, weights, tuple(normal(b, seed=b + 1) for b in spec.widths[1:]))


def test_layers_give_the_gradients_in_the_parameters(small):
    z = normal(11, 6, seed=3)
    energy, _, hidden, delta = on_host().mlp_energy_layers(z, small)
    leaves = [w.clone().requires_grad_() for w in small.weights[:-1]]
    value = eager.mlp_forward(z, small._replace(weights=(*leaves, small.weights[-1])))[0]
    expected = torch.autograd.grad(value.sum(), leaves)
    below = [z, *hidden]
    torch.testing.assert_close(energy, value.detach(), rtol=1e-5, atol=1e-5)
    for layer, want in enumerate(expected):
        torch.testing.assert_close(delta[layer].T @ below[layer], want, rtol=1e-4, atol=1e-4)


def test_key_in_memory_is_read_and_advanced(small):
    kernels, key = on_host(), torch.tensor([5], dtype=torch.int64)
    z, grad, rows = normal(9, 6, seed=1), normal(9, 6, seed=2), torch.tensor([[0.08, 0.07, 0.4]])
    for number in (5, (5 + 0x9E3779B97F4A7C15) % 2**64):
        assert torch.equal(kernels.langevin_noise(key, 2, 3, 8, device="cpu"), eager.langevin_noise(number, 2, 3, 8))
        for of_tensor, of_number in (
            (kernels.langevin_step(z, grad, Update(rows, noise_key=k)) for k in (key, number)),
            (kernels.mlp_langevin_chain(z, small, Update(rows, noise_key=k), 1, Record()).z for k in (key, number)),
        ):
            assert torch.equal(of_tensor, of_number)
        kernels.advance_noise_key(key)


def test_key_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"\[1\] int64 on cpu like z, got \[1\] int64 on meta"):
        on_host().langevin_noise(torch.empty(1, dtype=torch.int64, device="meta"), 1, 2, 3, device="cpu")


def test_the_plan_is_named_and_the_precision_followed(small):
    seen = set()
    for name in precision.NAMES:
        with precision.using(name):
            n_bytes, regime = on_host().plan("mlp_langevin_chain", small.spec, 100, False, torch.device("cpu"))
        assert n_bytes == 0
        seen.add(regime)
    assert len(seen) == 3
    assert all(regime.startswith("resident") for regime in seen)


def test_a_net_too_large_for_every_regime_is_refused_with_a_remedy():
    spec = MLPSpec((4000, 4000, 1), ("gelu",), (0.0,))
    launch = (0, 0, 0, 0, 0, *H100)
    reason = host_module().cuda_mlp_unsupported_reason(mlp=native_fields.shape_fields(spec), launch=launch)
    assert "shared memory" in reason
    assert "use bf16" in reason


# --- reasons and messages, with statuses that no driver here could give -----------------------------------------------


def stand_in(built=True, driver=13000, runtime=13000):
    module = host_module()
    return types.SimpleNamespace(
        cuda=built,
        cuda_runtime_version=runtime,
        cuda_driver_version=lambda: driver,
        cuda_driver_reason=module.cuda_driver_reason,
    )


@pytest.mark.parametrize(
    ("native", "torch_cuda", "torch_hip", "words"),
    [
        (stand_in, "13.0", None, None),
        (lambda: stand_in(built=False), "13.0", None, ("built without CUDA", "JLEBM_CUDA=on pip install")),
        (stand_in, None, None, ("a build for the CPU", "install a CUDA wheel")),
        (stand_in, None, "6.2", ("built for ROCm", "backend 'triton'")),
        (lambda: stand_in(driver=0), "13.0", None, ("no NVIDIA driver", "install the driver")),
        (lambda: stand_in(driver=12040), "13.0", None, ("older than the CUDA toolkit", "CUDA 12.4", "13.0", "update")),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(native, torch_cuda, torch_hip, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    reason = cuda.missing_reason(native(), torch_cuda, torch_hip)
    if words is None:
        assert reason is None
    else:
        assert all(word in reason for word in words), reason


def test_no_visible_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES" in cuda.missing_reason(stand_in(), "13.0", None)


@pytest.mark.parametrize(
    ("capability", "archs", "words"),
    [
        (90, "80-real,90", ()),
        (86, "80-real", ()),
        (120, "80-real,90", ()),  # PTX
        (75, "80-real,90", ("8.0 or newer", "got 7.5")),
        (120, "80-real,90-real", ("no image for compute capability 12.0", "JLEBM_CUDA_ARCHS=120")),
        (80, "90", ("no image for compute capability 8.0", "JLEBM_CUDA_ARCHS=80")),
        (100, "90a-real", ("no image", "JLEBM_CUDA_ARCHS=100")),
        (90, "90a-real", ()),
        (103, "100f-real", ()),
    ],
)
def test_compute_capability(capability, archs, words):
    reason = host_module().cuda_capability_reason(capability, archs)
    assert bool(reason) == bool(words)
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("status", "name", "words"),
    [
        (35, "cudaErrorInsufficientDriver", ("older than the CUDA toolkit", "update the driver")),
        (100, "cudaErrorNoDevice", ("older than", "update")),
        (209, "cudaErrorNoKernelImageForDevice", ("JLEBM_CUDA_ARCHS=120",)),
        (98, "cudaErrorInvalidDeviceFunction", ("JLEBM_CUDA_ARCHS=120",)),
        (701, "cudaErrorLaunchOutOfResources", ("asks for more than this device has",)),
        (2, "cudaErrorMemoryAllocation", ("free device memory",)),
        (700, "cudaErrorIllegalAddress", ("CUDA_LAUNCH_BLOCKING=1",)),
        (999, "cudaErrorUnknown", ()),
    ],
)
def test_launch_errors_carry_file_line_kernel_and_remedy(status, name, words):
    text = host_module().cuda_failure_text(
        status=status, name=name, text="what CUDA says", kernel="(mlp_kernel<0, 8>)", file="csrc/cuda/mlp_kernel.h",
        line=61, device=1, driver_version=12080, runtime_version=13000, capability=120, archs="80-real,90-real",
    )  # fmt: skip
    assert text.startswith(f"(mlp_kernel<0, 8>) (csrc/cuda/mlp_kernel.h:61) on cuda:1: {name}: what CUDA says")
    assert all(word in text for word in words), text


def test_wrong_device_and_dtype_are_reasons_before_the_launch(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot run langevin_step: it runs on CUDA tensors, got cpu"):
        backends.choose("langevin_step", "cuda", device=cpu, dtype=torch.float32)
    reason = backends.reason_against("cuda", "langevin_step", device=gpu, dtype=torch.float64)
    assert "float64 runs on backend 'eager'" in reason


def test_precision_numbers_and_workspaces_are_checked(small):
    z = normal(3, 6)
    with pytest.raises(ValueError, match="precision must be 0"):
        host_module().cuda_mlp_unsupported_reason(
            mlp=native_fields.shape_fields(small.spec), launch=(0, 0, 3, 0, 0, *H100)
        )
    streamed = on_host(limits=(2, 12000))
    n_bytes, regime = streamed.plan("mlp_energy_grad", small.spec, 3, True, z.device)
    assert regime.startswith("streamed") == (n_bytes > 0)


@pytest.mark.skipif(
    _native.unavailable_reason() is not None or not _native.load().cuda or _native.load().cuda_driver_version() > 0,
    reason="needs the module built with CUDA, and no driver",
)
def test_a_launch_without_a_driver_names_kernel_file_and_remedy():
    place = (0, 0, 0, 0, 0, *H100)
    with pytest.raises(
        RuntimeError, match=r"langevin_noise_kernel.*\(csrc/cuda/langevin_noise.cu:\d+\).*install the driver"
    ):
        _native.load().cuda_langevin_noise(
            noise_key=1,
            noise_key_at=0,
            first_step=0,
            first_chain=0,
            stream=0,
            n_steps=1,
            chains=2,
            dim=4,
            out=0,
            launch=place,
        )
