"""From checked tensors to launches: arguments, grids and scratch memory of the kernels. Nothing here synchronises."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...checks import in_memory
from ...problem import MLP, ChainResult, MLPSpec, Update
from . import noise, packing, resident, spectral, streamed, update
from .records import NetPointers, RecordPointers, SpectralPointers, UpdatePointers, UpdateStrides
from .tiles import Chip, Tiles, power_of_two

# chains and groups of four dimensions of one program of an elementwise kernel: eight normals a thread
ELEMENTWISE_ROWS, ELEMENTWISE_GROUPS = 16, 16
# of a weight that a program of `spectral_norms` holds at a time: 16 of each thread
NORM_ELEMENTS = 4096
# rows and columns of a weight that a program of `pack_weights` holds at a time: 16 elements of each thread
PACKED_ROWS, PACKED_COLUMNS = 16, 128
# of every kernel: the noise contract (noise.py), and sums that all threads have alike
NO_FUSION = {"enable_fp_fusion": False}


class Call(NamedTuple):
    """A launch that has not happened yet, and those that it needs first; the tests compile the same for other chips."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    before: tuple[Call, ...] = ()

    def run(self) -> None:
        for call in self.before:
            call.run()
        if _is_capturing():
            with _nothing_new():
                self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
        else:
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _nothing_new() -> Iterator[None]:
    """Refuse what Triton would compile and load: a capture of a CUDA graph breaks on it. The hook is the process's, but
    another thread that captures nothing may go on compiling."""
    runtime = triton.knobs.runtime
    before = runtime.jit_cache_hook

    def refuse(*arguments: object, **options: object) -> object:
        if _is_capturing():
            _refuse()
        return None if before is None else before(*arguments, **options)

    runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        runtime.jit_cache_hook = before


def _refuse() -> None:
    raise RuntimeError(
        "the first call of backend 'triton' for these shapes and arguments came while a CUDA graph was being captured, "
        "which cannot hold the loading of a kernel; make the same call once before the capture"
    )


