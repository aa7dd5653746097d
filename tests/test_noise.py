"""The noise contract: known answers, exact words and normals, bit equality between torch and the compiled kernels."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jlebm_fast as jf
from jlebm_fast.backends import _native, eager_noise

KNOWN_ANSWERS = [
    tuple(int(word, 10 if i == 0 else 16) for i, word in enumerate(line.split()))
    for line in (Path(__file__).parent / "data" / "philox_kat.txt").read_text().splitlines()
    if not line.startswith("#")
]
needs_native = pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason()))


def cpu_noise(key, n_steps, chains, dim, **where):
    from jlebm_fast.backends import cpu

    return cpu.langevin_noise(key, n_steps, chains, dim, **where)


def test_all_six_known_answers_are_there():
    assert [row[0] for row in KNOWN_ANSWERS] == [7, 7, 7, 10, 10, 10]


@pytest.mark.parametrize("row", KNOWN_ANSWERS)
def test_philox_known_answers_torch(row):
    rounds, counter, key, answer = row[0], row[1:5], row[5:7], row[7:]
    words = eager_noise.philox4x32(tuple(torch.tensor([c]) for c in counter), key, rounds)
    assert tuple(int(w) for w in words) == answer


@needs_native
@pytest.mark.parametrize("row", KNOWN_ANSWERS)
def test_philox_known_answers_simd(row):
    rounds, counter, key, answer = row[0], row[1:5], row[5:7], row[7:]
    native = _native.load()
    lanes = native.cpu_lanes()
    words = native.cpu_philox_words(rounds, counter, key)
    assert tuple(words[w * lanes] for w in range(4)) == answer
    # the other lanes are the next chains
    for lane in range(lanes):
        chain = (counter[1] + lane) % (1 << 32)
        expected = eager_noise.philox4x32(
            tuple(torch.tensor([c]) for c in (counter[0], chain, counter[2], counter[3])), key, rounds
        )
        assert [words[w * lanes + lane] for w in range(4)] == [int(w) for w in expected]


def test_normals_are_those_of_the_formula():
    words = torch.randint(0, 1 << 32, (2, 200_000), generator=torch.Generator().manual_seed(0))
    words[0, :3] = torch.tensor([0, (1 << 32) - 1, 1 << 31])
    words[1, :3] = torch.tensor([(1 << 32) - 1, 0, 1 << 29])
    u0, u1 = ((words >> 9).double() * 2.0**-23 + 2.0**-24).unbind()
    r = (-2 * u0.log()).sqrt()
    cosine, sine = eager_noise.box_muller(words[0], words[1])
    assert (cosine - r * (2 * math.pi * u1).cos()).abs().max() < 8e-7
    assert (sine - r * (2 * math.pi * u1).sin()).abs().max() < 8e-7


def test_layout_of_the_field():
    # component dim % 4 of the group dim // 4, from words (0, 1) and (2, 3)
    key = 0x0123456789ABCDEF
    eps = eager_noise.langevin_noise(key, 2, 3, 7, first_step=5, first_chain=9, stream=1)
    for step in range(2):
        for chain in range(3):
            for dim in range(7):
                counter = tuple(torch.tensor([c]) for c in (dim // 4, 9 + chain, 5 + step, 1))
                w = eager_noise.philox4x32(counter, (0x89ABCDEF, 0x01234567))
                pair = eager_noise.box_muller(*(w[:2] if dim % 4 < 2 else w[2:]))
                assert eps[step, chain, dim] == pair[dim % 2].item()


@needs_native
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 16, 50])
@pytest.mark.parametrize("chains", [1, 7, 16, 33])
def test_simd_equals_torch_in_every_bit(chains, dim):
    where = {"first_step": 3, "first_chain": 1_000_003, "stream": 1}
    key = 0xFEDCBA9876543210
    assert torch.equal(
        cpu_noise(key, 3, chains, dim, **where), eager_noise.langevin_noise(key, 3, chains, dim, **where)
    )


@needs_native
def test_simd_equals_torch_on_four_million_normals():
    # extremes of both words included by number: the smallest u0 of this field is below 1e-6
    shape = (4, 10_000, 100)
    ours, oracle = cpu_noise(7, *shape), eager_noise.langevin_noise(7, *shape)
    assert torch.equal(ours, oracle)
    assert ours.abs().max() > 4.9


@needs_native
def test_counters_wrap():
    top = (1 << 32) - 2
    split = torch.cat(
        [eager_noise.langevin_noise(1, 1, 2, 4, first_chain=top), eager_noise.langevin_noise(1, 1, 3, 4)], 1
    )
    assert torch.equal(eager_noise.langevin_noise(1, 1, 5, 4, first_chain=top), split)
    assert torch.equal(cpu_noise(1, 1, 5, 4, first_chain=top), split)
    assert torch.equal(cpu_noise(1, 4, 3, 4, first_step=top), eager_noise.langevin_noise(1, 4, 3, 4, first_step=top))


@needs_native
def test_threads_do_not_change_noise():
    threads = torch.get_num_threads()
    try:
        fields = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            fields.append(cpu_noise(11, 3, 100, 10))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(fields[0], fields[1])
    assert torch.equal(fields[0], fields[2])


@needs_native
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_every_target_gives_the_same_bits(target):
    if target not in _native.load().cpu_targets().split(", "):
        pytest.skip(f"this processor does not run {target}")
    code = (
        "from jlebm_fast.backends import cpu, eager_noise, _native\n"
        "import torch\n"
        f"assert _native.load().cpu_target() == {target!r}\n"
        "ours, oracle = cpu.langevin_noise(5, 3, 1000, 18), eager_noise.langevin_noise(5, 3, 1000, 18)\n"
        "assert torch.equal(ours, oracle)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JLEBM_CPU_TARGET": target})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"device 'cuda:1' cannot be used: torch.cuda.is_available\(\) is False"):
        jf.langevin_noise(1, 1, 2, 3, device="cuda:1")
