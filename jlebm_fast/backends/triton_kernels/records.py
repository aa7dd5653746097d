"""What the kernels receive: problem.py's records as tuples of pointers and numbers.

Pointers are tensors here; None where the record has None, and then the kernel is compiled without that part. Words of
keys and counters are no part of these tuples: as arguments of their own they are launched unspecialised, and as signed
32-bit integers their type never depends on their value, so a kernel is compiled per shape, not per key or offset.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class UpdatePointers(NamedTuple):
    """The tensors of an Update.

    coefficients         float32 [n_steps, 3]: c_grad, c_prior, c_noise
    chain_coefficients   float32 [chains, 3]
    mean, precision      float32, one row for all chains (stride 0) or one row per chain (stride dim)
    frozen               bool, likewise
    noise                float32 [n_steps, chains, dim]
    extra_grad           float32 [chains, dim]
    key                  int64 [1] on the device, or None: the key comes as two words
    """

    coefficients: Tensor
    chain_coefficients: Tensor | None
    mean: Tensor | None
    precision: Tensor | None
    frozen: Tensor | None
    noise: Tensor | None
    extra_grad: Tensor | None
    key: Tensor | None


class UpdateStrides(NamedTuple):
    """Elements from one chain's row to the next in an Update's tensors; 0 for one row that all chains share."""

    mean: int
    precision: int
    frozen: int


class NetPointers(NamedTuple):
    """The tensors of an MLP: L + 1 weights float32 [out, in], biases [out] or None, context_bias, logit."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    context: Tensor | None
    logit: Tensor | None


class RecordPointers(NamedTuple):
    """Where a chain is recorded, the fields of ChainResult; None for what is not wanted."""

    energy: Tensor | None
    grad_norm: Tensor | None
    displacement: Tensor | None
    first_bad_step: Tensor | None
    trajectory: Tensor | None


class SpectralPointers(NamedTuple):
    """Of every weight whose spectral norm is taken: float32 [n_out, n_in], what to start from, and where results go."""

    weights: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    us: tuple[Tensor, ...]
    vs: tuple[Tensor, ...]
    sigmas: tuple[Tensor, ...]
    normalised: tuple[Tensor, ...]
    kept_us: tuple[Tensor, ...]
    kept_vs: tuple[Tensor, ...]
