"""One Langevin update of a tile, and the kernel `langevin_step`.

    z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps

In the order of the oracle, operation by operation. `update` is an UpdatePointers, `strides` an UpdateStrides,
`words` the key's two words, the first step and the first chain.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import key_words, normals


@triton.jit
def step_coefficients(coefficients, of_chains, step, chain, is_chain):
    """(c_grad, c_prior, c_noise) of a step as rows [1, chains], times the chain's factors where there are any."""
    of_step = coefficients + step * 3
    c_grad = tl.full((1, chain.shape[0]), tl.load(of_step), tl.float32)
    c_prior = tl.full((1, chain.shape[0]), tl.load(of_step + 1), tl.float32)
    c_noise = tl.full((1, chain.shape[0]), tl.load(of_step + 2), tl.float32)
    if of_chains is not None:
        factors = of_chains + chain * 3
        c_grad *= tl.load(factors, mask=is_chain, other=0.0)[None, :]
        c_prior *= tl.load(factors + 1, mask=is_chain, other=0.0)[None, :]
        c_noise *= tl.load(factors + 2, mask=is_chain, other=0.0)[None, :]
    return c_grad, c_prior, c_noise


@triton.jit
def noise_of_step(noise, key, words, step, chain, first_group, at, inside, chains, dim, GROUPS: tl.constexpr):
    """eps [4 GROUPS, chains] of step number `step` of this call: given, or drawn in place. at = chain dim + d."""
    if noise is not None:
        eps = tl.load(noise + (step * chains * dim + at), mask=inside, other=0.0)
    else:
        low, high = key_words(key, words[0], words[1])
        steps = tl.zeros((chain.shape[0],), tl.uint32) + (step + words[2]).to(tl.uint32)
        eps = normals(first_group, (chain + words[3]).to(tl.uint32), steps, 0, low, high, GROUPS)
    return eps


@triton.jit
def updated(z, grad, eps, coefficients, update, strides, chain, d, at, inside):
    """z after the update, float32 [dimensions, chains]; what is not inside the state stays 0."""
    c_grad, c_prior, c_noise = coefficients
    moved = z + c_grad * grad
    if update.precision is not None:
        precision_at = chain[None, :] * strides.precision + d[:, None]
        precision = tl.load(update.precision + precision_at, mask=inside, other=0.0)
        if update.mean is not None:
            mean_at = chain[None, :] * strides.mean + d[:, None]
            mean = tl.load(update.mean + mean_at, mask=inside, other=0.0)
            moved = moved + c_prior * ((mean - z) * precision)
        else:
            moved = moved + c_prior * (-z * precision)
    if update.extra_grad is not None:
        moved = moved + c_prior * tl.load(update.extra_grad + at, mask=inside, other=0.0)
    moved = moved + c_noise * eps
    if update.frozen is not None:
        frozen_at = chain[None, :] * strides.frozen + d[:, None]
        moved = tl.where(tl.load(update.frozen + frozen_at, mask=inside, other=0) != 0, z, moved)
    return tl.where(inside, moved, 0.0)


# A step's row of the coefficients is 12 bytes from the last one's, its noise any number: were their alignment part of
# what a kernel is compiled for, the second step of a chain would compile again. So they are no part of `update`: what
# stands in a tuple is always looked at. No access gets wider by it, `dim` is not known.
@triton.jit(
    do_not_specialize=["key_low", "key_high", "first_step", "first_chain", "chains", "dim"],
    do_not_specialize_on_alignment=["coefficients", "noise"],
)
def langevin_step(
    z_ptr,  # float32 [chains, dim]
    grad_ptr,  # float32 [chains, dim]
    out_ptr,  # float32 [chains, dim]
    coefficients,  # float32 [1, 3]
    noise,  # float32 [1, chains, dim] or None
    update,  # without these two
    strides,
    key_low,
    key_high,
    first_step,
    first_chain,
    chains,
    dim,
    BLOCK_CHAINS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    chain = tl.program_id(0).to(tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
    first_group = tl.program_id(1) * GROUPS
    d = first_group * 4 + tl.arange(0, 4 * GROUPS)
    is_chain = chain < chains
    inside = (d < dim)[:, None] & is_chain[None, :]
    at = chain[None, :] * dim + d[:, None]
    step = tl.zeros((), tl.int64)
    words = (key_low, key_high, first_step, first_chain)
    eps = noise_of_step(noise, update.key, words, step, chain, first_group, at, inside, chains, dim, GROUPS)
    factors = step_coefficients(coefficients, update.chain_coefficients, step, chain, is_chain)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    moved = updated(z, grad, eps, factors, update, strides, chain, d, at, inside)
    tl.store(out_ptr + at, moved, mask=inside)
