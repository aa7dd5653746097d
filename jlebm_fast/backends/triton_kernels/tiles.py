"""Which regime and which tiles a call gets: from the shape, the number of chains and the chip, before the launch.

    resident   weights fit the chip beside the activations: loaded once, kept for all steps (resident.py)
    streamed   wider or deeper: weights read from L2 tile by tile (streamed.py)

What has been measured on a GPU stands in measured.py and goes first; nothing has yet. Nothing is tuned at a call. The
numbers below are estimates: they follow from compiling for sm_80, sm_90, sm_100 and gfx942
(tests/triton_kernels/test_compilation.py), where resident kernels of the published problems spill no register and
shared memory stays within the chip's, and from counting a streamed kernel's iterations.

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
from .measured import MEASURED

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
# features, padded, up to which four warps share the rows of a product, on NVIDIA: a warpgroup's 64
MOST_WARPGROUP_SIDE = 64
# features of any layer, padded, that eight warps hold of 32 chains, or four of 16, with little spilled
MOST_BROAD_SIDE = 128
# streamed, by chains of a program: (block_out, block_in, num_warps), the largest that spill no registers, or next to
# none, and smaller ones that waste less on narrow layers; the products of AMD are those of "tf32"
STREAMED_TILES = {
    "tf32x3": {16: ((128, 32, 8), (64, 32, 4)), 32: ((64, 32, 8),), 64: ((64, 32, 8),)},
    "tf32": {
        16: ((128, 64, 8), (128, 32, 8), (64, 32, 4)),
        32: ((128, 32, 8), (64, 32, 4)),
        64: ((64, 64, 8), (64, 32, 8)),
    },
    "bf16": {16: ((128, 128, 8), (128, 64, 8), (64, 64, 4)), 32: ((128, 64, 8), (64, 64, 4)), 64: ((64, 64, 8),)},
}
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
    which also serves tf32 there. The interpreter computes in float32, and rounds operands where asked.
    """
    if precision == "bf16":
        return "bf16 emulated" if chip.kind == "interpreter" else "bf16"
    if chip.kind == "hip" or (chip.kind == "interpreter" and precision == "fp32"):
        return "ieee"
    return "tf32x3" if precision == "fp32" else "tf32"


def choose(spec: MLPSpec, chains: int, precision: str, chip: Chip, *, op: str = "mlp_langevin_chain") -> Tiles:
    """The tiles of an MLP op; `precision` as `dot_precision` names it."""
    return _choose(spec.widths, chains, precision, chip, op, _overridden())


def shape_class(
    widths: tuple[int, ...], chains: int, precision: str, chip: Chip
) -> tuple[str, int, str, tuple[int, ...], str]:
    """What a measurement holds for: chains are few where each 16 find a processor, many where each has more than 64."""
    padded = (*map(power_of_two, widths[:-1]), widths[-1] if widths[-1] == 1 else power_of_two(widths[-1]))
    a_processors = chains / chip.processors
    how_many = "few" if a_processors <= 16 else "some" if a_processors <= 64 else "many"
    return chip.kind, chip.capability, precision, padded, how_many


@functools.lru_cache(maxsize=1024)
def _choose(widths: tuple[int, ...], chains: int, precision: str, chip: Chip, op: str, override: tuple) -> Tiles:
    wanted = dict(override)
    measured = MEASURED.get(shape_class(widths, chains, precision, chip)) if op == "mlp_langevin_chain" else None
    if measured is not None and wanted.get("regime", measured[0]) == measured[0]:
        tiles = Tiles(*measured)
    else:
        tiles = _estimated(widths, chains, precision, chip, op, wanted.get("regime"), wanted.get("block_chains"))
    tiles = tiles._replace(**wanted)
    threads = tiles.num_warps * (64 if chip.kind == "hip" else 32)
    if tiles.regime == "streamed" and tiles.block_out * tiles.block_chains < threads:
        # two threads with the same element would read what the other has written already
        raise ValueError(
            f"tiles must have block_out * block_chains of at least a program's {threads} threads, "
            f"got {tiles.block_out} * {tiles.block_chains} for num_warps={tiles.num_warps}; override fewer warps too"
        )
    return tiles


