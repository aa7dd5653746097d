"""What the machine itself can do: the limits that fractions are fractions of. Measured, never looked up."""

from __future__ import annotations

import time

import torch

_COPY_FLOATS = 1 << 26  # 256 MiB: far larger than any cache


def fma_peak(n_threads: int, seconds: float = 0.3) -> float:
    """GFLOP/s of `n_threads` threads that only multiply and add in registers, in the widest vectors of this processor.

    Raises:
        RuntimeError: the native module is not built; the message carries the remedy.
    """
    from jlebm_fast.backends import _native

    return _native.load().fma_peak(n_threads, seconds)


def copy_rate(seconds: float = 0.3) -> float:
    """GB/s of copying memory with torch's present threads, bytes read plus bytes written; the best of its repeats."""
    source = torch.zeros(_COPY_FLOATS)
    target = torch.empty_like(source).copy_(source)  # pages exist before the clock starts
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9
