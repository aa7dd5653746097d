"""Which precision the matrix products of an energy run in: asked for by a sampler, else torch's own.

    "fp32"   float32 accuracy      "tf32"   operands rounded to 10 bits of mantissa      "bf16"   to 7 bits

Torch's names for the same are "highest", "high" and "medium" (`torch.set_float32_matmul_precision`). State, noise,
prior term and sums are float32 in all of them. Backends that can choose read `current()`; they say so by
TAKES_PRECISION.
"""

from __future__ import annotations

import contextvars

import torch

NAMES = ("fp32", "tf32", "bf16")
OF_TORCH = {"highest": "fp32", "high": "tf32", "medium": "bf16"}
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("jlebm_fast_precision", default=None)


def current() -> str:
    """The precision of calls made now."""
    asked = _asked.get()
    return OF_TORCH[torch.get_float32_matmul_precision()] if asked is None else asked


def asked() -> str | None:
    """The precision that was asked for; None if that is torch's."""
    return _asked.get()


class using:
    """Calls inside run in this precision; None leaves it to torch.

    A class: a generator under contextlib.contextmanager costs five times as much, and every call of an operator comes
    through here.
    """

    __slots__ = ("_name", "_token")

    def __init__(self, name: str | None) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._token = _asked.set(self._name)

    def __exit__(self, *error: object) -> None:
        _asked.reset(self._token)
