"""Medians of device-event timings after warm-up; on the CPU (rehearsal) of wall-clock timings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ENOUGH_S = 0.4  # of measured runs
MOST_RUNS = 50
LONG_S = 0.7  # a run this long, the second, is the measurement: more would cost others their time
WARM_S = 0.06  # of matrix products before the runs: the clocks of an idle chip are low


def measure(run: Callable[[], object], device: torch.device) -> dict[str, float | int]:
    """{"median_ms", "fastest_ms", "runs"} of `run`, which enqueues on the current stream."""
    _once(run, device)  # compiles, captures, allocates
    _warm(device)
    second = _once(run, device)
    if second > LONG_S:
        return {"median_ms": 1e3 * second, "fastest_ms": 1e3 * second, "runs": 1}
    times: list[float] = []
    while len(times) < MOST_RUNS and (len(times) < 5 or sum(times) < ENOUGH_S):
        times.append(_once(run, device))
    return {"median_ms": 1e3 * statistics.median(times), "fastest_ms": 1e3 * min(times), "runs": len(times)}


def _warm(device: torch.device) -> None:
    if device.type != "cuda":
        return
    square = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    spent = 0.0
    while spent < WARM_S:
        spent += _once(lambda: [square @ square for _ in range(8)], device)


def _once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3
