"""Which regime and which tiles a call gets: chosen from the shape, the number of chains and the chip, never tuned.

    resident   weights fit the chip beside the activations: loaded once, kept for all steps (resident.py)
    streamed   wider or deeper: weights read from L2 tile by tile (streamed.py)

The numbers below are not yet measured on a GPU. They follow from compiling for sm_80, sm_90, sm_100 and gfx942
(tests/triton_kernels/test_compilation.py), where resident kernels of the published problems spill no register and
shared memory stays within the chip's.

Override any of them, for one process or one block of code:

    JLEBM_TRITON_TILES="regime=streamed block_chains=32 num_warps=8" python train.py
    with tiles.override(block_chains=32, num_warps=8): ...
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...problem import MLPSpec

VARIABLE = "JLEBM_TRITON_TILES"
MOST_LOGITS = 1024  # a column of logits is one tile
# unrolled layers cost time at the first call and registers for their slopes
MOST_RESIDENT_LAYERS = 4
# bytes per weight on chip; three-way tf32 keeps two parts of each
BYTES = {"ieee": 4, "tf32": 4, "tf32x3": 8, "bf16": 2, "bf16 emulated": 4}
# an AMD program of four wavefronts keeps resident weights in registers, up to this many of its 512
AMD_WEIGHT_REGISTERS = 200
# columns of the products; the largest without spilled registers
RESIDENT_CHAINS, STREAMED_CHAINS = (16, 32), (16, 32, 64)
# sums over a tile's features pass through shared memory too
SHARED_FOR_SUMS = 4096


class Chip(NamedTuple):
    """What the choice depends on.

    kind          "cuda", "hip" or "interpreter"
    capability    NVIDIA's compute capability, the major number; 0 elsewhere
    shared        bytes of shared memory that one program may have
    processors    multiprocessors or compute units
    """

    kind: str
    capability: int
    shared: int
    processors: int


class Tiles(NamedTuple):
    """A choice.

    regime                 "resident" or "streamed"
    block_chains           chains of a program: columns of its matrix products, a power of two, at least 16
    num_warps              warps of a program
    block_out, block_in    streamed: sides of a weight tile, powers of two
    num_stages             streamed: tiles on their way at once, plus one
    """

    regime: str
    block_chains: int
    num_warps: int
    block_out: int
    block_in: int
    num_stages: int


def power_of_two(width: int) -> int:
    """The side of the tile that holds `width` features: a power of two, at least the 16 that `tl.dot` takes."""
    return max(16, 1 << (width - 1).bit_length())


def dot_precision(precision: str, chip: Chip) -> str:
    """The `PRECISION` of the kernels for "fp32", "tf32" or "bf16".

    float32 is three-way tf32 on NVIDIA, whose tensor cores have no float32, and the matrix cores' own float32 on AMD,
    which also serves tf32 there. The interpreter computes in float32, and rounds operands to bfloat16 where asked.
    """
    if precision == "bf16":
        return "bf16 emulated" if chip.kind == "interpreter" else "bf16"
    if chip.kind != "cuda":
        return "ieee"
    return "tf32x3" if precision == "fp32" else "tf32"


def choose(spec: MLPSpec, chains: int, precision: str, chip: Chip, *, op: str = "mlp_langevin_chain") -> Tiles:
    """The tiles of an MLP op; `precision` as `dot_precision` names it."""
    return _choose(spec.widths, chains, precision, chip, op, _overridden())


@functools.lru_cache(maxsize=1024)
def _choose(widths: tuple[int, ...], chains: int, precision: str, chip: Chip, op: str, override: tuple) -> Tiles:
    wanted = dict(override)
    resident = [block for block in RESIDENT_CHAINS if _is_resident(widths, block, precision, chip)]
    if op == "mlp_energy_grad" and precision == "tf32x3":
        # one pass reads each weight once, wherever it lies; outside a loop the compiler holds both parts of all weights
        # at once: HS on sm_90 takes 255 registers and spills 152 bytes resident, 128 and none streamed
        resident = []
    regime = wanted.get("regime", "resident" if resident else "streamed")
    if regime == "resident":
        block_chains = _spread(chains, resident or RESIDENT_CHAINS[:1], chip)
        # 64 features are one warpgroup's, or four warps' of 16 each
        warps = 4 if chip.kind == "hip" or max(map(power_of_two, widths)) <= 64 else 8
        tiles = Tiles(regime, block_chains, warps, 64, 32, 1)
    else:
        block_chains = _spread(chains, STREAMED_CHAINS, chip)
        warps = 8 if block_chains == STREAMED_CHAINS[-1] else 4
        block_in = 64 if precision == "bf16" else 32
        tiles = Tiles(regime, block_chains, warps, 64, block_in, 2 if chip.kind == "hip" else 3)
    return tiles._replace(**wanted)


def _spread(chains: int, blocks: Sequence[int], chip: Chip) -> int:
    """The fewest chains per program that leave no multiprocessor a second one: short chains wait on latency."""
    return next((block for block in blocks if chains <= block * chip.processors), blocks[-1])


def _is_resident(widths: tuple[int, ...], block_chains: int, precision: str, chip: Chip) -> bool:
    if len(widths) - 2 > MOST_RESIDENT_LAYERS:
        return False
    if chip.capability >= 10 and precision == "tf32x3":
        # Blackwell's matrix unit then takes the weights from tensor memory, filled from registers at every step
        return False
    padded = [power_of_two(width) for width in widths]
    sides = list(itertools.pairwise(padded if widths[-1] > 1 else padded[:-1]))
    weights, bytes_each = sum(a * b for a, b in sides), BYTES[precision]
    if chip.kind == "hip":
        # on their way into registers, one after the other, they pass through shared memory
        registers = 2 * weights * bytes_each // (4 * 64 * 4)
        return max(a * b for a, b in sides) * bytes_each <= chip.shared and registers <= AMD_WEIGHT_REGISTERS
    # both directions keep a copy: the matrix instructions read their left side along one axis only
    return (2 * weights + block_chains * max(padded)) * bytes_each + SHARED_FOR_SUMS <= chip.shared


_stack: list[dict[str, int | str]] = []


@contextlib.contextmanager
def override(**fields: int | str) -> Iterator[None]:
    """Use these fields of Tiles instead of the chosen ones.

    Raises:
        ValueError: a field that Tiles has not got, or a value that it cannot have.
    """
    _stack.append(_checked(fields))
    try:
        yield
    finally:
        _stack.pop()


def _overridden() -> tuple[tuple[str, int | str], ...]:
    fields = dict(_from_environment(os.environ.get(VARIABLE, "")))
    for entry in _stack:
        fields.update(entry)
    return tuple(fields.items())


@functools.lru_cache(maxsize=8)
def _from_environment(text: str) -> tuple[tuple[str, int | str], ...]:
    pairs = [pair.partition("=") for pair in text.split()]
    return tuple(_checked({name: int(v) if v.isdigit() else v for name, _, v in pairs}).items())


def _checked(fields: dict[str, int | str]) -> dict[str, int | str]:
    for name, value in fields.items():
        if name == "regime":
            allowed, fits = "'resident' or 'streamed'", value in ("resident", "streamed")
        elif name == "num_stages":
            allowed, fits = "1 to 8", value in range(1, 9)
        elif name == "num_warps":
            allowed, fits = "1, 2, 4, 8 or 16", value in (1, 2, 4, 8, 16)
        elif name in Tiles._fields:
            allowed, fits = "a power of two from 16 to 256", value in (16, 32, 64, 128, 256)
        else:
            allowed, fits = f"one of {', '.join(Tiles._fields)} as its name", False
        if not fits:
            raise ValueError(f"tile override {name} must be {allowed}, got {name}={value!r}")
    return fields
