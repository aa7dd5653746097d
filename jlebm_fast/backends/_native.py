"""The one place that loads the compiled module `_C`, and the one sentence about it when it is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

REMEDY = "build it with `pip install -e .` in a checkout of jlebm_fast (needs a C++17 compiler, CMake and Ninja)"
_NAME = "jlebm_fast._C"
# functions by which a build of older sources is told
_NEWEST = ("leave_openmp", "plain_chain_of_latents", "same_things")
_in_child = False  # whether this process was forked from one that had imported this


def _after_fork() -> None:
    global _in_child
    _in_child = True
    if _load.cache_info().currsize and _load()[0] is not None:
        _load()[0].leave_openmp()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(_NAME) is None:
        return None, f"the compiled module {_NAME} is missing; {REMEDY}"
    try:
        module = importlib.import_module(_NAME)
        module.cpu_target()  # JLEBM_CPU_TARGET may ask for what this processor lacks
    except ImportError as error:  # built for another Python or C++ library
        return None, f"the compiled module {_NAME} does not load ({error}); {REMEDY}"
    except RuntimeError as error:
        return None, str(error)
    lacking = [name for name in _NEWEST if not hasattr(module, name)]
    if lacking:
        return None, f"the compiled module {_NAME} was built from older sources and lacks {lacking[0]}; {REMEDY}"
    if _in_child:
        module.leave_openmp()
    return module, None


def unavailable_reason() -> str | None:
    """Why there are no compiled kernels, with the remedy; None if there are."""
    return _load()[1]


def load() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is missing; the message names the remedy.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module
