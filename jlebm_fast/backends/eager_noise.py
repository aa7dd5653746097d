"""The noise contract in plain torch: the oracle that every backend's normals equal bit for bit.

    counter  (dim // 4, chain, step, stream)      words   philox4x32, 10 rounds, key = (low word, high word)
    uniform  (word >> 9) 2^-23 + 2^-24            normal  Box-Muller on words (0, 1) and (2, 3)

ln, cos and sin are short polynomials; each multiplication and addition below is one torch operation and therefore
rounds on its own. The same constants stand in csrc/common/normal.h.
Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rng import LANGEVIN

_MASK32 = 0xFFFFFFFF
_LOG_Q = (
    1.0,
    -0.4999997913837433,
    0.3333415985107422,
    -0.25002944469451904,
    0.19958415627479553,
    -0.1654374599456787,
    0.14917394518852234,
    -0.14482136070728302,
    0.08959802985191345,
)
_LN2 = 0.6931471805599453
_SIN_S = (6.2831854820251465, -41.3416633605957, 81.5925521850586, -75.40206909179688)
_COS_C = (-19.739208221435547, 64.93936920166016, -85.44882202148438, 59.42434310913086)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Four words of Philox4x32 for int64 counters that hold unsigned 32-bit values and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap; shifting and masking recovers both unsigned halves
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def _polynomial(coefficients: tuple[float, ...], at: Tensor) -> Tensor:
    value = torch.full_like(at, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * at
        value = value + c
    return value


def box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two int64 tensors of unsigned 32-bit words."""
    odd = ((word0 >> 9) << 1) + 1
    bits = odd.to(torch.float32).view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) + -1.0
    f_q = f * _polynomial(_LOG_Q, f)
    e_ln2 = (exponent - 24).to(torch.float32) * torch.tensor(_LN2, dtype=torch.float32, device=f.device)
    minus_two_ln = (e_ln2 + f_q) * -2.0
    # torch.sqrt on the CPU is not correctly rounded in float32; through float64 it is
    r = minus_two_ln.to(torch.float64).sqrt().to(torch.float32)

    k = word1 >> 9
    quadrant = (k + (1 << 20)) >> 21
    offset = ((k << 1) + 1) - (quadrant << 22)
    at = offset.to(torch.float32) * 2.0**-24
    at2 = at * at
    sine = _polynomial(_SIN_S, at2) * at
    cosine = _polynomial(_COS_C, at2) * at2
    cosine = cosine + 1.0
    swap = (quadrant & 1) != 0
    cosine, sine = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    cosine = torch.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = torch.where((quadrant & 2) != 0, -sine, sine)
    return r * cosine, r * sine


def langevin_noise(
    noise_key: int,
    n_steps: int,
    chains: int,
    dim: int,
    *,
    first_step: int = 0,
    first_chain: int = 0,
    stream: int = LANGEVIN,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise field eps [n_steps, chains, dim]; always computed in float32, then cast to `dtype`."""
    out = torch.empty((n_steps, chains, dim), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    key = (noise_key & _MASK32, (noise_key >> 32) & _MASK32)
    groups = (dim + 3) // 4
    group = torch.arange(groups, device=device).view(1, groups)
    # counters are 32-bit and wrap
    chain = ((torch.arange(chains, device=device) + first_chain) & _MASK32).view(chains, 1)
    zero = torch.zeros((chains, groups), dtype=torch.int64, device=device)
    for step in range(n_steps):
        w0, w1, w2, w3 = philox4x32(
            (zero + group, zero + chain, zero + ((first_step + step) & _MASK32), zero + stream), key
        )
        normals = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1)
        out[step] = normals.view(chains, groups * 4)[:, :dim].to(dtype)
    return out
