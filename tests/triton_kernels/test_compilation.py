"""Every kernel compiled for NVIDIA and AMD chips, without one: registers, spills and shared memory within limits.

The published problems (HS, FID, LEBM, WIDE) in each precision; tiles as the backend chooses them for that chip.
"""

from __future__ import annotations

import os
import re

import needs_compiler  # noqa: F401
import pytest
import torch
from compiled import CHIPS, compile_call, compile_chain, mlp_of

from jlebm_fast.backends.triton_kernels import launch, tiles
from jlebm_fast.bench import cases
from jlebm_fast.problem import MLPSpec, Update

# a resident kernel spills nothing; a streamed one holds few things across its inner loops and may park some
MOST_SPILLED = {"resident": 0, "streamed": 96}
MOST_REGISTERS = {"cuda": 255, "hip": 512}
MATRIX_UNIT = {
    "sm_80": ("ptx", "mma.sync.aligned.m16n8k"),
    "sm_90": ("ptx", "wgmma.mma_async"),
    "sm_100": ("ptx", "tcgen05.mma"),
    "gfx942": ("amdgcn", "v_mfma_f32"),
}
DEEP = MLPSpec((20, *[64] * 16, 1), ("silu",) * 16, (0.0,) * 16)
BROAD = MLPSpec((64, 128, 128, 128, 1), ("silu",) * 3, (0.0,) * 3)
MANY_LOGITS = MLPSpec((16, 50, 50, 10), ("gelu", "elu"), (0.0, 1.0), "logsumexp")


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory):
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def spec_of(problem: str) -> MLPSpec:
    return {"DEEP": DEEP, "BROAD": BROAD, "MANY": MANY_LOGITS}.get(problem) or cases.CASES[problem].spec


def global_loads(text):
    return [line for line in text.splitlines() if "tt.load" in line or ".buffer_load" in line]


def check_limits(compiled, regime, chip_name, most_spilled=None):
    target, chip = CHIPS[chip_name]
    assert compiled.spilled <= (MOST_SPILLED[regime] if most_spilled is None else most_spilled), compiled[:4]
    assert compiled.registers <= MOST_REGISTERS[target.backend], compiled[:4]
    assert 0 < compiled.shared <= chip.shared, compiled[:4]


@pytest.mark.parametrize(
    ("problem", "chip_name", "precision", "chains", "regime"),
    [
        ("HS", "sm_90", "fp32", 100, "resident"),
        ("HS", "sm_90", "bf16", 10_000, "resident"),
        ("HS", "sm_80", "tf32", 10_000, "resident"),
        ("HS", "sm_100", "fp32", 100, "streamed"),
        ("HS", "gfx942", "fp32", 20_000, "resident"),
        ("FID", "sm_80", "bf16", 10_000, "resident"),
        ("FID", "sm_90", "fp32", 100, "streamed"),
        ("FID", "sm_90", "fp32", 10_000, "streamed"),
        ("FID", "sm_90", "tf32", 10_000, "resident"),
        ("FID", "sm_100", "bf16", 100, "resident"),
        ("FID", "gfx942", "fp32", 100, "resident"),
        ("LEBM", "sm_80", "fp32", 100, "streamed"),
        ("LEBM", "sm_90", "fp32", 100, "streamed"),
        ("LEBM", "sm_100", "tf32", 100, "streamed"),
        ("LEBM", "gfx942", "fp32", 100, "streamed"),
        ("WIDE", "sm_90", "fp32", 400, "streamed"),
        ("WIDE", "sm_100", "fp32", 400, "streamed"),
        ("WIDE", "gfx942", "bf16", 400, "streamed"),
        ("DEEP", "sm_90", "fp32", 100, "streamed"),
        ("BROAD", "gfx942", "fp32", 100, "streamed"),
        ("MANY", "sm_90", "fp32", 100, "resident"),
    ],
)
def test_chains_fit(problem, chip_name, precision, chains, regime):
    chosen, compiled = compile_chain(spec_of(problem), chip_name, precision, chains)
    assert chosen.regime == regime
    check_limits(compiled, regime, chip_name)
    kind, instruction = MATRIX_UNIT[chip_name]
    assert instruction in compiled.text[kind]
    if regime == "resident":
        # weights are read before the loop over steps, not in it
        first = "tensor<{1}x{0}x".format(*map(tiles.power_of_two, spec_of(problem).widths[:2]))
        before, _, loop = compiled.text["ttgir"].partition("scf.for")
        assert any(first in line for line in global_loads(before))
        assert not any(first in line for line in global_loads(loop))


