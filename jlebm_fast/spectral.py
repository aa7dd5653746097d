"""Spectral norm of a weight, converged: what every chain and every EnergyMLP divides by.

The rule: sigma = uᵀ W v with (u, v) the top singular pair to a relative residual `TOLERANCE`,
‖W Wᵀ u − sigma² u‖ <= TOLERANCE · sigma², whatever the buffers of the module say. Started from vectors that
are nearly right (a weight that moved by one optimiser step) that costs a few power iterations, and where the next
singular value lies close, Lanczos' iteration (`csrc/cpu/spectral_norm.cpp`). What does not converge so is replaced by
an exact singular value decomposition. A module's own buffers are read as the starting point and never written here.

Why: a power iteration that is frozen before it has converged divides by too little, and the chain diverges. The
relative error of sigma is of second order, residual² / relative gap to the next singular value: 1e-7, float32's
rounding, at the gap of a tenth that a random 50 x 50 weight has, and never more than the residual. A start that is a
singular vector already, but of a lesser value (of an earlier weight the first), would stay where it is: on the CPU it
is held against three products of another vector, which show a value that is clearly larger.

On a GPU the kernels of backend cuda or triton iterate to the same residual, for all weights of a net in one launch, and
nobody on the host looks at a value: no wait, and a CUDA graph may capture it.
Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .backends import _native
from .checks import has_memory
from .modes import capturing, chain_mode, unwatched

# float32 serves the chains; float64 is where the oracle and finite differences live
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
# of numpy or torch: beyond this many, an SVD of a 50 x 50 weight is cheaper
MAX_ITERATIONS = 40
_PRODUCTS_OF_ANOTHER, _LARGER = 3, 1.001
_MOST_PRODUCTS = 400  # of the compiled module, which takes one or two microseconds for each of a 50 x 50 weight
# larger weights gain more from the threads of a matrix library than they lose by being handed to it
_LARGEST_NATIVE = 1 << 16
# whatever torch.set_default_device says
_HERE = {"dtype": torch.float32, "device": torch.device("cpu")}


# a weight [out, in], and the vector u [out] to start from
Pair = tuple[Tensor, Tensor]


class TopSingular(NamedTuple):
    """u [out], v [in] and sigma = uᵀ W v, the largest singular value of W [out, in]; normalised = W / sigma.

    sigma is a number, or a tensor [1] where kernels on a device found it.
    """

    u: Tensor
    v: Tensor
    sigma: float | Tensor
    normalised: Tensor


def top_singulars(pairs: Sequence[Pair], keep: Sequence[Pair] | None = None) -> list[TopSingular]:
    """`TopSingular` of several weights, each given as (W [out, in], u [out] to start from).

    keep: of each weight the buffers (u [out], v [in]) to be overwritten with what was found, unless it is not finite.

    A weight that holds NaN or infinity gives sigma = nan, and so a chain that says so in its diagnostics.
    """
    if not pairs:
        return []
    kernels = _device_kernels(pairs)
    if kernels is not None:
        return [TopSingular(*top) for top in kernels.top_singulars(pairs, TOLERANCE[torch.float32], keep)]
    found: list[TopSingular | None] = [None] * len(pairs)
    small = [i for i, (weight, u) in enumerate(pairs) if _fits_native(weight, u)]
    if small and _native.unavailable_reason() is None:
        for i, top in zip(small, _native_singulars([pairs[i] for i in small]), strict=True):
            found[i] = top
    singulars = [top or _of_one(weight, u) for top, (weight, u) in zip(found, pairs, strict=True)]
    for top, (u, v) in zip(singulars, keep or (), strict=False):
        if math.isfinite(top.sigma):
            with torch.no_grad():
                u.copy_(top.u)
                v.copy_(top.v)
    return singulars


def _device_kernels(pairs: Sequence[Pair]) -> ModuleType | None:
    """The backend whose kernels serve these weights on their device; None where there is none."""
    weight = pairs[0][0]
    if weight.device.type != "cuda" or any(t.dtype is not torch.float32 for pair in pairs for t in pair):
        return None
    reasons = {}
    for name in ("cuda", "triton"):
        reasons[name] = backends.unavailable_reason(name)
        if reasons[name] is None:
            module = backends.load(name)
            reasons[name] = module.spectral_unsupported_reason([tuple(w.shape) for w, _ in pairs], weight.device)
            if reasons[name] is None:
                return module
    if capturing(weight.device):
        raise ValueError(
            "this spectral norm is converged with a look at its values, which no CUDA graph can capture; not cuda: "
            f"{reasons['cuda']}; not triton: {reasons['triton']}"
        )
    return None


def _fits_native(weight: Tensor, u: Tensor) -> bool:
    return (
        weight.dtype is torch.float32
        and u.dtype is torch.float32
        and weight.is_cpu
        and u.is_cpu
        and 0 < weight.numel() <= _LARGEST_NATIVE
        and weight.is_contiguous()
        and u.is_contiguous()
        and not (weight.is_neg() or u.is_neg())  # their memory would hold their negatives
        and has_memory(weight)
        and has_memory(u)
        and unwatched()  # a mode may make tensors without memory
    )


def _native_singulars(pairs: list[Pair]) -> list[TopSingular | None]:
    """All of them in one native call; None where power iterations did not converge."""
    outputs, layers = [], []
    for weight, start in pairs:
        n_out, n_in = weight.shape
        u, v, normalised = (torch.empty(n, **_HERE) for n in (n_out, n_in, (n_out, n_in)))
        outputs.append((u, v, normalised))
        layers.append(
            (n_out, n_in, weight.data_ptr(), start.data_ptr(), u.data_ptr(), v.data_ptr(), normalised.data_ptr())
        )
    sigmas = _native.load().cpu_spectral_norms(layers, TOLERANCE[torch.float32], _MOST_PRODUCTS)
    # written so that NaN, a weight that is not finite, passes
    return [
        None if sigma < 0 else TopSingular(u, v, sigma, normalised)
        for (u, v, normalised), sigma in zip(outputs, sigmas, strict=True)
    ]


def normalised_weights(pairs: Sequence[Pair]) -> list[Tensor]:
    """W / sigma of several weights, given as for `top_singulars`: what a chain needs, without the vectors."""
    if _native.unavailable_reason() is not None or not all(_fits_native(weight, u) for weight, u in pairs):
        return [top.normalised for top in top_singulars(pairs)]
    layers, normalised = [], []
    shapes = [weight.shape for weight, _ in pairs]
    scratch = torch.empty(sum(map(sum, shapes)), **_HERE)
    address = scratch.data_ptr()
    for (weight, start), (n_out, n_in) in zip(pairs, shapes, strict=True):
        to = torch.empty_like(weight)
        normalised.append(to)
        v = address + 4 * n_out
        layers.append((n_out, n_in, weight.data_ptr(), start.data_ptr(), address, v, to.data_ptr()))
        address = v + 4 * n_in
    sigmas = _native.load().cpu_spectral_norms(layers, TOLERANCE[torch.float32], _MOST_PRODUCTS)
    return [
        _of_one(*pair).normalised if sigma < 0 else weight
        for pair, sigma, weight in zip(pairs, sigmas, normalised, strict=True)
    ]


def iterated_vectors(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v) after `MAX_ITERATIONS` power iterations, in torch alone and without a look at a value: for torch.func."""
    weight, u = weight.detach(), u.detach()
    for _ in range(MAX_ITERATIONS):
        v = torch.nn.functional.normalize(torch.mv(weight.t(), u), dim=0)
        u = torch.nn.functional.normalize(torch.mv(weight, v), dim=0)
    return u, v


