"""Spectral norm of a weight, converged: what every chain and every EnergyMLP divides by.

The rule: sigma = uᵀ W v with (u, v) the top singular pair to a relative residual of `TOLERANCE`,
‖Wᵀu − sigma v‖ <= TOLERANCE · sigma, whatever the buffers of the module say. Started from vectors that
are nearly right (a weight that moved by one optimiser step) that costs a few power iterations; vectors that do not
converge within `MAX_ITERATIONS` are replaced by an exact singular value decomposition. A module's own buffers
are read as the starting point and never written here.

Why: a power iteration that is frozen before it has converged divides by too little, and the chain diverges. The
relative error of sigma is of second order, residual² / relative gap to the next singular value: 1e-7, float32's
rounding, at the gap of a tenth that a random 50 x 50 weight has, and never more than the residual.
Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, algorithm 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1e-4
# beyond this many products an SVD of a 50 x 50 weight is cheaper
MAX_ITERATIONS = 40


@torch.no_grad()
def top_singular_vectors(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The top left and right singular vectors (u [out], v [in]) of a weight [out, in], started from u [out]."""
    weight = weight.detach()
    for _ in range(MAX_ITERATIONS):
        back = torch.mv(weight.t(), u)
        v = F.normalize(back, dim=0)
        forth = torch.mv(weight, v)
        # with v = Wᵀu / ‖Wᵀu‖ the residual of the pair (u, v) stands in W v = sigma u
        sigma = torch.linalg.vector_norm(forth)
        residual = torch.linalg.vector_norm(forth - sigma * u)
        u = forth / sigma.clamp(min=torch.finfo(weight.dtype).tiny)
        if residual <= TOLERANCE * sigma:
            return u, v
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, 0].contiguous(), right[0].contiguous()
