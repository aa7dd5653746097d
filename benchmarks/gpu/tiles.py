"""Which tiles of the Triton kernels are fastest on this GPU, beside those that are chosen now.

    python benchmarks/gpu/tiles.py [FILE.json] [--limit SECONDS] [--dry-run]

HS, FID and LEBM in each precision, 100 and 10,000 chains: up to six candidates each, compiled ahead side by side by
processes of their own, into Triton's cache on disk, then timed one after the other, each after its parity. The JSON is
written after every measurement; at the end stand the rows for jlebm_fast/backends/triton_kernels/measured.py, those
whose winner beats the present choice. `--dry-run` goes the same ways with Triton's interpreter and tiny sizes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import time
from typing import NamedTuple

import torch
from chains import ALLOWED, parity_error
from contenders import ours
from timing import measure

from jlebm_fast import backends
from jlebm_fast.backends.triton_kernels import tiles
from jlebm_fast.bench.cases import CASES, Case
from jlebm_fast.precision import NAMES

PROBLEMS, NUMBERS_OF_CHAINS = ("HS", "FID", "LEBM"), (100, 10_000)
MOST_CANDIDATES = 6
# a candidate that is faster by less than this is no reason to leave the estimate
LEAST_ADVANTAGE = 1.03
MOST_PROCESSES = 8
# (block_chains, num_warps) of resident kernels, (block_chains, num_warps, block_out, block_in, num_stages) of streamed
RESIDENT = {"few": ((16, 4), (16, 8)), "many": ((32, 4), (16, 4), (32, 8), (16, 8))}
STREAMED = {
    "few": ((16, 8, 128, 64, 3), (16, 4, 64, 32, 4), (16, 8, 128, 32, 4), (16, 8, 128, 128, 3), (16, 4, 64, 64, 3)),
    "many": ((32, 8, 128, 32, 3), (32, 8, 64, 64, 3), (64, 8, 64, 32, 3), (64, 8, 128, 64, 3), (64, 8, 64, 32, 4)),
}


class Job(NamedTuple):
    """One candidate of one problem."""

    case: str
    precision: str
    chains: int
    tiles: tiles.Tiles


def candidates(case: Case, precision: str, chains: int) -> list[tiles.Tiles]:
    """The present choice, then what may beat it."""
    chip = backends.load("triton")._chip(0)
    products = tiles.dot_precision(precision, chip)
    how_many = "few" if chains <= 16 * chip.processors else "many"
    found = [tiles.choose(case.spec, chains, products, chip)]
    with tiles.override(regime="streamed"):
        streamed = [tiles.choose(case.spec, chains, products, chip)]
    # three-way tf32 by tiles of 128 x 128 or with 64 x 128 chains spills hundreds of bytes, bfloat16 has no use for 32
    narrow, wide = ((64, 128), 128) if precision == "fp32" else ((32, 32), 256)
    streamed += [
        tiles.Tiles("streamed", block, warps, out, within, stages)
        for block, warps, out, within, stages in STREAMED[how_many]
        if within < wide and (precision != "fp32" or (block, out) != narrow) and (precision != "bf16" or within > 32)
    ]
    if found[0].regime == "resident":
        found += [
            tiles.Tiles("resident", block, warps, 64, 32, 1)
            for block, warps in RESIDENT[how_many]
            # four warps hold no layer of more than their 64 rows
            if (warps == 8 or case.hidden <= tiles.MOST_WARPGROUP_SIDE)
            and tiles.resident_bytes(case.spec.widths, block, products) <= chip.shared
        ]
        streamed = streamed[:2]
    return list(dict.fromkeys([*found, *streamed]))[:MOST_CANDIDATES]


def device_of(dry_run: bool) -> torch.device:
    return torch.device("cpu" if dry_run else "cuda")


def runner(job: Job, case: Case, chains: int, dry_run: bool):
    """A function that enqueues one chain of `case` with the job's tiles."""
    device = device_of(dry_run)
    network = case.network().to(device)
    z = torch.randn(chains, case.dim, generator=torch.Generator(device).manual_seed(chains), device=device)
    chain = ours(case, network, z, "triton", job.precision)

    def run() -> object:
        with tiles.override(**job.tiles._asdict()):
            return chain()

    return run


def ahead(job: Job, dry_run: bool) -> str | None:
    """Compile what `job` needs by running one step of it; why that failed, if it did."""
    # a candidate that cannot be compiled or launched is written down and costs no other
    try:
        runner(job, dataclasses.replace(CASES[job.case], n_steps=1), 3, dry_run)()
        if not dry_run:
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