def _of_one(weight: Tensor, u: Tensor) -> TopSingular:
    u, v, sigma = top_singular_triple(weight, u)
    return TopSingular(u, v, sigma, weight.detach() / sigma)


def top_singular_triple(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor, float]:
    """(u [out], v [in], sigma) of one weight of any size, dtype and device; `top_singulars` says what they are."""
    weight, u = weight.detach().resolve_neg(), u.detach().resolve_neg()
    tolerance = TOLERANCE.get(weight.dtype, TOLERANCE[torch.float32])
    if weight.device.type == "cpu" and weight.dtype in TOLERANCE and has_memory(weight) and has_memory(u):
        # numpy's calls cost a third of torch's, and a chain of 100 takes about as long as 100 of them
        u, v, sigma = _iterate(weight.numpy(), u.numpy(), tolerance)
        if sigma is not None:
            return torch.from_numpy(u), torch.from_numpy(v), sigma
    else:
        with chain_mode(weight.device):
            u, v, sigma = _iterate(weight, u, tolerance)
        if sigma is not None:
            return u, v, sigma
    with chain_mode(weight.device):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, 0].contiguous(), right[0].contiguous(), float(values[0])


def _iterate(weight: Any, u: Any, tolerance: float) -> tuple[Any, Any, float | None]:
    """Power iterations on numpy arrays or torch tensors; sigma is None where they did not converge."""
    transposed, back = weight.T, u
    for iteration in range(MAX_ITERATIONS):
        back = transposed @ u
        forth = weight @ back
        square_back, square_forth = float(back @ back), float(forth @ forth)
        if not math.isfinite(square_forth):
            return u, back, math.nan
        if square_forth == 0.0:
            break
        # u is an eigenvector of W Wᵀ, with eigenvalue ‖Wᵀu‖², once this vanishes
        residual = forth - square_back * u
        u = forth / math.sqrt(square_forth)
        if float(residual @ residual) <= tolerance * tolerance * square_forth:
            larger = None if iteration else _towards_a_larger_one(weight, u, square_back)
            if larger is not None:
                u = larger
                continue
            return u, back / math.sqrt(square_back), math.sqrt(square_forth / square_back)
    return u, back, None


def _towards_a_larger_one(weight: Any, u: Any, square: float) -> Any | None:
    """A start towards a larger singular value than that of u, a singular vector of sigma² = square; None where the
    first products of another vector show none. See `leaves_a_lesser_one` in csrc/cpu/spectral_norm.cpp."""
    other = np.cos(np.arange(1, u.shape[0] + 1, dtype=np.float64) ** 2)  # of no structure that a weight has
    other = other.astype(u.dtype) if isinstance(u, np.ndarray) else torch.from_numpy(other).to(u)
    for _ in range(_PRODUCTS_OF_ANOTHER):
        other = other - (other @ u) * u
        length = math.sqrt(float(other @ other))
        if not length > 0.0:
            return None
        other = other / length
        back = weight.T @ other
        if float(back @ back) > _LARGER * square:
            return other
        other = weight @ back
    return None
