"""The instructions of machine.h beside Python's integers and torch, and what a wrong program is told."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import program
import pytest
import translate

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"


def kernel(body: str, registers: str = "") -> str:
    """A kernel of one pointer, in %rd1; %r1 is the thread."""
    return f"""{HEAD}.visible .entry k(.param .u64 k_param_0)
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %rd<20>; {registers}
    ld.param.u64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    {body}
    ret;
}}
"""


def run(body: str, memory: np.ndarray, threads: int = 32, shared: int = 0, registers: str = "", grid=(1,)) -> None:
    compiled = program.Program(kernel(body, registers))
    compiled(grid, threads, shared, [ctypes.c_uint64(memory.ctypes.data)])


def results(lines: list[str], operands: list[int]) -> list[int]:
    """What `op %r30, …` leaves, for each line of one instruction; %r10, %r11, %r12 hold the operands."""
    body = [f"mov.b32 %r{10 + i}, {value};" for i, value in enumerate(operands)]
    for i, line in enumerate(lines):
        body += [line, f"st.global.b32 [%rd1+{4 * i}], %r30;"]
    out = np.zeros(len(lines), np.uint32)
    run("\n".join(body), out)
    return out.tolist()


def signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


@pytest.mark.parametrize(
    ("a", "b", "c"), [(7, 3, 1), (0xFFFFFFF0, 5, 9), (0x80000000, 0xFFFFFFFF, 33), (3, 0x7FFFFFFF, 31)]
)
def test_integers(a, b, c):
    expected = {
        "add.s32 %r30, %r10, %r11;": a + b,
        "sub.s32 %r30, %r10, %r11;": a - b,
        "mul.lo.s32 %r30, %r10, %r11;": a * b,
        "mul.hi.u32 %r30, %r10, %r11;": a * b >> 32,
        "mul.hi.s32 %r30, %r10, %r11;": signed(a) * signed(b) >> 32,
        "mad.lo.s32 %r30, %r10, %r11, %r12;": a * b + c,
        "div.u32 %r30, %r10, %r11;": a // b,
        "div.s32 %r30, %r10, %r11;": int(abs(signed(a)) // abs(signed(b))) * (1 if signed(a) * signed(b) >= 0 else -1),
        "rem.u32 %r30, %r10, %r11;": a % b,
        "min.s32 %r30, %r10, %r11;": min(signed(a), signed(b)),
        "max.u32 %r30, %r10, %r11;": max(a, b),
        "shl.b32 %r30, %r10, %r12;": a << c if c < 32 else 0,
        "shr.u32 %r30, %r10, %r12;": a >> c if c < 32 else 0,
        "shr.s32 %r30, %r10, %r12;": signed(a) >> min(c, 31),
        "and.b32 %r30, %r10, %r11;": a & b,
        "xor.b32 %r30, %r10, %r11;": a ^ b,
        "not.b32 %r30, %r10;": ~a,
        "neg.s32 %r30, %r10;": -a,
        "bfe.u32 %r30, %r10, 4, 8;": a >> 4 & 255,
        "bfe.s32 %r30, %r10, 4, 8;": (a >> 4 & 255) - (256 if a >> 11 & 1 else 0),
        "bfi.b32 %r30, %r10, %r11, 8, 4;": (b & ~0xF00) | (a & 15) << 8,
        "lop3.b32 %r30, %r10, %r11, %r12, 0x96;": a ^ b ^ c,
        "lop3.b32 %r30, %r10, %r11, %r12, 0xCA;": (a & b) | (~a & c),
        "prmt.b32 %r30, %r10, %r11, 0x5410;": (a & 0xFFFF) | (b & 0xFFFF) << 16,
        "shf.l.wrap.b32 %r30, %r10, %r11, 7;": ((b << 32 | a) << 7) >> 32,
    }
    got = results(list(expected), [a, b, c])
    for line, found, wanted in zip(expected, got, expected.values(), strict=True):
        assert found == wanted & 0xFFFFFFFF, line


def test_wide_products_and_signs():
    out = np.zeros(4, np.uint64)
    run(
        """mov.b32 %r10, -5; mul.wide.s32 %rd2, %r10, 7; mul.wide.u32 %rd3, %r10, 7;
        cvt.s64.s32 %rd4, %r10; cvt.u64.u32 %rd5, %r10;
        st.global.v2.u64 [%rd1], {%rd2, %rd3}; st.global.u64 [%rd1+16], %rd4; st.global.u64 [%rd1+24], %rd5;""",
        out,
    )
    assert out.astype(np.int64).tolist() == [-35, (2**32 - 5) * 7, -5, 2**32 - 5]


def bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def test_floats():
    lines = {
        "add.f32 %r30, %r10, %r11;": np.float32(1.1) + np.float32(-3.7),
        "mul.rn.f32 %r30, %r10, %r11;": np.float32(1.1) * np.float32(-3.7),
        "div.rn.f32 %r30, %r10, %r11;": np.float32(1.1) / np.float32(-3.7),
        "neg.f32 %r30, %r11;": 3.7,
        "max.f32 %r30, %r10, 0f7FC00000;": 1.1,
        "min.f32 %r30, %r10, %r11;": -3.7,
        "selp.f32 %r30, %r10, %r11, %p1;": -3.7,  # never set: false
    }
    for line, found, wanted in zip(lines, results(list(lines), [bits(1.1), bits(-3.7)]), lines.values(), strict=True):
        assert found == bits(wanted), line


def test_approximations_are_near_and_not_exact():
    """Within two units of the exact value; a kernel that needs the exact one is caught."""
    n = 512
    x = np.linspace(0.01, 40, n, dtype=np.float32)
    for name, exact in (("ex2.approx.ftz", np.exp2), ("rcp.approx.ftz", np.reciprocal), ("sqrt.approx.ftz", np.sqrt)):
        out = x.copy()
        run(
            f"""mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2; ld.global.f32 %f1, [%rd2];
            {name}.f32 %f2, %f1; st.global.f32 [%rd2], %f2;""",
            out,
            threads=n,
        )
        true = exact(x.astype(np.float64))
        relative = np.abs(out / true - 1)
        assert relative.max() < 2.5e-7, name
        assert (out != true.astype(np.float32)).mean() > 0.3, name


def test_loops_predicates_and_scopes_of_inline_assembly():
    out = np.zeros(32, np.uint32)
    loop = "{ .reg .pred done; again: add.s32 %r5, %r5, 1; setp.ge.u32 done, %r5, %r1; @!done bra again; }"
    run(
        f"""mov.u32 %r5, 0; {loop} {loop} setp.lt.u32 %p1, %r1, 16; @%p1 mov.u32 %r5, 77;
        mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2; st.global.u32 [%rd2], %r5;""",
        out,
    )
    assert out.tolist() == [77] * 16 + [i + 1 for i in range(16, 32)]


def test_shuffles():
    out = np.zeros((3, 32), np.uint32)
    run(
        """shfl.sync.bfly.b32 %r5, %r1, 5, 31, -1; shfl.sync.down.b32 %r6|%p1, %r1, 3, 31, -1;
        shfl.sync.idx.b32 %r7, %r1, 9, 31, -1; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2;
        st.global.u32 [%rd2], %r5; st.global.u32 [%rd2+128], %r6; st.global.u32 [%rd2+256], %r7;""",
        out,
    )
    lanes = np.arange(32)
    assert (out[0] == (lanes ^ 5)).all()
    assert (out[1] == np.where(lanes < 29, lanes + 3, lanes)).all()
    assert (out[2] == 9).all()


def test_store_and_load_of_matrices_are_inverse():
    """Rows of 16 bytes, stored transposed and loaded transposed."""
    out = np.zeros((32, 2), np.uint32)
    run(
        """mov.u32 %r2, memory; and.b32 %r3, %r1, 15; shl.b32 %r3, %r3, 4; add.s32 %r2, %r2, %r3;
        mul.lo.s32 %r10, %r1, 257; add.s32 %r11, %r10, 65536;
        stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%r2], {%r10, %r11}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r12, %r13}, [%r2];
        mul.wide.u32 %rd2, %r1, 8; add.s64 %rd2, %rd1, %rd2; st.global.v2.u32 [%rd2], {%r12, %r13};""",
        out,
        shared=256,
    )
    assert (out[:, 0] == np.arange(32) * 257).all()
    assert (out[:, 1] == np.arange(32) * 257 + 65536).all()


WRONG = {
    "beyond the memory": ("mov.u32 %r2, memory; st.shared.u32 [%r2+64], %r1;", "are not in the block's 64 bytes"),
    "misaligned": ("mov.u32 %r2, memory; ld.shared.u32 %r3, [%r2+2];", "must be a multiple of 4"),
    "misaligned global": ("ld.global.u32 %r3, [%rd1+2];", "an access of 4 bytes that is not aligned"),
    "division by zero": ("mov.u32 %r2, 0; div.u32 %r3, %r1, %r2;", "division by zero"),
    "half a warp": ("setp.lt.u32 %p1, %r1, 7; @%p1 bra A; bar.sync 0; A:", "threads wait for others"),
    "a masked shuffle": ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 15;", "a part of a warp"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_programs_are_reported(case):
    body, words = WRONG[case]
    with pytest.raises(RuntimeError, match=words):
        run(body, np.zeros(64, np.uint32), shared=64)


def test_what_is_not_known_is_named():
    with pytest.raises(AssertionError, match="tanh_approx_f32"):
        run("tanh.approx.f32 %f1, %f2;", np.zeros(4, np.uint32))
    with pytest.raises(ValueError, match="neither a register nor anything else that is known: 'nobody'"):
        list(translate.kernels(kernel("mov.u32 %r2, nobody;")))
    with pytest.raises(ValueError, match="a function"):
        list(translate.kernels(HEAD + ".func helper() { ret; }\n" + kernel("")))


# --- races ------------------------------------------------------------------------------------------------------------
# %r2 is the thread's own word of shared memory, %r3 that of the thread 33 (or 1) further on
PLACES = """mov.u32 %r4, memory; shl.b32 %r2, %r1, 2; add.s32 %r2, %r2, %r4; add.s32 %r3, %r1, 33; and.b32 %r3, %r3, 63;
    shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r4; xor.b32 %r5, %r1, 1; shl.b32 %r5, %r5, 2; add.s32 %r5, %r5, %r4;"""
SOUND = {
    "a barrier": "st.shared.u32 [%r2], %r1; bar.sync 0; ld.shared.u32 %r6, [%r3];",
    "a barrier for the next write": "ld.shared.u32 %r6, [%r3]; bar.sync 0; st.shared.u32 [%r2], %r1;",
    "a barrier of the warp": "st.shared.u32 [%r2], %r1; bar.warp.sync -1; ld.shared.u32 %r6, [%r5];",
    "what several threads store alike": "mov.u32 %r6, 7; st.shared.u32 [%r4], %r6;",
    "bytes beside each other": "cvt.u16.u32 %rs1, %r1; add.s32 %r6, %r4, %r1; st.shared.u8 [%r6], %rs1;",
    "a copy with wait and barrier": """cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group;
        cp.async.wait_group 0; bar.sync 0; ld.shared.u32 %r6, [%r3];""",
    "what a shuffle shows to be read": """ld.shared.u32 %r6, [%r5]; shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
        st.shared.u32 [%r2], %r7;""",
    "blocks that read": "ld.global.u32 %r6, [%rd1];",
}
RACES = {
    "no barrier": ("st.shared.u32 [%r2], %r1; ld.shared.u32 %r6, [%r3];", "a race at offset"),
    "no barrier before the next write": ("ld.shared.u32 %r6, [%r3]; st.shared.u32 [%r2], %r1;", "a race at offset"),
    "a barrier of the warp alone": (
        "st.shared.u32 [%r2], %r1; bar.warp.sync -1; ld.shared.u32 %r6, [%r3];",
        "a race at offset",
    ),
    "what several threads store": ("st.shared.u32 [%r4], %r1;", "st.shared by thread"),
    "a copy with a wait alone": (
        """cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.u32 %r6, [%r3];""",
        "cp.async",
    ),
    "a copy behind its barrier": (
        """cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group; bar.sync 0; cp.async.wait_group 0;
        ld.shared.u32 %r6, [%r3];""",
        "cp.async",
    ),
    "a shuffle between write and read": (
        "st.shared.u32 [%r2], %r1; shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1; ld.shared.u32 %r6, [%r5];",
        "a race at offset",
    ),
    "blocks that write": ("mov.u32 %r6, %ctaid.x; st.global.u32 [%rd1], %r6;", "a race at an address of global memory"),
}


@pytest.fixture
def look(monkeypatch):
    monkeypatch.setenv("JLEBM_TEST_RACES", "1")
    return lambda body: run(PLACES + body, np.zeros(64, np.uint32), threads=64, shared=256, grid=(2,))


@pytest.mark.parametrize("case", SOUND)
def test_what_is_ordered_is_no_race(look, case):
    look(SOUND[case])


@pytest.mark.parametrize("case", RACES)
def test_races_are_reported(look, case):
    body, words = RACES[case]
    with pytest.raises(RuntimeError, match=f"{words}.*and nothing between them that orders the two"):
        look(body)
