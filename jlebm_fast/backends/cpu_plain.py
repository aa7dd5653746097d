"""Plain calls on the CPU: one native call that checks its tensors itself (csrc/bindings_plain.cpp).

Each function gives what backend `cpu` gives, or None where the call is not plain: another dtype, device, layout, shape
or class, or anything that does not fit. Nothing was done then, and the checks of `ops.py` and the choice of a backend
have the word. They cost ten times a small chain, which is why they are asked second.

`chain_of_latents` is the same for latents in their own structure: what FastLangevin's usual call comes down to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..checks import TENSOR_CLASSES
from ..latents import LatentLayout, Latents
from ..problem import MLP, ChainResult, MLPSpec, Record, Update
from . import _native
from .cpu import WIDEST_LANES_LAYER, empty_layers, empty_result, recorded

# what may be answered here: "cpu" is the first choice of "auto" for what is plain
BACKENDS = ("auto", "cpu")
_CPU = torch.device("cpu")
_LARGEST_COPY = 1 << 16  # floats of latents that one thread copies; beyond, torch.cat does it in all threads


@functools.cache
def _kernels() -> ModuleType | None:
    """The compiled module, where there is one and torch (2.10 and newer) lets it read tensors."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or _native.unavailable_reason() is not None:
        return None
    native = _native.load()
    return native if native.read_tensors_through(capsule, *TENSOR_CLASSES, WIDEST_LANES_LAYER) else None


def available() -> bool:
    """Whether plain calls are answered at all."""
    return _kernels() is not None


def _is_usual(tensor: Tensor) -> bool:
    """On the CPU and of torch's own class."""
    return type(tensor) in TENSOR_CLASSES and tensor.is_cpu


def _is_float32(tensor: Tensor) -> bool:
    """Usual, and one that a chain takes without a copy."""
    return (
        _is_usual(tensor)
        and not tensor.is_neg()  # its memory would hold not its values but their negatives (a conjugate's imag)
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )


