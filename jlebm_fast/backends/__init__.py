"""The list of backends, and the choice among them: by reasons known before the launch, never after an exception.

A backend is one module with NAME, `unavailable_reason()`, `unsupported_reason(op, …)`, `regime(op, spec)`, `build()`
and the four operations `langevin_noise`, `langevin_step`, `mlp_energy_grad`, `mlp_langevin_chain`. To add one: write
the module `backends/<name>.py`; its place in line stands in `ORDER`. Modules are imported when first asked for.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from ..problem import MLPSpec, Update

OPS = ("langevin_noise", "langevin_step", "mlp_energy_grad", "mlp_langevin_chain")

NAMES = ("cuda", "triton", "cpu", "eager")
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
ORDER_ELSEWHERE = ("eager",)


@functools.cache
def load(name: str) -> ModuleType | None:
    """The backend's module, or None where this version of the package has none of that name."""
    module = f"{__name__}.{name}"
    return None if importlib.util.find_spec(module) is None else importlib.import_module(module)


def unavailable_reason(name: str) -> str | None:
    """Why the backend cannot serve any call in this process, with the remedy; None if it can."""
    module = load(name)
    if module is None:
        return f"this version of jlebm_fast has no {name} kernels; use backend='eager', which runs on every device"
    return module.unavailable_reason()


def reason_against(
    name: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    spec: MLPSpec | None = None,
    update: Update | None = None,
) -> str | None:
    """Why this backend cannot serve this call; None if it can."""
    module = load(name)
    return (unavailable_reason(name) if module is None else module.unavailable_reason()) or module.unsupported_reason(
        op, device=device, dtype=dtype, spec=spec, update=update
    )


def check_name(backend: str) -> str:
    """`backend`, which must be "auto" or the name of a backend."""
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    return backend


def candidates(backend: str, device: torch.device) -> tuple[str, ...]:
    """The names to try, in order."""
    return _in_order(device) if backend == "auto" else (check_name(backend),)


@functools.cache  # asking a device for its type costs more than all else here
def _in_order(device: torch.device) -> tuple[str, ...]:
    return ORDER.get(device.type, ORDER_ELSEWHERE)


def choose(
    op: str,
    backend: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: MLPSpec | None = None,
    update: Update | None = None,
) -> ModuleType:
    """The first backend that can serve the call.

    Raises:
        ValueError: a backend asked for by name cannot serve it; the message carries the reason.
    """
    for name in candidates(backend, device):
        reason = reason_against(name, op, device, dtype, spec, update)
        if reason is None:
            return load(name)
    raise ValueError(f"backend {name!r} cannot run {op}: {reason}")
