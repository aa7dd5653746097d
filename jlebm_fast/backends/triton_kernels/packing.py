"""The kernel `pack_weights`: the weights of a streamed net as streamed.py reads them, in one launch.

Row r of layer l comes to row first_row(l) + r of a buffer [rows, stride], as an operand of the matrix products; zeros
fill what is beside a weight and below it, up to the padded width. Biases come to a column of as many rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .resident import operand
from .spectral import chosen


@triton.jit(do_not_specialize=["stride"])
def pack_weights(
    packed,  # [rows, stride]
    packed_biases,  # float32 [rows]
    weights,  # of each layer float32 [out, in]
    biases,  # of each layer float32 [out] or None
    layers,  # int64 [layers, 6], see streamed.py
    stride,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (i, l) packs ROWS rows of layer l."""
    layer = tl.program_id(1)
    padded_out = tl.load(layers + layer * 6 + 1)
    first_row = tl.load(layers + layer * 6 + 2)
    n_in, n_out = tl.load(layers + layer * 6 + 4), tl.load(layers + layer * 6 + 5)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight = chosen(layer, weights)
    bias = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(len(biases)):
        if biases[i] is not None:
            bias += tl.load(biases[i] + row, mask=(row < n_out) & (layer == i), other=0.0)
    tl.store(packed_biases + first_row + row, bias, mask=row < padded_out)
    for first in range(0, stride, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (row < n_out)[:, None] & (column < n_in)
        tile = operand(tl.load(weight + (row[:, None] * n_in + column), mask=inside, other=0.0), PRECISION)
        at = (first_row + row)[:, None] * stride + column
        tl.store(packed + at, tile, mask=(row < padded_out)[:, None] & (column < stride))
