"""The kernel `spectral_norms`: of several weights the largest singular value, by power iteration, without the host.

    v = Wᵀ u, forth = W v, u <- forth / |forth|   until   |W Wᵀ u − |v|² u| <= tolerance |W v|;   sigma = |forth| / |v|

A program owns one weight and goes through it tile by tile, [ROWS, COLUMNS] with all of its columns. The rule is that of
`jlebm_fast/spectral.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Two singular values whose squares differ by a part d keep the residual above t for at most 2 ln(d / t) / d iterations,
# which for t = 1e-4 is largest, 7358, at d = 2.7e-4; a start near the answer takes one or two.
MOST_ITERATIONS = tl.constexpr(8192)


@triton.jit
def chosen(which, options):
    """options[which] of a tuple of pointers or numbers."""
    found = options[0]
    for i in tl.static_range(1, len(options)):
        if which == i:
            found = options[i]
    return found


@triton.jit
def spectral_norms(nets, n_outs, n_ins, tolerance, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    which = tl.program_id(0)
    n_out, n_in = chosen(which, n_outs), chosen(which, n_ins)
    weight, start, at_u = chosen(which, nets.weights), chosen(which, nets.starts), chosen(which, nets.us)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    is_column = c < n_in
    back = tl.zeros((COLUMNS,), tl.float32)
    zero = tl.sum(back)
    # u stands in its output's memory, longer than 1 by a factor
    for first in range(0, n_out, ROWS):
        tl.store(at_u + first + r, tl.load(start + first + r, mask=first + r < n_out), mask=first + r < n_out)
    scale, back_length, sigma = zero + 1.0, zero + 1.0, zero
    iteration, restarted = 0, 0
    while iteration < MOST_ITERATIONS:
        tl.debug_barrier()
        back = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, n_out, ROWS):
            is_row = first + r < n_out
            at = (first + r)[:, None] * n_in + c[None, :]
            w = tl.load(weight + at, mask=is_row[:, None] & is_column[None, :], other=0.0)
            u = tl.load(at_u + first + r, mask=is_row, other=0.0) * scale
            back += tl.sum(w * u[:, None], axis=0)
        square_back, square_forth, residual = tl.sum(back * back), zero, zero
        tl.debug_barrier()
        for first in range(0, n_out, ROWS):
            is_row = first + r < n_out
            at = (first + r)[:, None] * n_in + c[None, :]
            w = tl.load(weight + at, mask=is_row[:, None] & is_column[None, :], other=0.0)
            u = tl.load(at_u + first + r, mask=is_row, other=0.0) * scale
            forth = tl.sum(w * back[None, :], axis=1)
            off = forth - square_back * u
            square_forth += tl.sum(forth * forth)
            residual += tl.sum(off * off)
            tl.debug_barrier()
            tl.store(at_u + first + r, forth, mask=is_row)
        # a start of no use (zero, orthogonal to all that W maps to, not finite) is replaced once
        useful = (square_forth > 0.0) & (square_forth < float("inf"))
        length, back_length = tl.sqrt_rn(square_forth), tl.sqrt_rn(square_back)
        scale = tl.where(useful, 1.0 / length, 1.0)
        sigma = tl.where(useful, length / back_length, tl.where(square_forth == 0.0, 0.0, float("nan")))
        done = tl.where(useful, residual <= tolerance * tolerance * square_forth, restarted > 0)
        if (restarted == 0) & (useful == 0):
            restarted = 1
            tl.debug_barrier()
            for first in range(0, n_out, ROWS):
                other = 1.0 + 0.5 * (((first + r) * 40503) % 65536).to(tl.float32) / 65536.0
                tl.store(at_u + first + r, other, mask=first + r < n_out)
        iteration = tl.where(done, MOST_ITERATIONS, iteration + 1)
    has_norm = (sigma > 0.0) & (sigma < float("inf"))
    v = back / tl.where(has_norm, back_length, 1.0)
    tl.store(chosen(which, nets.vs) + c, v, mask=is_column)
    tl.store(chosen(which, nets.sigmas), sigma)
    tl.debug_barrier()
    for first in range(0, n_out, ROWS):
        is_row = first + r < n_out
        at = (first + r)[:, None] * n_in + c[None, :]
        inside = is_row[:, None] & is_column[None, :]
        u = tl.load(at_u + first + r, mask=is_row, other=0.0) * scale
        tl.debug_barrier()
        tl.store(at_u + first + r, u, mask=is_row)
        tl.store(chosen(which, nets.normalised) + at, tl.load(weight + at, mask=inside, other=0.0) / sigma, mask=inside)
        if KEEP:
            if has_norm:
                tl.store(chosen(which, nets.kept_us) + first + r, u, mask=is_row)
    if KEEP:
        if has_norm:
            tl.store(chosen(which, nets.kept_vs) + c, v, mask=is_column)