def langevin_noise(
    noise_key: int | Tensor,
    n_steps: int,
    chains: int,
    dim: int,
    first_step: int,
    first_chain: int,
    stream: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    native = _kernels()
    if native is None or dtype is not torch.float32 or device != _CPU:
        return None
    shape = (n_steps, chains, dim)
    for size in shape:
        if type(size) is not int or size < 0:
            return None
    out = torch.empty(shape, dtype=dtype, device=device)
    fits = native.plain_langevin_noise(noise_key, first_step, first_chain, stream, out, torch.get_num_threads())
    return out if fits else None


def langevin_step(z: Tensor, grad: Tensor, update: Update) -> Tensor | None:
    native = _kernels()
    if native is None or not _is_usual(z) or not _is_usual(grad):
        return None
    out = torch.empty_like(z)
    return out if native.plain_langevin_step(z, grad, update, out, torch.get_num_threads()) else None


def mlp_energy_grad(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor] | None:
    native = _kernels()
    if native is None or not _is_usual(z) or z.ndim != 2:
        return None
    energy, grad = z.new_empty(z.shape[0]), torch.empty_like(z)
    fits = native.plain_mlp_energy_grad(z, mlp, energy, grad, torch.get_num_threads())
    return (energy, grad) if fits else None


def mlp_energy_layers(
    z: Tensor, mlp: MLP, *, layers: bool, grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    native = _kernels()
    if native is None or not _is_usual(z) or z.ndim != 2:
        return None
    results = empty_layers(z, mlp, layers, grad)
    return results if native.plain_mlp_energy_layers(z, mlp, *results, torch.get_num_threads()) else None


def mlp_weight_grads(
    z: Tensor,
    mlp: MLP,
    hidden: Tensor,
    delta: Tensor,
    cotangent: Tensor,
    of_weights: Sequence[bool],
    of_biases: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]] | None:
    """Gradients of sum_c cotangent_c f(z_c) in the weights and biases that are asked for, None for the others, from the
    h_l and delta_l of `mlp_energy_layers`.
    """
    native = _kernels()
    if native is None or not (_is_usual(z) and _is_usual(cotangent)):
        return None
    weights = [torch.empty_like(w) if asked else None for w, asked in zip(mlp.weights, of_weights, strict=True)]
    biases = [torch.empty_like(b) if asked else None for b, asked in zip(mlp.biases, of_biases, strict=True)]
    threads = torch.get_num_threads()
    fits = native.plain_mlp_weight_grads(z, mlp, hidden, delta, cotangent, weights, biases, threads)
    return (weights, biases) if fits else None


def mlp_langevin_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult | None:
    native = _kernels()
    if native is None or not _is_usual(z) or z.ndim != 2:
        return None
    if record.diagnostics or record.trajectory:
        # what would make the results' shapes, before they are made
        if type(n_steps) is not int or type(record.thin) is not int or record.thin < 1:
            return None
        rows = update.step_coefficients
        if type(rows) not in TENSOR_CLASSES or rows.ndim != 2 or rows.shape[0] != n_steps:
            return None
        result = empty_result(z, n_steps, record._replace(diagnostics=False))
        if record.diagnostics:  # in memory that is used again, not in fresh pages (csrc/bindings_tensors.cpp)
            energy, grad_norm, displacement, first_bad_step = native.new_record(n_steps // record.thin, z.shape[0])
            result = ChainResult(result.z, energy, grad_norm, displacement, first_bad_step, result.trajectory)
    else:
        result = ChainResult(torch.empty_like(z))
    fits = native.plain_mlp_langevin_chain(z, mlp, update, n_steps, record.thin, result, torch.get_num_threads())
    return result if fits else None


def plain_layout(z: object) -> LatentLayout | None:
    """The layout of latents that `chain_of_latents` may take as they are; None of others.

    Several layers are copied side by side by the calling thread alone: small ones only.
    """
    if _kernels() is None:
        return None
    if isinstance(z, Tensor):
        if not _is_float32(z) or z.ndim not in (2, 4):
            return None
        _, width, *trailing = z.shape
        return LatentLayout(Tensor, (width,), (tuple(trailing),)) if trailing in ([], [1, 1]) else None
    if type(z) not in (list, tuple) or not z:
        return None
    dims, chains = [], None
    for layer in z:
        if not _is_float32(layer) or layer.ndim != 2:
            return None
        rows, width = layer.shape
        if chains is None:
            chains = rows
        elif rows != chains:
            return None
        dims.append(width)
    if chains * sum(dims) > _LARGEST_COPY:
        return None
    return LatentLayout(type(z), tuple(dims), ((),) * len(dims))


def lies_as(z: object, layout: LatentLayout) -> bool:
    """Whether `plain_layout` of z is this one, of which it was one before."""
    return _kernels().plain_latents(z, layout, _LARGEST_COPY)


def chain_of_latents(
    z: Latents,
    layout: LatentLayout,
    mlp: MLP,
    update: Update,
    n_steps: int,
    record: Record,
    info: type[tuple],
    negative: bool,
) -> Latents | tuple[Latents, tuple] | None:
    """`mlp_langevin_chain` of latents in their own structure: where they end, or (end, info) if anything is recorded.

    The layout is that of `plain_layout`; n_steps and record are checked, and an update of as many steps. info is a
    named tuple's class, of ChainResult's fields behind z. negative: the energy told is -f.
    """
    native, threads = _kernels(), torch.get_num_threads()
    if not record.trajectory:
        answer = native.plain_chain_of_latents(
            z, mlp, update, n_steps, record.thin, info if record.diagnostics else None, negative,
            torch.empty_like, _LARGEST_COPY, threads,
        )  # fmt: skip
        if answer is not None or not record.diagnostics:
            return answer
    if layout.container is Tensor:
        first, end = z, torch.empty_like(z)
    else:
        first, end = z[0], layout.container([torch.empty_like(layer) for layer in z])
    result = recorded(end, first, (first.shape[0], layout.dim), n_steps, record)
    if not native.plain_mlp_langevin_chain(z, mlp, update, n_steps, record.thin, result, threads):
        return None
    _, energy, *others = result
    return end, info(-energy if negative and energy is not None else energy, *others)


def energy_grad_operator(arguments: tuple, spec_of: Callable[[str, float], MLPSpec]) -> tuple[Tensor, Tensor] | None:
    """The registered operator `mlp_energy_grad` (`registration.py`) of all its arguments; spec_of(spec, out_scale)."""
    native = _kernels()
    if native is None:
        return None
    return native.plain_energy_grad_operator(arguments, spec_of, torch.empty_like, torch.get_num_threads())


def chain_operator(arguments: tuple, spec_of: Callable[[str, float], MLPSpec]) -> list[Tensor] | None:
    """The registered operator `mlp_langevin_chain` likewise; None with a trajectory."""
    native = _kernels()
    if native is None:
        return None
    return native.plain_chain_operator(arguments, spec_of, torch.empty_like, _LARGEST_COPY, torch.get_num_threads())
