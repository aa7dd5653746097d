"""`jlebm bench`: all contenders side by side in one run, the ratio table, and the JSON that keeps it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Literal

from jlebm_fast import backends
from jlebm_fast.bench import machine, parity, rivals, tables
from jlebm_fast.bench.cases import CASES
from jlebm_fast.bench.sections import MANY
from jlebm_fast.errors import RunError

CaseName = Literal["HS", "FID", "LEBM", "WIDE", "LONG"]
RivalName = Literal["eager", "compiled", "jax", "torchebm"]
_SMALL = ("HS", "FID", "LEBM")  # the cases of the ratio table


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Measure the samplers side by side on the published problems; print ratios; write JSON.

    A number is printed only if that operation's parity test has passed in the same run.
    """

    cases: tuple[CaseName, ...] = ("HS", "FID", "LEBM", "WIDE", "LONG")
    """Problems to run."""
    rivals: tuple[RivalName, ...] = ("eager", "compiled", "jax", "torchebm")
    """What to compare with; jax and torchebm take part if they are installed."""
    threads: tuple[int, ...] = ()
    """Numbers of threads; by default 1, 2 and all cores. Everything is measured with the last one."""
    out: pathlib.Path | None = None
    """JSON file to write; by default a dated one in benchmarks/results, or here if there is no such folder."""


def main(options: BenchOptions) -> int:
    """Runs the benchmark; 0 if every parity test passed, 1 otherwise, 2 if nothing can be measured."""
    cores = machine.usable_cores()
    threads = options.threads or tuple(sorted({1, min(2, cores), cores}))
    if any(not 1 <= n <= cores for n in threads):
        print(f"jlebm bench: --threads must be between 1 and {cores}, the cores this process may use, got {threads}")
        return 2
    if not parity.backends_with_kernels():
        print(f"jlebm bench: there are no kernels to measure: {backends.unavailable_reason('cpu')}")
        return 2
    names = [name for name in options.rivals if not rivals.missing(name)]
    for name in filter(rivals.missing, options.rivals):
        print(f"{name} is not installed, so it takes no part; {rivals.OPTIONAL[name]} brings it")
    about = machine.describe()
    out = options.out or _default_file(about)
    require_writable(out)
    print(tables.heading(about), flush=True)
    start = time.perf_counter()
    results = [
        _measure(n, plan(options.cases, names, everything=n == threads[-1], every_core=n == cores)) for n in threads
    ]
    print(tables.report(results))
    failed = [check for result in results for check in result["failed"]]
    out.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {out}")
    return 1 if failed else 0


def require_writable(out: pathlib.Path) -> None:
    """Makes the folder of a file that the measurements will go to, and tries whether it can be written.

    Raises:
        RunError: it cannot.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        existed = out.exists()
        open(out, "ab").close()
        if not existed:
            out.unlink()
    except OSError as error:
        raise RunError(
            f'--out must be a file that can be written, got "{out}" ({error.strerror}): name one in a folder of yours'
        ) from error


def plan(cases: tuple[str, ...], names: list[str], everything: bool, every_core: bool = True) -> list[dict]:
    """The measurements of one number of threads, in order: all of them, or those that show how threads scale."""
    small = [name for name in cases if name in _SMALL]
    quick = [name for name in names if name != "compiled"]  # compiling takes longer than all else together
    todo = []
    for name in small:
        spectral = everything and CASES[name].spectral_norm
        todo.append(_chain(name, CASES[name].batch, names if everything else quick, spectral, rounds=13))
    for name in small:
        todo.append(_chain(name, MANY, names if everything else [], False, rounds=5))
    if everything:
        for name in cases:
            if name not in _SMALL:
                todo.append(_chain(name, CASES[name].batch, names, False, rounds=3))
        for name in small:
            todo.append({"kind": "share", "case": name, "chains": MANY, "rounds": 31})
            for chains, rounds in ((CASES[name].batch, 601), (MANY, 31)):
                todo.append({"kind": "diagnostics", "case": name, "chains": chains, "rounds": rounds})
            todo.append({"kind": "op", "case": name, "chains": MANY, "rounds": 9})
    return todo


def _chain(case: str, chains: int, names: list[str], spectral: bool, rounds: int) -> dict:
    return {
        "kind": "chain",
        "case": case,
        "chains": chains,
        "with_rivals": names,
        "spectral": spectral,
        "rounds": rounds,
    }


def _measure(n_threads: int, measurements: list[dict]) -> dict:
    print(f"{n_threads} thread{'s' if n_threads > 1 else ''}", file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(n_threads)}
    with tempfile.TemporaryDirectory() as folder, _only_cores(n_threads):
        plan_file, result_file = pathlib.Path(folder, "plan.json"), pathlib.Path(folder, "result.json")
        plan_file.write_text(json.dumps({"threads": n_threads, "measurements": measurements}))
        command = [sys.executable, "-m", "jlebm_fast.bench.worker", str(plan_file), str(result_file)]
        subprocess.run(command, env=environment, check=True)
        return json.loads(result_file.read_text())


@contextlib.contextmanager
def _only_cores(n: int) -> Iterator[None]:
    """Children started inside run on n cores: jax counts the cores it may use and has no other switch for threads."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _default_file(about: dict) -> pathlib.Path:
    processor = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", str(about["cpu"])).lower()).strip("-")
    name = f"{str(about['date'])[:10]}-{processor}-{about['cores']}-cores.json"
    folder = pathlib.Path("benchmarks", "results")
    return folder / name if folder.is_dir() else pathlib.Path(f"jlebm-bench-{name}")
