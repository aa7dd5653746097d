"""Launches of the Triton backend on CPU tensors: compiled for a chip that is not here, its PTX run on the CPU."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "triton_kernels")]

import compiled  # noqa: E402
import program  # noqa: E402

from jlebm_fast.backends import triton as backend  # noqa: E402
from jlebm_fast.backends.triton_kernels.launch import Call  # noqa: E402

_seeds = itertools.count(1)


def use(monkeypatch, chip_name: str) -> None:
    """Make the backend serve CPU tensors as that chip of compiled.CHIPS would."""
    target, chip = compiled.CHIPS[chip_name]
    monkeypatch.setattr(backend, "_interpreted", lambda: True)  # what says that it serves the CPU
    monkeypatch.setattr(backend, "_chip", lambda index: chip)
    monkeypatch.setattr(Call, "run", lambda call: run(call, target))


def run(call: Call, target) -> None:
    """The launch and what it needs first, threads and blocks in an order of each call's own."""
    for earlier in call.before:
        run(earlier, target)
    key = (call.kernel, tuple(map(_kind, call.arguments)), _items(call.constants), _items(call.options), target)
    kernel, shared = _compiled(_Key(key, call))
    arguments = list(_values(call.arguments))
    # memory for profiling and the like, which these kernels do not ask for
    arguments += [ctypes.c_uint64(0)] * (len(kernel.kernel.parameters) - len(arguments))
    threads = 32 * call.options.get("num_warps", 4)
    kernel(call.grid, threads, shared, arguments, order_seed=next(_seeds))


class _Key(tuple):
    """What a compiled kernel depends on, with the call that asked for it first."""

    call: Call

    def __new__(cls, key: tuple, call: Call) -> _Key:
        made = super().__new__(cls, key)
        made.call = call
        return made


@functools.cache
def _compiled(key: _Key) -> tuple[program.Program, int]:
    made = compiled.compile_call(key.call, key[-1])
    return program.Program(made.text["ptx"]), made.shared


def _items(options: dict) -> tuple:
    return tuple(options.items())


def _kind(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return tuple(map(_kind, value)) if isinstance(value, tuple) else type(value)


def _values(value: object) -> Iterator[object]:
    if isinstance(value, torch.Tensor):
        yield ctypes.c_uint64(value.data_ptr())
    elif isinstance(value, tuple):
        for entry in value:
            yield from _values(entry)
    elif value is not None:
        yield ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)