class Bench:
    def __init__(self, target: pathlib.Path, limit_s: float, dry_run: bool) -> None:
        self.target, self.dry_run = target, dry_run
        self.deadline = time.monotonic() + limit_s
        self.rows: list[dict] = []

    def run(self) -> int:
        order = [(name, precision, chains) for chains in NUMBERS_OF_CHAINS for name in PROBLEMS for precision in NAMES]
        jobs = {place: [Job(*place, one) for one in candidates(CASES[place[0]], place[1], place[2])] for place in order}
        if self.dry_run:
            jobs = {place: jobs[place][:2] for place in order[::5]}
        failures = self.compiled([job for some in jobs.values() for job in some])
        for place, some in jobs.items():
            self.rows.append(self.measured(place, some, failures))
            self.target.write_text(json.dumps(self.rows, indent=1) + "\n")
        print("\nrows of a rehearsal, no measurement:\n" if self.dry_run else "\nrows of measured.py:\n")
        for row in self.rows:
            if row.get("advantage", 0.0) >= LEAST_ADVANTAGE:
                print(f"    {tuple(row['key'])!r}: {tuple(row['winner'])!r},")
        return 1 if any("error" in entry for row in self.rows for entry in row["candidates"][:1]) else 0

    def compiled(self, jobs: list[Job]) -> dict[Job, str]:
        """Why a job cannot be measured; those that came in no time stand in it too."""
        if self.dry_run:
            jobs = jobs[:2]
        failures = dict.fromkeys(jobs, "no time left to compile it")
        began = time.monotonic()
        context = multiprocessing.get_context("spawn")
        processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(jobs))
        pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)
        futures = {pool.submit(ahead, job, self.dry_run): job for job in jobs}
        # half of the time: what is compiled can be measured then
        done, late = concurrent.futures.wait(futures, timeout=(self.deadline - began) / 2)
        for future in done:
            # a process that died says nothing about the job: it is compiled when it is measured
            failure = None if future.exception() else future.result()
            if failure is None:
                del failures[futures[future]]
            else:
                failures[futures[future]] = failure
        pool.shutdown(wait=not late, cancel_futures=True)
        print(f"{len(done)} of {len(jobs)} kernels compiled in {time.monotonic() - began:.0f} s", flush=True)
        return failures

    def measured(self, place: tuple[str, str, int], jobs: list[Job], failures: dict[Job, str]) -> dict:
        name, precision, chains = place
        chip = backends.load("triton")._chip(0)
        key = tiles.shape_class(CASES[name].spec.widths, chains, tiles.dot_precision(precision, chip), chip)
        row: dict = {"case": name, "precision": precision, "chains": chains, "key": key, "candidates": []}
        for job in jobs:
            row["candidates"].append(self.one(job, failures.get(job)))
        times = {tuple(entry["tiles"]): entry["median_ms"] for entry in row["candidates"] if "median_ms" in entry}
        present = times.get(tuple(jobs[0].tiles))
        if present is not None:
            winner = min(times, key=times.get)
            row |= {"winner": winner, "advantage": present / times[winner]}
            print(f"{name:5}{precision:5}{chains:>6}  present / winner {row['advantage']:5.2f}  {winner}", flush=True)
        return row

    def one(self, job: Job, failure: str | None) -> dict:
        entry: dict = {"tiles": job.tiles}
        if failure is not None:
            return {**entry, "error": failure}
        if time.monotonic() > self.deadline:
            return {**entry, "skipped": "no time left"}
        case, chains = CASES[job.case], job.chains
        if self.dry_run:
            case, chains = dataclasses.replace(case, n_steps=1), 3
        # as in chains.py: a failure is written down and costs no other
        try:
            with tiles.override(**job.tiles._asdict()):
                where = (device_of(self.dry_run), "triton", job.precision)
                error = parity_error(case, case.network(), *where, chains=3 if self.dry_run else 100)
            if error > ALLOWED[job.precision]:
                return {**entry, "error": f"parity: error {error:.3g}, allowed {ALLOWED[job.precision]:.3g}"}
            return {**entry, **measure(runner(job, case, chains, self.dry_run), device_of(self.dry_run))}
        except Exception as error:  # noqa: BLE001
            return {**entry, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", nargs="?", type=pathlib.Path, default=pathlib.Path("tiles.json"))
    limit = float(os.environ.get("JLEBM_GPU_LIMIT_S", "195")) - 15
    parser.add_argument("--limit", type=float, default=limit, help="seconds after which nothing more is measured")
    parser.add_argument("--dry-run", action="store_true", help="Triton's interpreter and tiny sizes instead of a GPU")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is imported at its first use; processes inherit it
    reason = backends.unavailable_reason("triton")
    if reason is not None:
        print(reason)
        return 2
    return Bench(options.target, options.limit, options.dry_run).run()


if __name__ == "__main__":
    sys.exit(main())
