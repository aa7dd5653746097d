"""The benchmarks behind `jlebm bench`: named published problems, rivals, parity first, then times."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`jlebm bench`: see `report.BenchOptions` for the options. Returns the exit code."""
    import tyro

    from jlebm_fast.bench.report import BenchOptions
    from jlebm_fast.bench.report import main as run

    return run(tyro.cli(BenchOptions, args=argv, prog="jlebm bench"))
