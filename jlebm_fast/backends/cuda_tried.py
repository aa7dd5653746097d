"""Regimes of the CUDA kernels that have not yet been run on a GPU: used only by who asks for them (`cuda.py`)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence

from . import _native

TRY = "JLEBM_CUDA_TRY"  # environment: names of TRIED, separated by commas
TRIED = ("warpgroup", "cluster")  # in the order of a device's facts and of the launch's last two fields

_wanted: tuple[str, ...] | None = None  # inside `trying`


@contextlib.contextmanager
def trying(*regimes: str) -> Iterator[None]:
    """Which regimes of TRIED chains inside may use, whatever the environment says. For the whole process."""
    global _wanted
    before, _wanted = _wanted, _known(regimes, "trying")
    try:
        yield
    finally:
        _wanted = before


def _known(regimes: Sequence[str], who: str) -> tuple[str, ...]:
    for name in regimes:
        if name not in TRIED:
            raise ValueError(f"{who}: expected names of {', '.join(TRIED)}, got {name!r}")
    return tuple(regimes)


@functools.cache
def _wanted_by_environment() -> tuple[str, ...]:
    return _known([name.strip() for name in os.environ.get(TRY, "").split(",") if name.strip()], TRY)


def tried(facts: tuple) -> tuple[bool, ...]:
    """For each of TRIED whether it is asked for, on a device of these facts (`cuda._device_facts`).

    Raises ValueError where one is that cannot run there.
    """
    wanted = _wanted_by_environment() if _wanted is None else _wanted
    if not wanted:
        return (False,) * len(TRIED)
    name, capability, _, _, *there = facts
    for regime, runs in zip(TRIED, there, strict=True):
        if regime in wanted and not runs:
            raise ValueError(
                f"regime {regime!r} was asked for ({TRY} or trying): it needs a GPU of compute capability 9.0 (H100, "
                f"H200){'' if regime == 'warpgroup' else ' or 10'} and a build for it, got {name} of {capability / 10} "
                f"and a build for {_native.load().cuda_archs}; do not ask for it, or build with JLEBM_CUDA_ARCHS=90"
            )
    return tuple(regime in wanted for regime in TRIED)