@pytest.mark.parametrize(
    ("problem", "chip_name", "precision"),
    [("HS", "sm_90", "fp32"), ("FID", "sm_90", "fp32"), ("FID", "gfx942", "fp32"), ("MANY", "sm_80", "bf16")],
)
def test_recorded_chains_fit(problem, chip_name, precision):
    chosen, compiled = compile_chain(spec_of(problem), chip_name, precision, 100, recorded=True)
    check_limits(compiled, chosen.regime, chip_name)


def net_of(widths: str) -> MLPSpec:
    numbers = tuple(map(int, widths.split("-")))
    depth = len(numbers) - 2
    return MLPSpec(numbers, ("gelu",) * depth, (0.0,) * depth, "identity" if numbers[-1] == 1 else "logsumexp")


@pytest.mark.parametrize(
    ("widths", "precision", "chains", "regime"),
    [
        # weights that fill the shared memory up to the last kilobytes
        ("200-128-128-10", "bf16", 10_000, "resident"),
        ("256-128-100", "bf16", 10_000, "resident"),
        ("64-64-64-64-10", "fp32", 10_000, "resident"),
        ("64-128-128-1", "tf32", 10_000, "resident"),
        # more registers than there are, were they resident: sides of more than a warpgroup's 64 rows
        ("256-32-32-1", "fp32", 10_000, "streamed"),
        ("32-256-1", "fp32", 10_000, "streamed"),
        ("128-64-10", "fp32", 10_000, "streamed"),
        ("64-64-100", "fp32", 100, "streamed"),
        ("256-32-32-10", "fp32", 100, "streamed"),
        ("256-64-64-64-10", "tf32", 10_000, "streamed"),
        # or with 32 chains a program
        ("64-64-64-64-64-100", "tf32", 10_000, "resident"),
        ("128-64-64-64-64-1", "tf32", 10_000, "resident"),
        ("128-32-32-32-32-100", "bf16", 10_000, "resident"),
        ("256-32-32-1", "tf32", 10_000, "resident"),
    ],
)
def test_other_shapes_fit(widths, precision, chains, regime):
    chosen, compiled = compile_chain(net_of(widths), "sm_90", precision, chains)
    assert chosen.regime == regime
    check_limits(compiled, regime, "sm_90", most_spilled=32)


@pytest.mark.parametrize(
    ("chip_name", "precision", "chains", "block_chains", "most_spilled"),
    [
        ("sm_90", "tf32", 100, 16, 0),
        ("sm_90", "bf16", 100, 16, 0),
        ("sm_90", "fp32", 4_000, 32, 0),
        ("sm_90", "tf32", 4_000, 32, 0),
        ("sm_90", "bf16", 4_000, 32, 0),
        ("sm_90", "fp32", 10_000, 64, 16),
        ("sm_90", "tf32", 10_000, 64, 0),
        ("sm_90", "bf16", 10_000, 64, 0),
        ("sm_80", "tf32", 100, 16, 0),
        ("sm_80", "bf16", 100, 16, 0),
        ("sm_80", "fp32", 10_000, 64, 96),
        ("sm_89", "tf32", 100, 16, 0),
        ("sm_89", "bf16", 100, 16, 0),
        ("sm_89", "tf32", 10_000, 64, 0),
        ("sm_100", "fp32", 4_000, 32, 16),
        ("gfx942", "bf16", 100, 16, 0),
    ],
)
def test_streamed_tiles_spill_next_to_nothing(chip_name, precision, chains, block_chains, most_spilled):
    chosen, compiled = compile_chain(spec_of("LEBM"), chip_name, precision, chains)
    assert chosen[:2] == ("streamed", block_chains)
    check_limits(compiled, "streamed", chip_name, most_spilled)


@pytest.mark.parametrize("problem", ["HS", "LEBM"])
def test_tf32_operands_are_rounded(problem):
    """The tensor core would cut them."""
    _, compiled = compile_chain(spec_of(problem), "sm_90", "tf32", 100)
    added = set(re.findall(r"add\.s32 \s*(%r\d+), %r\d+, 4096;", compiled.text["ptx"]))
    kept = set(re.findall(r"and\.b32 \s*%r\d+, (%r\d+), -8192;", compiled.text["ptx"]))
    assert len(kept) >= 8  # of a thread, in one product
    assert kept <= added


