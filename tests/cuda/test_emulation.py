"""The host implementation of device.h: fragments, exchanges, barriers and copies as on the chip; faults reported."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from host_build import FLAGS, ROOT, built

SOURCES = [
    Path(__file__).with_name("emulation_check.cpp"),
    *(ROOT / "csrc/cuda/host" / f"{name}.cpp" for name in ("fibres", "block", "grid", "tensor_core")),
]
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
VARIANTS = {"plain": [], "sanitized": SANITIZERS, "ucontext": ["-DJLEBM_UCONTEXT"]}
SOUND = ("tf32", "bf16", "rounding", "ldmatrix", "exchange", "named_barriers", "barrier", "copies", "wgmma", "cluster")
REPORTED = {
    "divergent_barrier": "40 of 64 came",
    "divergent_warp": "while lane",
    "forgotten_copy": "never waited for",
    "misaligned_row": "must be a multiple of 16",
    "foreign_row": "are not in the block's",
    "too_much_shared": "cannot be launched",
    "unfenced_wgmma": "before every thread's fence_for_wgmma",
    "wgmma_not_begun": "without wgmma_begin",
    "forgotten_wgmma": "matrix instructions that it never waited for",
    "foreign_wgmma": "are not in the block's",
    "cluster_not_begun": "before the first sync_cluster",
    "unfenced_mbarrier": "no mbarrier_init and fence_mbarrier_init",
    "too_many_arrivals": "more threads than the 32",
    "bytes_that_never_come": "at an mbarrier",
    "sent_to_an_ended_block": "has ended",
}


def said(variant: str, case: str, seed: int) -> str:
    program = built(f"emulation_{variant}", SOURCES, [*FLAGS, *VARIANTS[variant]], [], "emulation_check")
    done = subprocess.run([program, case, str(seed)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", SOUND)
def test_as_on_the_chip(variant, case):
    for seed in range(5 if variant == "plain" else 1):
        assert said(variant, case, seed) == "ok"


@pytest.mark.parametrize(
    "case", ["removed_barrier", "removed_named_barrier", "removed_wait", "wgmma_read_early", "cluster_read_early"]
)
def test_a_missing_barrier_or_wait_is_caught(case):
    """Every order of threads shows it: one that hid it would be a draw of 1 in 2**64."""
    for seed in range(5):
        assert said("plain", case, seed).startswith("wrong: ")


@pytest.mark.parametrize("case", REPORTED)
@pytest.mark.parametrize("variant", ["plain", "sanitized"])
def test_faults_are_reported_with_kernel_and_thread(variant, case):
    text = said(variant, case, 1)
    assert REPORTED[case] in text
    assert case in text or "nothing" in text or "warpgroup_product" in text or "sent_around" in text


def test_rows_under_the_sanitizers():
    """langevin_noise and langevin_step at awkward sizes, no byte beyond their tensors."""
    kernels = [ROOT / "csrc/cuda" / f"{name}.cu" for name in ("langevin_noise", "langevin_step")]
    sources = [Path(__file__).with_name("rows_check.cpp"), *SOURCES[1:], *kernels]
    program = built("rows_sanitized", sources, [*FLAGS, *SANITIZERS], [], "rows_check")
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"
