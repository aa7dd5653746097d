"""Tuples that are no records of csrc/params.h are refused before any kernel sees them."""

from __future__ import annotations

import pytest

from jlebm_fast.backends import _native

needs_native = pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason()))
RECORDS = {
    "mlp": ((2, 3, 1), [1], (0.2,), 0, 1.0, [0, 0], [0, 0], 0, 0),
    "update": (0,) * 13,
    "record": (1, 0, 0, 0, 0, 0),
}


def _with(index, value):
    return lambda record: (*record[:index], value, *record[index + 1 :])


@needs_native
@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("mlp", lambda r: r[:-1], ValueError, "9 fields, got 8"),
        ("mlp", _with(0, (2, 1)), ValueError, "disagree on the number of layers"),
        ("mlp", _with(0, (2, 0, 1)), ValueError, "widths must be positive, got 0"),
        ("mlp", _with(0, (2, 1 << 40, 1)), ValueError, "integer must be in"),
        ("mlp", _with(0, 3), TypeError, "tuple or a list"),
        ("mlp", _with(1, [99]), ValueError, "unknown activation 99"),
        ("mlp", _with(3, -1), ValueError, "unknown head -1"),
        ("mlp", _with(4, "1"), TypeError, "real number"),
        ("mlp", _with(5, [-1, 0]), OverflowError, "negative"),
        ("update", lambda r: r[:-1], ValueError, "13 fields, got 12"),
        ("update", _with(11, 1 << 32), ValueError, r"integer must be in \[0, 4294967295\]"),
        ("update", _with(10, 1 << 64), OverflowError, "int too big"),
        ("update", _with(0, None), TypeError, "integer"),
        ("record", _with(0, 0), ValueError, "thin must be at least 1, got 0"),
        ("record", lambda r: (*r, 0), ValueError, "6 fields, got 7"),
    ],
)
def test_records_that_are_none_are_refused(name, changed, error, message):
    records = {**RECORDS, name: changed(RECORDS[name])}
    with pytest.raises(error, match=message):
        _native.load().cpu_mlp_langevin_chain(chains=0, n_steps=0, z=0, out=0, n_threads=1, **records)
