"""Times of several contenders in one go: in turns, so that a slow minute of the machine meets all of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

_BURST_SECONDS = 0.03  # a turn lasts about this long, so that short calls are not timed cold
PATIENCE_SECONDS = 20.0
_LEAST_ROUNDS = 3  # however impatient


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock times of single calls, in seconds.

    turns         median seconds of each turn
    rates         the machine's rate measured just before and after each turn, mean; empty if not asked for
    """

    seconds: tuple[float, ...]
    turns: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float]:
        ordered = sorted(self.seconds)
        return {
            "median_s": self.median,
            "min_s": ordered[0],
            "lower_quartile_s": ordered[len(ordered) // 4],
            "upper_quartile_s": ordered[(3 * len(ordered)) // 4],
            "calls": len(ordered),
        }


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    rate: Callable[[], float] | None = None,
    patience: float = PATIENCE_SECONDS,
) -> dict[str, Timing]:
    """Calls every contender in turn, up to `rounds` times, each turn a burst of one or more timed calls.

    rate        what the machine can do at this moment; called before and after every turn, because the cores of a
                shared machine run now faster, now slower
    patience    seconds after which, on a slow or busy machine, the rounds end; never before the third

    Every turn of a contender that is quick begins with one untimed call: threads of the one before have gone to sleep
    by then and caches hold this one's weights.
    """
    first = {name: _second_call(run) for name, run in contenders.items()}
    calls = {name: max(1, math.ceil(_BURST_SECONDS / seconds)) for name, seconds in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + patience
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in contenders.items():
            before = rate() if rate else 0.0
            if first[name] < 1.0:
                run()
            turn = [timed(run) for _ in range(calls[name])]
            seconds[name] += turn
            turns[name].append(statistics.median(turn))
            if rate:
                rates[name].append((before + rate()) / 2)
    return {name: Timing(tuple(seconds[name]), tuple(turns[name]), tuple(rates[name])) for name in contenders}


def _second_call(run: Callable[[], object]) -> float:
    run()  # compiles, allocates
    return max(timed(run), 1e-6)
