"""The noise contract in Triton: words, normals and the kernel `langevin_noise`.

    counter  (dim // 4, chain, step, stream)      words   philox4x32, 10 rounds, key = (low word, high word)
    uniform  (word >> 9) 2^-23 + 2^-24            normal  Box-Muller on words (0, 1) and (2, 3)

The statement in C++ is csrc/common/philox.h and normal.h, the oracle eager_noise.py; all agree in every bit. ln, cos
and sin are polynomials whose multiplications and additions round one by one. That holds only in kernels launched with
`enable_fp_fusion=False`, so every kernel here is, and where a fused multiply-add is wanted it stands as `tl.fma`;
`tl.dot` is not concerned, its instructions fuse whatever the option says. The square root is correctly rounded
(`tl.sqrt_rn`).
Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, key_low, key_high, ROUNDS: tl.constexpr):
    """Four uint32 words of a counter of four uint32 tensors of one shape; the key is two uint32 scalars."""
    # as tensors the key's words wrap in silence, also in the interpreter, and each round has less to compile
    key_low, key_high = tl.full(c0.shape, key_low, tl.uint32), tl.full(c0.shape, key_high, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high_0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high_1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        low_0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        low_1 = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0 = high_1 ^ c1 ^ key_low
        c1 = low_1
        c2 = high_0 ^ c3 ^ key_high
        c3 = low_0
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(word_0, word_1):
    """Two float32 normals, r cos(2 pi u1) and r sin(2 pi u1), from two uint32 words."""
    # 2 (word_0 >> 9) + 1 is an odd integer below 2^24, exact as a float; it is u0 2^24
    bits = ((word_0 >> 8) | 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    shifted = bits - 0x4B3504F3  # bits of sqrt(1/2), and 24 taken off the exponent
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) + -1.0
    # -2 ln(1 + f) = f Q(f): the factor -2 stands in the constants, scaling by it is exact
    q = f * -0.17919605970382690 + 0.28964272141456604
    q = q * f + -0.29834789037704468
    q = q * f + 0.3308749198913574
    q = q * f + -0.39916831254959106
    q = q * f + 0.5000588893890381
    q = q * f + -0.6666831970214844
    q = q * f + 0.9999995827674866
    q = q * f + -2.0
    r = tl.sqrt_rn((shifted >> 23).to(tl.float32) * -1.3862943611198906 + f * q)

    # u1 + 1/8 (mod 1): the quadrant stands in its two top bits, the mantissa of x + 3/8 in the 21 bits below them
    turned = word_1 + 0x20000000
    x = (((turned >> 7) & 0x7FFFFC) | 0x3E800002).to(tl.float32, bitcast=True) + -0.375
    y = x * x
    sine = y * -75.40206909179688 + 81.5925521850586
    sine = sine * y + -41.3416633605957
    sine = (sine * y + 6.2831854820251465) * x
    cosine = y * 59.42434310913086 + -85.44882202148438
    cosine = cosine * y + 64.93936920166016
    cosine = cosine * y + -19.739208221435547
    cosine = cosine * y + 1.0
    odd_quadrant = (turned & 0x40000000) != 0
    first = tl.where(odd_quadrant, sine, cosine)
    second = tl.where(odd_quadrant, cosine, sine)
    # the cosine is negative in quadrants 1 and 2, the sine in 2 and 3
    first = first.to(tl.uint32, bitcast=True) ^ ((turned + 0x40000000) & 0x80000000)
    second = second.to(tl.uint32, bitcast=True) ^ (turned & 0x80000000)
    return r * first.to(tl.float32, bitcast=True), r * second.to(tl.float32, bitcast=True)


@triton.jit
def normals(first_group, chain, step, stream, key_low, key_high, GROUPS: tl.constexpr):
    """eps [4 GROUPS, chains]: dimensions from 4 first_group on, of the chains uint32 [chains] at the steps likewise."""
    group = (first_group + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = tl.zeros((GROUPS, chain.shape[0]), tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        zero + group[:, None], zero + chain[None, :], zero + step[None, :], zero + stream, key_low, key_high, 10
    )
    # joining puts the new index last: [GROUPS, chains, pair], then the component of the pair; both pairs go through
    # one `box_muller`, so that its operations are compiled once
    first, second = box_muller(tl.join(w0, w2), tl.join(w1, w3))
    field = tl.join(first, second)
    return tl.reshape(tl.permute(field, (0, 2, 3, 1)), (4 * GROUPS, chain.shape[0]))


@triton.jit
def key_words(key_ptr, key_low, key_high):
    """Both uint32 words of the key: from one int64 on the device, read by each launch and replay, or from the call."""
    if key_ptr is not None:
        key = tl.load(key_ptr).to(tl.uint64)
        low = (key & 0xFFFFFFFF).to(tl.uint32)
        high = (key >> 32).to(tl.uint32)
    else:
        low = key_low.to(tl.uint32)
        high = key_high.to(tl.uint32)
    return low, high


@triton.jit(
    do_not_specialize=["key_low", "key_high", "first_step", "first_chain", "stream", "chains", "rows", "dim"],
)
def langevin_noise(
    out_ptr,  # float32 [rows, dim], rows = n_steps chains
    key_ptr,  # int64 [1], or None: then the two words, as signed 32-bit integers
    key_low,
    key_high,
    first_step,
    first_chain,
    stream,
    chains,
    rows,
    dim,
    BLOCK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    low, high = key_words(key_ptr, key_low, key_high)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_group = tl.program_id(1) * GROUPS
    step = (row // chains + first_step).to(tl.uint32)
    chain = (row % chains + first_chain).to(tl.uint32)
    eps = normals(first_group, chain, step, stream.to(tl.uint32), low, high, GROUPS)
    d = first_group * 4 + tl.arange(0, 4 * GROUPS)
    tl.store(out_ptr + (row[None, :] * dim + d[:, None]), eps, mask=(d < dim)[:, None] & (row < rows)[None, :])
