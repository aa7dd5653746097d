"""Spectral norm of a weight, converged: what every chain and every EnergyMLP divides by.

The rule: sigma = uᵀ W v with (u, v) the top singular pair to a relative residual `TOLERANCE`,
‖W Wᵀ u − sigma² u‖ <= TOLERANCE · sigma², whatever the buffers of the module say. Started from vectors that
are nearly right (a weight that moved by one optimiser step) that costs a few power iterations; vectors that do not
converge within `MAX_ITERATIONS` are replaced by an exact singular value decomposition. A module's own buffers
are read as the starting point and never written here.

Why: a power iteration that is frozen before it has converged divides by too little, and the chain diverges. The
relative error of sigma is of second order, residual² / relative gap to the next singular value: 1e-7, float32's
rounding, at the gap of a tenth that a random 50 x 50 weight has, and never more than the residual.
Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .modes import chain_mode

# float32 serves the chains; float64 is where the oracle and finite differences live
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
# beyond this many products an SVD of a 50 x 50 weight is cheaper
MAX_ITERATIONS = 40


def top_singular_triple(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor, float]:
    """(u [out], v [in], sigma) with sigma = uᵀ W v the largest singular value of W [out, in]; started from u [out].

    A weight that holds NaN or infinity gives sigma = nan, and so a chain that says so in its diagnostics.
    """
    weight, u = weight.detach(), u.detach()
    tolerance = TOLERANCE.get(weight.dtype, TOLERANCE[torch.float32])
    if weight.device.type == "cpu" and weight.dtype in TOLERANCE:
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
    for _ in range(MAX_ITERATIONS):
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
            return u, back / math.sqrt(square_back), math.sqrt(square_forth / square_back)
    return u, back, None
