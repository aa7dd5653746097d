"""Tiles that won a measurement on a GPU; tiles.py takes these before any estimate of its own.

Rows come from `python benchmarks/gpu/tiles.py`, which prints them as they stand here, and nowhere else:

    (kind, capability, products, padded widths, how many chains): (regime, block_chains, num_warps, block_out, block_in,
                                                                   num_stages)

The key is `tiles.shape_class`, the value the fields of `tiles.Tiles`. Empty: nothing has been measured yet.
"""

from __future__ import annotations

MEASURED: dict[tuple[str, int, str, tuple[int, ...], str], tuple[str, int, int, int, int, int]] = {}