def test_three_way_tf32_adds_in_float32():
    """The halves of a sum start from zero each, and what adds them up is no tensor core."""
    _, compiled = compile_chain(spec_of("HS"), "sm_90", "fp32", 100)
    products = [line for line in compiled.text["ttgir"].splitlines() if re.search(r"maxNumImpreciseAcc = 1\b", line)]
    assert len(products) >= 2 * 7  # of the eight products of HS the first has 16 features, no sum to halve
    for line in products:
        assert re.search(r"dot %\w+, %\w+, %cst\w*[ ,]", line), line


def gradient_call(problem, chip, precision, chains):
    spec = spec_of(problem)
    z = torch.zeros(chains, spec.dim)
    dot_precision = tiles.dot_precision(precision, chip)
    chosen = tiles.choose(spec, chains, dot_precision, chip, op="mlp_energy_grad")
    call = launch.energy_grad_call(z, mlp_of(spec), torch.zeros(chains), z, chosen, dot_precision, chip)
    return chosen, call


@pytest.mark.parametrize("chip_name", CHIPS)
@pytest.mark.parametrize(("problem", "precision"), [("HS", "tf32"), ("HS", "fp32"), ("WIDE", "tf32")])
def test_gradients_fit(problem, precision, chip_name):
    target, chip = CHIPS[chip_name]
    chosen, call = gradient_call(problem, chip, precision, 100)
    # outside a loop the compiler keeps rounded weights in registers rather than in shared memory
    most_spilled = 32 if (chosen.regime, precision) == ("resident", "tf32") else None
    check_limits(compile_call(call, target), chosen.regime, chip_name, most_spilled)


@pytest.mark.parametrize("chip_name", CHIPS)
def test_packing_fits(chip_name):
    _, call = gradient_call("LEBM", CHIPS[chip_name][1], "fp32", 100)
    (packing,) = call.before
    compiled = compile_call(packing, CHIPS[chip_name][0])
    assert compiled.spilled == 0
    assert compiled.registers <= 128


def spectral_call(problem, keep):
    weights = mlp_of(spec_of(problem)).weights
    vectors = [(torch.zeros(w.shape[0]), torch.zeros(w.shape[1])) for w in weights]
    pairs = [(w, u) for w, (u, _) in zip(weights, vectors, strict=True)]
    found = [(u, v, torch.zeros(1), w) for w, (u, v) in zip(weights, vectors, strict=True)]
    return launch.spectral_call(pairs, found, vectors if keep else None, 1e-4)


@pytest.mark.parametrize("chip_name", CHIPS)
@pytest.mark.parametrize(("problem", "keep"), [("HS", True), ("LEBM", False)])
def test_spectral_norms_fit(problem, keep, chip_name):
    compiled = compile_call(spectral_call(problem, keep), CHIPS[chip_name][0])
    check_limits(compiled, "resident", chip_name)
    assert compiled.registers <= 208  # 199 by Triton 3.6, 168 by 3.7


def elementwise_calls():
    z, everything = torch.zeros(100, 50), torch.zeros(100, 50)
    full = Update(
        torch.zeros(1, 3),
        torch.zeros(100, 3),
        everything,
        everything,
        torch.zeros(100, 50, dtype=torch.bool),
        extra_grad=everything,
        noise_key=torch.zeros(1, dtype=torch.int64),
    )
    return {
        "langevin_noise": launch.noise_call(torch.zeros(60, 100, 50), 3, 0, 0, 0),
        "langevin_noise, key on the device": launch.noise_call(torch.zeros(6, 9, 5), full.noise_key, 0, 0, 0),
        "langevin_step": launch.step_call(z, z, full, z),
    }


@pytest.mark.parametrize("chip_name", CHIPS)
@pytest.mark.parametrize("name", elementwise_calls())
def test_elementwise_kernels_fit_and_do_not_fuse(name, chip_name):
    target, chip = CHIPS[chip_name]
    compiled = compile_call(elementwise_calls()[name], target)
    assert compiled.spilled == 0
    assert compiled.registers <= 128
    assert compiled.shared <= chip.shared // 4
    # the noise contract: each multiplication and addition rounds on its own
    for line in compiled.text["llir"].splitlines():
        if " fmul " in line or " fadd " in line:
            assert "contract" not in line, line
            assert "fast" not in line, line
    if "ptx" in compiled.text:
        assert "mul.rn.f32" in compiled.text["ptx"]
        assert "fma." not in compiled.text["ptx"]
