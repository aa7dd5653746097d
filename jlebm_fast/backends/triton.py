"""The four operations in Triton: one launch each, the step loop inside the kernel, float32 state.

A program owns 16 to 64 chains for all steps. The MLP runs in one of two regimes, chosen before the launch (tiles.py):

    resident   up to four hidden layers whose weights fit the chip: loaded once, kept for all steps
    streamed   anything wider or deeper: weights from L2 tile by tile, activations of L layers in a scratch buffer
               of up to 2 · processors · (3 + L) · 64 · (widest layer) floats: 0.5 GB for 4 x 1024 units on an H100

Kernels live in `triton_kernels/`: noise.py, activation.py, update.py, resident.py, packing.py, streamed.py; launch.py
binds them to tensors. Precisions: "fp32" is three-way tf32 on NVIDIA and float32 on AMD, "tf32" and "bf16" round the
operands of the matrix products; state, noise, prior term and sums are float32 in all of them. Launches go to torch's
current stream and never synchronise; while a CUDA graph is captured they are refused if a kernel would have to be
compiled or loaded for them. Under TRITON_INTERPRET=1 Triton's interpreter runs the same kernels on CPU tensors: for
tests. Tiles can be overridden, see triton_kernels/tiles.py.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import numpy
import torch
from torch import Tensor

from .. import precision
from ..modes import on_device_of
from ..problem import MLP, ChainResult, MLPSpec, Record, Update

NAME = "triton"
READS_KEY_TENSORS = True
TAKES_PRECISION = True
OLDEST_TRITON = (3, 6)
_KEY_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio's 64 bits, as a signed integer
_MOST_NORM_COLUMNS = 8192  # of a weight: 32 registers of each of 256 threads
_MOST_LOGITS = 1024  # triton_kernels/tiles.py says why


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason() -> str | None:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # without an origin it is some folder of that name
        return "Triton is not installed; pip install 'triton>=3.6' (Linux), or use backend 'cpu' or 'eager'"
    if not _interpreted() and not torch.cuda.is_available():
        return (
            "it runs on CUDA or ROCm tensors, and torch.cuda.is_available() is False; "
            "use backend 'cpu' or 'eager', or install a torch built for this machine's GPU"
        )
    version = _triton_version()
    if _release(version) < OLDEST_TRITON:
        return f"Triton {version} is too old; pip install 'triton>=3.6'"
    if _interpreted() and _release(version) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        return (
            f"Triton {version}'s interpreter cannot run loops with numpy {numpy.__version__}; pip install 'triton>=3.7'"
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    """(major, minor)"""
    return tuple(int(part) for part in version.split(".")[:2])


def unsupported_reason(
    op: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: MLPSpec | None = None,
    update: Update | None = None,
) -> str | None:
    served = "cpu" if _interpreted() else "cuda"
    if device.type != served:
        if _interpreted():
            return f"TRITON_INTERPRET=1 makes it run on CPU tensors, got {device}"
        return f"it runs on CUDA or ROCm tensors, got {device}"
    if dtype != torch.float32:
        return f"it computes in float32, got {str(dtype).removeprefix('torch.')}; float64 runs on backend 'eager'"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} is older"
    if spec is not None and spec.n_logits > _MOST_LOGITS:
        return f"it takes up to {_MOST_LOGITS} logits, the energy has {spec.n_logits}"
    return None


def devices() -> tuple[str, ...]:
    """The torch devices that it serves."""
    return ("cpu",) if _interpreted() else tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))


def regime(op: str, spec: MLPSpec | None) -> str:
    where = "Triton's interpreter" if _interpreted() else f"Triton {_triton_version()}"
    if spec is None:
        return f"one launch, {where}"
    chip = _chip(0 if _interpreted() else torch.cuda.current_device())
    tiles = _kernels().tiles
    products = tiles.dot_precision(precision.current(), chip)
    # explain() names no number of chains: the regime of 100, the batch of the papers
    chosen = tiles.choose(spec, 100, products, chip, op=op)
    what = {"resident": "weights stay on the chip", "streamed": "weights streamed from L2"}[chosen.regime]
    return f"{chosen.regime} ({what}; {products} products; {where})"


def build() -> str:
    """Triton's version and what it compiles for."""
    if _interpreted():
        return f"triton {_triton_version()}, interpreter"
    return f"triton {_triton_version()}, compiled at the first call of a shape"


