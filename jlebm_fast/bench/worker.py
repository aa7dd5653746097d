"""One process per number of threads: `python -m jlebm_fast.bench.worker PLAN RESULT`, started by the report.

A fresh process, because torch, its compiler and jax fix their threads when they start. PLAN and RESULT are JSON files.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import torch

from jlebm_fast.bench import peak, sections
from jlebm_fast.bench.cases import CASES

_KINDS = {
    "chain": sections.chain_times,
    "share": sections.share_of_peak,
    "diagnostics": sections.diagnostics_cost,
    "op": sections.op_times,
}


def work(plan: dict) -> dict:
    """Carries out {"threads": n, "measurements": [{"kind", "case", "chains", …}, …]}."""
    torch.set_num_threads(plan["threads"])
    records: list[sections.Record] = []
    failed = []
    for measurement in plan["measurements"]:
        arguments = dict(measurement)
        kind, case = arguments.pop("kind"), CASES[arguments.pop("case")]
        say(f"  {case.name}, {arguments['chains']:,} chains: {kind}")
        measured, failures = _KINDS[kind](case, say=say, **arguments)
        records += measured
        failed += failures
    return {
        "threads": plan["threads"],
        "fma_peak_gflops": peak.fma_peak(plan["threads"]),
        "copy_gb_per_s": peak.copy_rate(),
        "records": [dataclasses.asdict(record) for record in records],
        "failed": [dataclasses.asdict(check) for check in failed],
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    plan_file, result_file = (pathlib.Path(argument) for argument in sys.argv[1:])
    result_file.write_text(json.dumps(work(json.loads(plan_file.read_text()))))
