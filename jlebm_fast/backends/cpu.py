"""The four operations on the CPU: SIMD kernels in C++ (csrc/cpu), one SIMD lane per chain, float32.

Two regimes of an MLP energy, chosen by its widest layer:

    lanes   up to 1024 units: the whole chain in one call; activations stay in the core's caches, and the weights too
            or, from about 500 units on, stream from the shared cache at the pace of the arithmetic
    blas    wider: layers through torch's matrix products, batched over chains, with the fused activation and step

Threads are torch's (`torch.set_num_threads`); the result does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import MLP, ChainResult, MLPSpec, Record, Update
from . import _native, cpu_blas
from .native_fields import Addresses, mlp_fields, update_fields

NAME = "cpu"
_CPU = torch.device("cpu")
# Measured with two hidden layers on one AVX-512 core, GFLOP/s of lanes and of blas: 600 units 123 and 103, 1000 units
# 149 and 119, 2000 units 91 and 102. With several threads lanes gain more: they meet once a chain, not once a layer.
WIDEST_LANES_LAYER = 1024

unavailable_reason = _native.unavailable_reason


def unsupported_reason(
    op: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: MLPSpec | None = None,
    update: Update | None = None,
) -> str | None:
    if device != _CPU and device.type != "cpu":  # its type costs three times as much to ask for
        return f"it runs on CPU tensors, got {device}"
    if dtype != torch.float32:
        return f"it computes in float32, got {str(dtype).removeprefix('torch.')}; float64 runs on backend 'eager'"
    return None


def regime(op: str, spec: MLPSpec | None) -> str:
    target = _native.load().cpu_target()
    if spec is None or fits_lanes(spec):
        return f"lanes ({target} kernels, {torch.get_num_threads()} threads)"
    return f"blas (a layer is wider than {WIDEST_LANES_LAYER}; torch's matrix products, {target} kernels around them)"


def build() -> str:
    """Compiler, chosen and possible targets, thread runtime."""
    native = _native.load()
    return (
        f"{native.compiler}, target {native.cpu_target()} (of {native.cpu_targets()}), "
        f"threads by {native.thread_runtime()}"
    )


def fits_lanes(spec: MLPSpec) -> bool:
    return spec.widest <= WIDEST_LANES_LAYER


def langevin_noise(
    noise_key: int,
    n_steps: int,
    chains: int,
    dim: int,
    *,
    first_step: int = 0,
    first_chain: int = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise field eps [n_steps, chains, dim] of the noise contract."""
    out = torch.empty((n_steps, chains, dim), dtype=dtype, device=device)
    if out.numel():
        _native.load().cpu_langevin_noise(
            noise_key=noise_key,
            first_step=first_step,
            first_chain=first_chain,
            stream=stream,
            n_steps=n_steps,
            chains=chains,
            dim=dim,
            out=out.data_ptr(),
            n_threads=torch.get_num_threads(),
        )
    return out


def langevin_step(z: Tensor, grad: Tensor, update: Update) -> Tensor:
    """One update of z [chains, dim] with a given gradient [chains, dim]."""
    out = torch.empty_like(z)
    if out.numel():
        address = Addresses()
        _native.load().cpu_langevin_step(
            chains=z.shape[0],
            dim=z.shape[1],
            z=address(z),
            grad=address(grad),
            update=update_fields(update, address),
            out=out.data_ptr(),
            n_threads=torch.get_num_threads(),
        )
    return out


def mlp_energy_grad(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor]:
    """f(z) [chains] and its gradient [chains, dim]."""
    if not fits_lanes(mlp.spec):
        return cpu_blas.mlp_energy_grad(z, mlp)
    energy, grad = z.new_empty(z.shape[0]), torch.empty_like(z)
    if energy.numel():
        address = Addresses()
        _native.load().cpu_mlp_energy_grad(
            chains=z.shape[0],
            z=address(z),
            mlp=mlp_fields(mlp, address),
            energy=energy.data_ptr(),
            grad=grad.data_ptr(),
            n_threads=torch.get_num_threads(),
        )
    return energy, grad


def mlp_energy_layers(
    z: Tensor, mlp: MLP, *, layers: bool, grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """f(z) [chains]; with layers, h_l [H_1 + … + H_L, chains] and df/da_l, df/dlogits [H_1 + … + J, chains], layer
    after layer; with grad, the gradient [chains, dim]. For MLPs that `fits_lanes`.
    """
    results = empty_layers(z, mlp, layers, grad)
    if z.shape[0]:
        address = Addresses()
        energy, hidden, delta, gradient = map(address, results)
        _native.load().cpu_mlp_energy_layers(
            chains=z.shape[0],
            z=address(z),
            mlp=mlp_fields(mlp, address),
            energy=energy,
            hidden=hidden,
            delta=delta,
            grad=gradient,
            n_threads=torch.get_num_threads(),
        )
    return results


def empty_layers(
    z: Tensor, mlp: MLP, layers: bool, grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `mlp_energy_layers` fills."""
    chains, widths = z.shape[0], mlp.spec.widths
    hidden = delta = None
    if layers:
        units = sum(widths[1:])
        hidden, delta = z.new_empty(units - widths[-1], chains), z.new_empty(units, chains)
    return z.new_empty(chains), hidden, delta, torch.empty_like(z) if grad else None


def mlp_langevin_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult:
    """n_steps updates with the MLP's own gradient."""
    result = empty_result(z, n_steps, record)
    chains = z.shape[0]
    if chains == 0:
        return result
    if not fits_lanes(mlp.spec):
        if result.first_bad_step is not None:  # the kernel of whole chains begins each with -1 itself
            result.first_bad_step.fill_(-1)
        cpu_blas.mlp_langevin_chain(z, mlp, update, n_steps, record, result, langevin_step)
        return result
    address = Addresses()
    _native.load().cpu_mlp_langevin_chain(
        chains=chains,
        n_steps=n_steps,
        z=address(z),
        mlp=mlp_fields(mlp, address),
        update=update_fields(update, address),
        record=(record.thin, *[0 if t is None else t.data_ptr() for t in result[1:]]),
        out=result.z.data_ptr(),
        n_threads=torch.get_num_threads(),
    )
    return result


def empty_result(z: Tensor, n_steps: int, record: Record) -> ChainResult:
    """What `mlp_langevin_chain` fills."""
    return recorded(torch.empty_like(z), z, z.shape, n_steps, record)


def recorded(
    end: Tensor | Sequence[Tensor], like: Tensor, shape: Sequence[int], n_steps: int, record: Record
) -> ChainResult:
    """A chain's `end` of `shape` [chains, dim] and memory, of the dtype of `like`, for what is recorded on the way.

    Each in memory of its own: results of a registered operator must not be views of one another.
    """
    (chains, dim), n_kept = shape, n_steps // record.thin
    energy = grad_norm = displacement = first_bad_step = trajectory = None
    if record.diagnostics:
        energy = like.new_empty(n_kept, chains)
        grad_norm, displacement = torch.empty_like(energy), torch.empty_like(energy)
        first_bad_step = like.new_empty(chains, dtype=torch.int64)
    if record.trajectory:
        trajectory = like.new_empty((n_kept, chains, dim))
    return ChainResult(end, energy, grad_norm, displacement, first_bad_step, trajectory)