def langevin_noise(
    noise_key: int | Tensor,
    n_steps: int,
    chains: int,
    dim: int,
    *,
    first_step: int = 0,
    first_chain: int = 0,
    stream: int = 0,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise field eps [n_steps, chains, dim] of the noise contract."""
    out = torch.empty((n_steps, chains, dim), dtype=dtype, device=device)
    if out.numel():
        with on_device_of(out):
            _kernels().launch.noise_call(out, noise_key, first_step, first_chain, stream).run()
    return out


def langevin_step(z: Tensor, grad: Tensor, update: Update) -> Tensor:
    """One update of z [chains, dim] with a given gradient [chains, dim]."""
    out = torch.empty_like(z)
    if out.numel():
        with on_device_of(out):
            _kernels().launch.step_call(z, grad, update, out).run()
    return out


def mlp_energy_grad(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor]:
    """f(z) [chains] and its gradient [chains, dim]."""
    energy, grad = z.new_empty(z.shape[0]), torch.empty_like(z)
    if energy.numel():
        with on_device_of(z):
            launch, tiles, products, chip = _choice(z, mlp.spec, "mlp_energy_grad")
            launch.energy_grad_call(z, mlp, energy, grad, tiles, products, chip).run()
    return energy, grad


def mlp_langevin_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult:
    """n_steps updates with the MLP's own gradient."""
    chains, dim = z.shape
    n_kept = n_steps // record.thin
    energy = grad_norm = displacement = first_bad_step = trajectory = None
    if record.diagnostics:
        energy, grad_norm, displacement = (z.new_empty(n_kept, chains) for _ in range(3))
        first_bad_step = torch.empty(chains, dtype=torch.int64, device=z.device)
    if record.trajectory:
        trajectory = z.new_empty(n_kept, chains, dim)
    result = ChainResult(torch.empty_like(z), energy, grad_norm, displacement, first_bad_step, trajectory)
    if chains:
        with on_device_of(z):
            launch, tiles, products, chip = _choice(z, mlp.spec, "mlp_langevin_chain")
            launch.chain_call(z, mlp, update, n_steps, record.thin, result, tiles, products, chip).run()
    return result


def top_singulars(
    pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float, keep: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(u [out], v [in], sigma [1], W / sigma) of weights W [out, in], each with a u to start from (`spectral.py`).

    keep: buffers (u, v) that are overwritten with the vectors where sigma is finite and not zero.
    """
    found = []
    for weight, _ in pairs:
        n_out, n_in = weight.shape
        sizes = ((n_out,), (n_in,), (1,), (n_out, n_in))
        found.append(tuple(torch.empty(size, dtype=torch.float32, device=weight.device) for size in sizes))
    with on_device_of(pairs[0][0]):
        _kernels().launch.spectral_call(pairs, found, keep, tolerance).run()
    return found


def spectral_unsupported_reason(shapes: Sequence[tuple[int, int]], device: torch.device) -> str | None:
    """Why `top_singulars` cannot serve weights of these shapes; None if it can."""
    reason = unsupported_reason("top_singulars", device=device, dtype=torch.float32)
    if reason is not None:
        return reason
    widest = max(n_in for _, n_in in shapes)
    if widest > _MOST_NORM_COLUMNS:
        return f"it takes the spectral norm of weights with up to {_MOST_NORM_COLUMNS} inputs, got {widest}"
    return None


def advance_noise_key(noise_key: Tensor) -> None:
    """Move an int64 key [1] on its device to the next one, in stream order: what a CUDA graph appends so that its next
    replay draws fresh noise. The same sequence of keys as backend `cuda`.
    """
    noise_key.add_(_KEY_STEP)


class _Kernels:
    """The kernels and what binds them, imported at the first use: that import is the first one of Triton."""

    def __init__(self) -> None:
        from .triton_kernels import launch, tiles

        self.launch: ModuleType = launch
        self.tiles: ModuleType = tiles


@functools.cache
def _kernels() -> _Kernels:
    return _Kernels()


@functools.cache
def _triton_version() -> str:
    import triton

    return triton.__version__


def _choice(z: Tensor, spec: MLPSpec, op: str) -> tuple:
    """(launch module, tiles, precision of the products, chip)"""
    kernels, chip = _kernels(), _chip(z.device.index or 0)
    products = kernels.tiles.dot_precision(precision.current(), chip)
    return kernels.launch, kernels.tiles.choose(spec, z.shape[0], products, chip, op=op), products, chip


@functools.cache
def _chip(index: int):
    chip = _kernels().tiles.Chip
    if _interpreted():
        # the limits of an H100, whose choices the tests then run
        return chip("interpreter", 0, 232448, 132)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        # not every torch built for ROCm tells; a compute unit has 64 KB
        return chip("hip", 0, 65536, properties.multi_processor_count)
    return chip("cuda", properties.major, properties.shared_memory_per_block_optin, properties.multi_processor_count)
