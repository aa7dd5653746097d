"""Times chains of one checkout when asked: `python against_commit_worker.py CHECKOUT THREADS`, see against_commit.py.

First it writes one line of JSON: its compiler and the problems it knows. Then every line read is a request, {"case",
"chains", "diagnostics", "untimed", "calls"}, and is answered by the milliseconds of each timed call. CHECKOUT may be
older than this file, so nothing is used here but what every commit with a benchmark has.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
import sys
import time


def main(checkout: str, threads: int) -> None:
    sys.path[0] = checkout  # in the place of this script's own folder, before any package that is installed
    import torch

    torch.set_num_threads(threads)
    import jlebm_fast
    from jlebm_fast.bench import sections
    from jlebm_fast.bench.cases import CASES

    native = importlib.import_module("jlebm_fast._C")
    for module in (jlebm_fast, native):
        if pathlib.Path(checkout).resolve() not in pathlib.Path(module.__file__).resolve().parents:
            sys.exit(f"{module.__name__} must come from {checkout}, got {module.__file__}")
    if torch.get_num_threads() != threads:
        sys.exit(f"torch must run {threads} threads, got {torch.get_num_threads()}")

    @functools.cache
    def sampler(case: str):
        return sections.sampler_of(CASES[case], CASES[case].network(), "cpu")

    @functools.cache
    def start(case: str, chains: int):
        return CASES[case].initial(chains)

    def milliseconds(case: str, chains: int, diagnostics: bool, untimed: int, calls: int) -> list[float]:
        sample, z0 = sampler(case), start(case, chains)
        options = {"return_info": True} if diagnostics else {}
        for _ in range(untimed):
            sample(z0, **options)
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            sample(z0, **options)
            times.append((time.perf_counter() - began) * 1e3)
        return times

    known = {name: vars(case) for name, case in CASES.items()}
    print(json.dumps({"compiler": getattr(native, "compiler", None), "cases": known}), flush=True)
    for line in sys.stdin:
        print(json.dumps(milliseconds(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
