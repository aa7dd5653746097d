"""Compiling a launch for a chip that is not here, and what the compiled kernel uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jlebm_fast.backends.triton_kernels import launch, tiles
from jlebm_fast.backends.triton_kernels.launch import Call
from jlebm_fast.backends.triton_kernels.tiles import Chip, Tiles
from jlebm_fast.problem import MLP, ChainResult, MLPSpec, Update

# shared memory that one program may have, and processors: A100, RTX 4090, H100, B200, MI300X
CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Chip("cuda", 8, 166912, 108)),
    "sm_89": (GPUTarget("cuda", 89, 32), Chip("cuda", 8, 101376, 128)),
    "sm_90": (GPUTarget("cuda", 90, 32), Chip("cuda", 9, 232448, 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Chip("cuda", 10, 232448, 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Chip("hip", 0, 65536, 304)),
}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.bool: "*i1"}


class Compiled(NamedTuple):
    """A kernel for a chip: what it uses per thread (registers, spills in bytes) and per program (shared, bytes); the
    seconds that compiling took.
    """

    registers: int
    spilled: int
    shared: int
    seconds: float
    text: dict


def compile_call(call: Call, target: GPUTarget) -> Compiled:
    """`call` compiled for `target` as the launch on such a chip would compile it."""
    signature, constants, attributes = {}, {}, {}

    def add(value, path):
        if value is None:
            constants[path] = None
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]  # torch's allocations are aligned
            return _POINTERS[value.dtype]
        if isinstance(value, tuple):
            types = [add(entry, (*path, i)) for i, entry in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        return "fp32" if isinstance(value, float) else "i32"

    names = call.kernel.arg_names
    for i, value in enumerate(call.arguments):
        signature[names[i]] = add(value, (i,))
    for name, value in call.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    source = ASTSource(call.kernel, signature, constants, attributes)
    started = time.perf_counter()
    kernel = triton.compile(source, target=target, options=call.options)
    seconds = time.perf_counter() - started
    registers, spilled = _usage(kernel.asm)
    return Compiled(registers, spilled, kernel.metadata.shared, seconds, kernel.asm)


def mlp_of(spec: MLPSpec) -> MLP:
    """A net of zeros."""
    shapes = list(zip(spec.widths[1:], spec.widths))
    return MLP(spec, tuple(torch.zeros(s) for s in shapes), tuple(torch.zeros(s[0]) for s in shapes))


def compile_chain(
    spec: MLPSpec, chip_name: str, precision: str, chains: int, recorded: bool = False, all_kernels: bool = False
) -> tuple[Tiles, Compiled]:
    """`mlp_langevin_chain` of a net with a Gaussian prior, with the tiles that the backend chooses for that chip.

    all_kernels: `seconds` are also those of what the call launches before.
    """
    target, chip = CHIPS[chip_name]
    z = torch.zeros(chains, spec.dim)
    trace, bad = torch.zeros(60, chains), torch.zeros(chains, dtype=torch.int64)
    result = ChainResult(z, trace, trace, trace, bad, torch.zeros(1)) if recorded else ChainResult(z)
    change = Update(torch.zeros(60, 3), prior_precision=torch.ones(spec.dim))
    dot_precision = tiles.dot_precision(precision, chip)
    chosen = tiles.choose(spec, chains, dot_precision, chip)
    call = launch.chain_call(z, mlp_of(spec), change, 60, 1, result, chosen, dot_precision, chip)
    others = sum(compile_call(other, target).seconds for other in call.before) if all_kernels else 0.0
    compiled = compile_call(call, target)
    return chosen, compiled._replace(seconds=compiled.seconds + others)


def _usage(asm) -> tuple[int, int]:
    if "cubin" in asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
        return int(found[1]), int(found[2])
    code = asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
    return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1])
