"""torch.Generator in, one 64-bit noise key out: the only place where a generator is advanced."""

from __future__ import annotations

import torch

KEY_RANGE = 1 << 64
# steps and chains of the noise field are counted in 32 bits, and wrap
COUNTER_RANGE = 1 << 32
_CPU = torch.device("cpu")


def draw_noise_key(generator: torch.Generator | None = None) -> int:
    """Draw 64 bits from `generator`, or from torch's global CPU generator, to address one call's noise.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> draw_noise_key(g) == draw_noise_key(g.manual_seed(0))
        True
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    device = _CPU if generator is None else generator.device
    # torch.randint(0, 2**32, (2,)) by its parts, which cost half as much
    low, high = torch.empty(2, dtype=torch.int64, device=device).random_(0, 1 << 32, generator=generator).tolist()
    return low | (high << 32)


def check_noise_key(noise_key: int) -> int:
    """`noise_key`, an unsigned 64-bit integer."""
    if not isinstance(noise_key, int) or isinstance(noise_key, bool) or not 0 <= noise_key < KEY_RANGE:
        raise ValueError(f"noise_key must be an integer in [0, 2**64), got {noise_key!r}")
    return noise_key