def signed(word: int) -> int:
    """The signed 32-bit integer with the bits of an integer's low word."""
    return ((word + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def noise_call(
    out: Tensor, noise_key: int | Tensor, first_step: int, first_chain: int, stream: int, groups: int | None = None
) -> Call:
    """`langevin_noise` into out [n_steps, chains, dim]."""
    n_steps, chains, dim = out.shape
    rows = n_steps * chains
    block_groups = groups or min(ELEMENTWISE_GROUPS, power_of_two(dim) // 4)
    grid = (-(-rows // ELEMENTWISE_ROWS), -(-dim // (4 * block_groups)))
    key, low, high = _key(noise_key)
    counters = (signed(first_step), signed(first_chain), signed(stream))
    arguments = (out, key, low, high, *counters, chains, rows, dim)
    return Call(
        noise.langevin_noise, grid, arguments, {"BLOCK_ROWS": ELEMENTWISE_ROWS, "GROUPS": block_groups}, NO_FUSION
    )


def step_call(z: Tensor, grad: Tensor, change: Update, out: Tensor) -> Call:
    """`langevin_step` of z [chains, dim] into out."""
    chains, dim = z.shape
    groups = min(ELEMENTWISE_GROUPS, power_of_two(dim) // 4)
    grid = (-(-chains // ELEMENTWISE_ROWS), -(-dim // (4 * groups)))
    pointers, *rest = _update_arguments(change)
    coefficients, drawn = pointers.coefficients, pointers.noise
    pointers = pointers._replace(coefficients=None, noise=None)
    arguments = (z, grad, out, coefficients, drawn, pointers, *rest, chains, dim)
    return Call(update.langevin_step, grid, arguments, {"BLOCK_CHAINS": ELEMENTWISE_ROWS, "GROUPS": groups}, NO_FUSION)


def energy_grad_call(
    z: Tensor, mlp: MLP, energy: Tensor, grad: Tensor, tiles: Tiles, precision: str, chip: Chip
) -> Call:
    """`mlp_energy_grad` of z [chains, dim] into energy [chains] and grad [chains, dim]."""
    return _mlp_call("mlp_energy_grad", (z, energy, grad), mlp, (z.shape[0],), tiles, precision, chip)


def chain_call(
    z: Tensor,
    mlp: MLP,
    change: Update,
    n_steps: int,
    thin: int,
    result: ChainResult,
    tiles: Tiles,
    precision: str,
    chip: Chip,
) -> Call:
    """`mlp_langevin_chain` from z [chains, dim] into `result`."""
    rest = (*_update_arguments(change), RecordPointers(*result[1:]), z.shape[0], n_steps, thin)
    return _mlp_call("mlp_langevin_chain", (z, result.z), mlp, rest, tiles, precision, chip)


def spectral_call(
    pairs: Sequence[tuple[Tensor, Tensor]],
    found: Sequence[tuple[Tensor, ...]],
    keep: Sequence[tuple[Tensor, Tensor]] | None,
    tolerance: float,
) -> Call:
    """The spectral norms of weights [out, in] into `found`: (u [out], v [in], sigma [1], normalised) of each."""
    weights, starts = zip(*[(in_memory(weight), in_memory(start)) for weight, start in pairs], strict=True)
    pointers = SpectralPointers(
        weights, starts, *zip(*found, strict=True), *(zip(*keep, strict=True) if keep else ((), ()))
    )
    n_outs, n_ins = zip(*[weight.shape for weight in weights], strict=True)
    columns = power_of_two(max(n_ins))
    constants = {"KEEP": keep is not None, "ROWS": max(1, NORM_ELEMENTS // columns), "COLUMNS": columns}
    # fused, the two lanes of a sum's first step would round differently, and each would store its own
    options = {"num_warps": 8, **NO_FUSION}
    arguments = (pointers, n_outs, n_ins, tolerance)
    return Call(spectral.spectral_norms, (len(weights),), arguments, constants, options)


def _mlp_call(
    op: str, tensors: tuple[Tensor, ...], mlp: MLP, rest: tuple, tiles: Tiles, precision: str, chip: Chip
) -> Call:
    spec, chains = mlp.spec, tensors[0].shape[0]
    blocks = -(-chains // tiles.block_chains)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **NO_FUSION}
    if tiles.regime == "resident":
        constants = {
            "WIDTHS": spec.widths,
            "PADDED": tuple(map(power_of_two, spec.widths)),
            "ACTIVATIONS": spec.activations,
            "PARAMETERS": spec.activation_params,
            "HEAD": spec.head,
            "PRECISION": precision,
            "BLOCK_CHAINS": tiles.block_chains,
        }
        arguments = (*tensors, _net(mlp), spec.out_scale, *rest)
        return Call(getattr(resident, op), (blocks,), arguments, constants, options)
    side = max(tiles.block_out, tiles.block_in)
    layout = _layout(spec, side)
    layers, parameters = _tables(spec, side, tensors[0].device)
    packed, packed_biases, packing_call = _packing(mlp, layout, layers, precision)
    # a program takes block after block; twice as many as processors, so that one waits while the other computes
    programs = min(blocks, 2 * chip.processors)
    elements = programs * (3 + spec.n_hidden) * tiles.block_chains * layout.stride
    scratch = torch.empty(elements, dtype=torch.float32, device=tensors[0].device)
    constants = {
        "DIM": spec.dim,
        "N_HIDDEN": spec.n_hidden,
        "WIDTH_1": spec.widths[1],
        "N_LOGITS": spec.n_logits,
        "KINDS": _kinds(spec),
        "HEAD": spec.head,
        "PRECISION": precision,
        "BLOCK_CHAINS": tiles.block_chains,
        "BLOCK_OUT": tiles.block_out,
        "BLOCK_IN": tiles.block_in,
        "STRIDE": layout.stride,
        "PADDED_LOGITS": power_of_two(spec.n_logits),
    }
    # the weights of this net stand in the packed buffer, but for those of a single logit
    net = _net(mlp)
    net = net._replace(weights=net.weights[-1:] if spec.n_logits == 1 else (), biases=())
    arguments = (*tensors, scratch, net, packed, packed_biases, layers, parameters, spec.out_scale, *rest)
    return Call(getattr(streamed, op), (programs,), arguments, constants, options, (packing_call,))


class _Layout(NamedTuple):
    """Where streamed.py finds the weights: padded widths, first row of each layer, rows, elements of a row."""

    padded: tuple[int, ...]
    first_row: tuple[int, ...]
    n_rows: int
    stride: int


@functools.lru_cache(maxsize=256)
def _layout(spec: MLPSpec, side: int) -> _Layout:
    padded = tuple(-(-width // side) * side for width in spec.widths)
    if spec.n_logits == 1:
        padded = (*padded[:-1], 1)  # for its bias: its weights are no matrix
    ends = [sum(padded[1 : layer + 1]) for layer in range(len(padded))]
    return _Layout(padded, tuple(ends[:-1]), ends[-1], max(padded))


def _kinds(spec: MLPSpec) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spec.activations))


@functools.cache  # for good: captured graphs hold these addresses
def _tables(spec: MLPSpec, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(layers, parameters) of streamed.py; they depend on the shape alone, so a captured graph finds them made."""
    if _is_capturing():
        _refuse()
    layout, kinds = _layout(spec, side), _kinds(spec)
    kind = [*(kinds.index(name) for name in spec.activations), 0]
    rows = list(zip(layout.padded, layout.padded[1:], layout.first_row, kind, spec.widths, spec.widths[1:]))
    layers = torch.tensor(rows, dtype=torch.int64, device=device)
    return layers, torch.tensor(spec.activation_params, dtype=torch.float32, device=device)


def _packing(mlp: MLP, layout: _Layout, layers: Tensor, precision: str) -> tuple[Tensor, Tensor, Call]:
    """Buffers for all weights [n_rows, stride] and biases [n_rows], and the call that fills them, anew every time."""
    net, device = _net(mlp), layers.device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    packed = torch.empty((layout.n_rows, layout.stride), dtype=dtype, device=device)
    biases = torch.empty(layout.n_rows, dtype=torch.float32, device=device)
    constants = {"PRECISION": precision, "ROWS": PACKED_ROWS, "COLUMNS": PACKED_COLUMNS}
    arguments = (packed, biases, net.weights, net.biases, layers, layout.stride)
    grid = (-(-max(layout.padded[1:]) // PACKED_ROWS), len(net.weights))
    return packed, biases, Call(packing.pack_weights, grid, arguments, constants, NO_FUSION)


def _net(mlp: MLP) -> NetPointers:
    return NetPointers(
        tuple(map(in_memory, mlp.weights)),
        tuple(map(_in_memory, mlp.biases)),
        _in_memory(mlp.context_bias),
        _in_memory(mlp.logit),
    )


def _update_arguments(change: Update) -> tuple:
    """update, strides and the four words, in the kernels' order."""
    key, low, high = _key(change.noise_key)
    tensors = (
        change.step_coefficients,
        change.chain_coefficients,
        change.prior_mean,
        change.prior_precision,
        change.frozen,
        change.noise,
        change.extra_grad,
    )
    strides = UpdateStrides(*(_chain_stride(t) for t in (change.prior_mean, change.prior_precision, change.frozen)))
    pointers = UpdatePointers(*map(_in_memory, tensors), key)
    return pointers, strides, low, high, signed(change.first_step), signed(change.first_chain)


def _key(noise_key: int | Tensor) -> tuple[Tensor | None, int, int]:
    """The key as (tensor, 0, 0), or as its two words."""
    if isinstance(noise_key, Tensor):
        return noise_key, 0, 0
    return None, signed(noise_key), signed(noise_key >> 32)


def _in_memory(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else in_memory(tensor)


def _chain_stride(per_dim_or_chain: Tensor | None) -> int:
    """Elements from one chain's row to the next; 0 for one row that all chains share."""
    return per_dim_or_chain.shape[1] if per_dim_or_chain is not None and per_dim_or_chain.dim() == 2 else 0
