"""What the compiler says about the kernels: every architecture, no spills in the resident kernels, sizes that fit.

Each file goes through the front end once, to the PTX of compute_80, and that through each architecture's assembler:
the way of every chip newer than the build, and a sixth of the time.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from host_build import on_host
from nvcc import CLUSTER, WARPGROUP, kernel_files, needs_nvcc, ptx_of, report_on

from jlebm_fast import precision
from jlebm_fast.problem import MLPSpec

# shared memory that a block may have, and multiprocessors of a card with that architecture
ARCHS = {
    "80": (166912, 108), "86": (101376, 84), "89": (101376, 128),
    "90a": (232448, 132), "100": (232448, 148), "120": (101376, 170),
}  # fmt: skip
SHAPES = {
    "HS": MLPSpec((16, 50, 50, 50, 50, 1), ("leaky_relu",) * 4, (0.2,) * 4),
    "FID": MLPSpec((50, 100, 100, 1), ("leaky_relu",) * 2, (0.2,) * 2),
    "LEBM": MLPSpec((100, 200, 200, 1), ("gelu",) * 2, (0.0,) * 2),
}
REGISTERS_OF_A_MULTIPROCESSOR = 65536
MLP_THREADS = 256  # kMlpThreads of csrc/cuda/mlp_plan.h
ROW_THREADS = 256  # kRowThreads of csrc/cuda/rows.h
NORM_THREADS = 512  # kNormThreads of csrc/cuda/spectral_norm.cu


class Usage(NamedTuple):
    registers: int
    stack: int
    spilled: int
    static_shared: int


def usage(arch: str) -> dict[str, Usage]:
    """Resources of each kernel on an architecture, by mangled name."""
    found = used_by_kernel(report_on(ptx_of(kernel_files(), "80"), arch))
    return {kernel: used for kernel, used in found.items() if "warpgroup" not in kernel}


def used_by_kernel(text: str) -> dict[str, Usage]:
    """The compiler's report by mangled name."""
    found = {}
    for block in re.split(r"Compiling entry function '", text)[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared_bytes = re.search(r"(\d+) bytes smem", block)
        stack, stores, loads = map(int, frame.groups())
        found[block.split("'", 1)[0]] = Usage(
            registers, stack, stores + loads, int(shared_bytes[1]) if shared_bytes else 0
        )
    return found


@needs_nvcc
def test_warpgroup_kernels_compile_for_hopper():
    """For sm_90a, whose instructions they use: no spills, products that overlap, and nothing of the older matrix
    instructions."""
    text = report_on(ptx_of([WARPGROUP], "90a"), "90a")
    found = used_by_kernel(text)
    assert len(found) == 3, sorted(found)
    for kernel, used in found.items():
        dim, width, groups = map(int, re.search(r"ILi(\d+)ELi(\d+)ELi(\d+)EE", kernel).groups())
        assert (used.spilled, used.stack, used.static_shared) == (0, 0, 0), kernel
        assert used.registers * 128 * groups <= REGISTERS_OF_A_MULTIPROCESSOR, kernel
        assert (dim, width, groups) in {(32, 64, 3), (64, 112, 2), (112, 208, 2)}
    # C7510 and its neighbours: the compiler waits after each product
    assert "wgmma" not in text, text


@needs_nvcc
@pytest.mark.parametrize("arch", ["90a", "100"])
def test_cluster_kernels_compile(arch):
    """For the chips that have clusters; no spills where the chains are few."""
    found = used_by_kernel(report_on(ptx_of([CLUSTER], "90"), arch))
    assert len(found) == 9, sorted(found)  # three precisions, 1, 2 or 4 tiles of chains
    for kernel, used in found.items():
        assert used.registers * MLP_THREADS <= REGISTERS_OF_A_MULTIPROCESSOR, kernel
        assert used.static_shared == 0, kernel
        assert used.spilled <= (16 if re.search(r"kernelILi2ELi4E", kernel) else 0), (kernel, used)  # bf16, 32 chains


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_within_their_limits(arch):
    found = usage(arch)
    of_regime = [{k: u for k, u in found.items() if "mlp_kernel" in k and f"RegimeE{i}E" in k} for i in range(3)]
    resident, streamed, lean = of_regime
    rows = {k: u for k, u in found.items() if re.search(r"\d+langevin_(noise|step)_kernel", k)}
    assert len(resident) == len(streamed) == 9, sorted(found)  # three precisions, 1, 2 or 4 tiles of chains
    assert len(lean) == 9
    norms = {k: u for k, u in found.items() if "spectral_norm_kernel" in k}
    assert len(rows) == 4
    assert len(norms) == 1
    for kernel, used in {**resident, **lean, **rows, **norms}.items():
        assert used.spilled == 0, kernel
        assert used.stack == 0, kernel
    for kernel, used in found.items():
        threads = ROW_THREADS if kernel in rows else NORM_THREADS if kernel in norms else MLP_THREADS
        blocks = {True: 4 if "noise" in kernel else 2, False: 1}[kernel in rows]
        assert used.registers * threads * blocks <= REGISTERS_OF_A_MULTIPROCESSOR, kernel
        assert used.static_shared == 0, kernel


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_fit_every_architecture(arch, shape):
    """Any plan fits the chip; a batch of the papers is resident wherever the weights fit beside it."""
    shared, multiprocessors = ARCHS[arch]
    for name in precision.NAMES:
        for chains in (1, 100, 10_000, 1_000_000):
            with precision.using(name):
                n_bytes, regime = on_host(limits=(multiprocessors, shared)).plan(
                    "mlp_langevin_chain", SHAPES[shape], chains, False, torch.device("cpu")
                )
            used = int(re.search(r"(\d+) KB of shared memory", regime)[1])
            assert used <= shared // 1024
            if chains == 100 and (shape != "LEBM" or (name == "bf16" and shared > 130_000)):
                assert regime.startswith("resident"), (name, regime)
                assert n_bytes == 0