def _estimated(
    widths: tuple[int, ...], chains: int, precision: str, chip: Chip, op: str, regime: str | None, block: int | None
) -> Tiles:
    """Tiles where nothing was measured; in this regime and with so many chains a program if they are given."""
    resident = [chains for chains in RESIDENT_CHAINS if _is_resident(widths, chains, precision, chip)]
    if op == "mlp_energy_grad" and precision == "tf32x3":
        # one pass reads each weight once, wherever it lies; outside a loop the compiler holds both parts of all weights
        # at once: HS on sm_90 takes 255 registers and spills resident, 128 and none streamed
        resident = []
    if (regime or ("resident" if resident else "streamed")) == "resident":
        block_chains = block or _spread(chains, resident or RESIDENT_CHAINS[:1], chip)
        sides = list(map(power_of_two, widths))
        broad = max(sides) > MOST_BROAD_SIDE or max(sides[1:-1]) > MOST_WARPGROUP_SIDE
        return Tiles("resident", block_chains, 8 if broad and chip.kind != "hip" else 4, 64, 32, 1)
    block_chains = block or _spread(chains, STREAMED_CHAINS, chip)
    candidates = STREAMED_TILES.get(precision.removesuffix(" emulated"), STREAMED_TILES["tf32"])
    # a number of chains that was asked for may be any power of two
    sizes = candidates[min(max(block_chains, STREAMED_CHAINS[0]), STREAMED_CHAINS[-1])]
    stages = 2 if chip.kind == "hip" else 3
    found = [Tiles("streamed", block_chains, warps, out, within, stages) for out, within, warps in sizes]
    fitting = [tiles for tiles in found if _streamed_bytes(tiles, precision, chip) <= chip.shared] or found[-1:]
    return min(fitting, key=lambda tiles: (_iterations(widths, tiles.block_out, tiles.block_in), tiles.block_out))


def _streamed_bytes(tiles: Tiles, precision: str, chip: Chip) -> int:
    """Shared memory of a streamed kernel, at most: weights and activations on their way, activations once more."""
    weights = min(BYTES[precision], 4) * tiles.block_out * tiles.block_in
    activations = 4 * tiles.block_in * tiles.block_chains
    # what is read by asynchronous matrix instructions stays until the next tile is there
    on_their_way = tiles.num_stages if chip.capability in (9, 10) else tiles.num_stages - 1
    return on_their_way * (weights + activations) + activations


def _iterations(widths: tuple[int, ...], block_out: int, block_in: int) -> int:
    """Products of tiles in one pass of a streamed kernel, there and back; a single logit takes none."""
    side = max(block_out, block_in)
    padded = [-(-width // side) * side for width in (widths if widths[-1] > 1 else widths[:-1])]
    return sum(2 * (a // block_out) * (b // block_in) for a, b in itertools.pairwise(padded))


def _spread(chains: int, blocks: Sequence[int], chip: Chip) -> int:
    """The fewest chains per program that leave no multiprocessor a second one: short chains wait on latency."""
    return next((block for block in blocks if chains <= block * chip.processors), blocks[-1])


def _is_resident(widths: tuple[int, ...], block_chains: int, precision: str, chip: Chip) -> bool:
    if len(widths) - 2 > MOST_RESIDENT_LAYERS:
        return False
    padded = [power_of_two(width) for width in widths]
    if chip.kind == "hip":
        # on their way into registers, one after the other, they pass through shared memory
        sizes = _weights(widths)
        registers = 2 * sum(sizes) * BYTES[precision] // (4 * 64 * 4)
        return max(sizes) * BYTES[precision] <= chip.shared and registers <= AMD_WEIGHT_REGISTERS
    widest, hidden = max(padded), max(padded[1:-1])
    if precision == "tf32x3" and (chip.capability >= 10 or widest > MOST_WARPGROUP_SIDE):
        # Blackwell's matrix unit takes the weights from tensor memory, filled from registers at every step; elsewhere
        # larger ones spill hundreds of bytes
        return False
    if precision == "tf32" and widest > MOST_BROAD_SIDE and hidden == MOST_WARPGROUP_SIDE:
        # so do these: the rows of a layer are a warpgroup's, those of the state are two's
        return False
    if block_chains > 16 and widest > (MOST_BROAD_SIDE if hidden > MOST_WARPGROUP_SIDE else MOST_WARPGROUP_SIDE):
        return False
    return resident_bytes(widths, block_chains, precision) <= chip.shared


def resident_bytes(widths: tuple[int, ...], block_chains: int, precision: str) -> int:
    """Shared memory of a resident kernel on NVIDIA, at most."""
    # both directions keep a copy: the matrix instructions read their left side along one axis only. On their way from
    # one layout to another activations are float32 whatever they are in the product
    weights = 2 * sum(_weights(widths)) * BYTES[precision]
    return weights + 4 * block_chains * max(map(power_of_two, widths)) + SHARED_FOR_SUMS


def _weights(widths: tuple[int, ...]) -> list[int]:
    """Elements of each padded matrix of weights; a single logit has none."""
    padded = [power_of_two(width) for width in widths]
    return [a * b for a, b in itertools.pairwise(padded if widths[-1] > 1 else padded[:-1])]


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
