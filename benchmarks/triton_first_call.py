"""How long Triton takes to compile a chain's kernels, the greater part of the first call of a new shape; needs no GPU.

    python benchmarks/triton_first_call.py [--cases HS FID] [--precisions fp32 tf32] [--chip sm_90] [--rounds 5]

One row for each problem, precision, and chain with and without diagnostics and trajectory: the fastest and the median
time of compiling all that the call launches (a streamed chain also packs its weights), and what the chain's kernel
uses. Kernels are compiled in turns, nothing comes from Triton's cache. Other work on the machine makes every number
larger; the fastest is the one to compare.

Not in these times, so that a first call takes longer:
    once per process    importing Triton, and its hash of its own files, which is the key to its cache
    once per kernel     the driver loads its code, for which there must be a GPU; and Triton before 3.7 has the C
                        compiler build a launcher for each new signature, some tenths of a second each
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests/triton_kernels"))

from compiled import CHIPS, Compiled, compile_chain

from jlebm_fast.bench import cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["HS", "FID", "LEBM"], choices=cases.CASES)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "tf32", "bf16"], choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--chip", default="sm_90", choices=CHIPS)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = [(case, how, kept) for case in options.cases for how in options.precisions for kept in (False, True)]

    def compiled(row: tuple[str, str, bool]) -> tuple[str, Compiled]:
        case, precision, recorded = row
        where = (cases.CASES[case].spec, options.chip, precision, options.chains, recorded)
        tiles, kernel = compile_chain(*where, all_kernels=True)
        return tiles.regime, kernel

    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_ALWAYS_COMPILE": "1"}
        compiled(rows[0])  # imports and hashes
        rounds = [[compiled(row) for row in rows] for _ in range(options.rounds)]
    print(f"| {options.chip} | regime | recorded | fastest, s | median, s | registers | spilled, B | shared, B |")
    print("|---|---|---|---|---|---|---|---|")
    for (case, precision, recorded), found in zip(rows, zip(*rounds, strict=True), strict=True):
        regime, kernel = found[0]
        seconds = [one.seconds for _, one in found]
        kept = "yes" if recorded else "no"
        print(
            f"| {case}, {precision} | {regime} | {kept} | {min(seconds):.2f} | {statistics.median(seconds):.2f} "
            f"| {kernel.registers} | {kernel.spilled} | {kernel.shared} |"
        )


if __name__ == "__main__":
    main()
