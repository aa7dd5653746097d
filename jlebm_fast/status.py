"""Which backends are there, on which devices, how they were built, and what to do about those that are missing."""

from __future__ import annotations

import platform
from typing import NamedTuple

import torch

from . import backends


class BackendStatus(NamedTuple):
    """One backend in this process.

    name        "cuda", "triton", "cpu" or "eager"
    available   whether it can serve calls
    devices     torch device names it serves
    build       how it was built, in words
    reason      why it is missing and what to do about it; None where it is available
    """

    name: str
    available: bool
    devices: tuple[str, ...]
    build: str
    reason: str | None


class BackendList(tuple[BackendStatus, ...]):
    """A tuple of BackendStatus that prints as a table."""

    def __str__(self) -> str:
        lines = []
        for status in self:
            text = f"{', '.join(status.devices)}: {status.build}" if status.available else f"missing: {status.reason}"
            lines.append(f"{status.name:8}{text}")
        return "\n".join(lines)


def available_backends() -> BackendList:
    """List the backends: devices, build, and for a missing one why it is missing and the remedy.

    Returns:
        BackendList, a tuple of BackendStatus(name, available, devices, build, reason), fastest first; it prints as a
        table.

    Example:
        >>> [status.name for status in available_backends()]
        ['cuda', 'triton', 'cpu', 'eager']
        >>> available_backends()[-1].available
        True
    """
    return BackendList(_status(name) for name in backends.NAMES)


def print_versions() -> None:
    """Print versions and, for each backend, its devices or why it is missing and what to do about it."""
    from . import __version__

    print(f"jlebm_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"threads {torch.get_num_threads()}, float32 matmul precision {torch.get_float32_matmul_precision()}")
    print(available_backends())


def _status(name: str) -> BackendStatus:
    reason = backends.unavailable_reason(name)
    if reason is not None:
        return BackendStatus(name, False, (), "", reason)
    module = backends.load(name)
    if hasattr(module, "devices"):
        return BackendStatus(name, True, module.devices(), module.build(), None)
    gpus = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    devices = {"cpu": ("cpu",), "eager": ("cpu", *gpus)}.get(name, gpus)
    return BackendStatus(name, True, devices, module.build(), None)
