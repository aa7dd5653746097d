"""The kernels on products like those of NVIDIA's tensor cores, which Triton's interpreter leaves to numpy: operands
lose what tf32 has not got, and a sum is cut off after every eight features.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from reference import moved, random_mlp
from triton._C.libtriton import ir
from triton.runtime import interpreter

from jlebm_fast import precision
from jlebm_fast.backends import eager
from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import resident, tiles
from jlebm_fast.problem import MLP

H100 = tiles.Chip("cuda", 9, 232448, 132)
SHAPES = {"HS": (16, 50, 50, 50, 50, 1), "FID": (50, 100, 100, 1), "logits": (16, 50, 50, 10)}
FEATURES_OF_A_SUM = 8


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(values):
    return (values.astype(np.float32).view(np.int32) & -0x2000).view(np.float32)


def towards_zero(sums):
    """float64 sums cut to float32."""
    return (sums.view(np.int64) & -(1 << 29)).view(np.float64)


def tensor_core(a, b, start):
    total = start.astype(np.float64)
    a, b = cut(a).astype(np.float64), cut(b).astype(np.float64)
    for k in range(0, a.shape[1], FEATURES_OF_A_SUM):
        total = towards_zero(total + a[:, k : k + FEATURES_OF_A_SUM] @ b[k : k + FEATURES_OF_A_SUM])
    return total.astype(np.float32)


def dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """Three-way tf32 as Triton writes it out: sums of its own, the small parts first, then a float32 addition."""
    a, b, start = a.data, b.data, d.data
    if input_precision == ir.INPUT_PRECISION.TF32:
        result = tensor_core(a, b, start)
    else:
        assert input_precision == ir.INPUT_PRECISION.TF32x3
        large_a, large_b = rounded(torch.from_numpy(a)).numpy(), rounded(torch.from_numpy(b)).numpy()
        result = tensor_core(a - large_a, large_b, np.zeros_like(start))
        result = tensor_core(large_a, b - large_b, result)
        result = start + tensor_core(large_a, large_b, result)
    return interpreter.TensorHandle(result, d.dtype.scalar)


@pytest.fixture
def _hopper(monkeypatch):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(backend, "_chip", lambda index: H100)


def rounded(values):
    """float32 to the nearest number with 10 bits of mantissa, halves away from zero."""
    wide = values.double()
    unit = torch.exp2(torch.floor(torch.log2(wide.abs())) - 10)
    return torch.where(values == 0, values, (torch.sign(wide) * torch.floor(wide.abs() / unit + 0.5) * unit).float())


@triton.jit
def tf32_kernel(values, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, resident.operand(tl.load(values + i), "tf32"))


def test_operands_are_rounded():
    values = drawn(4096) * torch.logspace(-30, 30, 4096)
    values[:4] = torch.tensor([0x3F801000, 0x3F800FFF, 0x3FFFFFFF, 0x3F803000], dtype=torch.int32).view(torch.float32)
    out = torch.empty(4096)
    tf32_kernel[(1,)](values, out, BLOCK=4096)
    assert torch.equal(out, rounded(values))
    assert out[:4].tolist() == [1 + 2**-10, 1.0, 2.0, 1 + 2**-9]


def test_what_is_no_number_stays_so():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0x7F7FFFFF, 0, -0x80000000])
    out = torch.empty(8)
    tf32_kernel[(1,)](bits.to(torch.int32).view(torch.float32), out, BLOCK=8)
    assert out[:3].isnan().all()
    assert out[3:].tolist() == [torch.inf, -torch.inf, torch.inf, 0.0, 0.0]
    assert out[7].signbit()


def rms(got, true):
    return float((got.double() - true).square().mean().sqrt())


def with_rounded_operands(z, mlp):
    """f and grad f in float64, but for the operands of each product."""
    wide = moved(mlp, dtype=torch.float64)
    h, slopes = z, []
    layers = zip(mlp.weights, wide.biases, mlp.spec.activations, mlp.spec.activation_params, strict=False)
    for weight, bias, name, parameter in layers:
        a = rounded(h.float()).double() @ rounded(weight).double().T + bias
        slopes.append(eager.activation_slope(name, parameter, a))
        h = eager.activation(name, parameter, a)
    logits = rounded(h.float()).double() @ rounded(mlp.weights[-1]).double().T + wide.biases[-1]
    energy, slope = eager.head_value_and_slope(wide, logits)
    delta = rounded(slope.float()).double() @ rounded(mlp.weights[-1]).double()
    for weight, slope in zip(reversed(mlp.weights[:-1]), reversed(slopes), strict=True):
        delta = rounded((delta * slope).float()).double() @ rounded(weight).double()
    return energy, delta


def problem(name) -> tuple[torch.Tensor, MLP]:
    widths = SHAPES[name]
    return drawn(60, widths[0], seed=2), random_mlp(widths, "gelu", "identity" if widths[-1] == 1 else "logsumexp")


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("regime", ["resident", "streamed"])
@pytest.mark.parametrize("name", SHAPES)
def test_tf32_is_as_good_as_rounded_operands(name, regime):
    z, mlp = problem(name)
    with tiles.override(regime=regime), precision.using("tf32"):
        ours = backend.mlp_energy_grad(z, mlp)
    exact = eager.mlp_energy_grad(z.double(), moved(mlp, dtype=torch.float64))
    for got, plain, true in zip(ours, with_rounded_operands(z, mlp), exact, strict=True):
        assert rms(got, true) <= 1.5 * rms(plain, true)


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("regime", ["resident", "streamed"])
@pytest.mark.parametrize("name", SHAPES)
def test_float32_is_as_good_as_torch(name, regime):
    z, mlp = problem(name)
    with tiles.override(regime=regime), precision.using("fp32"):
        ours = backend.mlp_energy_grad(z, mlp)
    exact = eager.mlp_energy_grad(z.double(), moved(mlp, dtype=torch.float64))
    for got, plain, true in zip(ours, eager.mlp_energy_grad(z, mlp), exact, strict=True):
        assert rms(got, true) <= 2 * rms(plain, true) + 1e-8
