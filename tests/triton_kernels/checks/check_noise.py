"""Noise: known answers, exact words and normals, bit equality with the torch oracle."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from jlebm_fast import rng
from jlebm_fast.backends import eager_noise
from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import launch, noise

LINES = (Path(__file__).parents[2] / "data" / "philox_kat.txt").read_text().splitlines()
KNOWN_ANSWERS = [
    tuple(int(word, 10 if i == 0 else 16) for i, word in enumerate(line.split()))
    for line in LINES
    if not line.startswith("#")
]


@triton.jit
def words_kernel(counter_ptr, key_ptr, out_ptr, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + i, mask=i < n).to(tl.uint32)
    c1 = tl.load(counter_ptr + n + i, mask=i < n).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * n + i, mask=i < n).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * n + i, mask=i < n).to(tl.uint32)
    low, high = tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = noise.philox4x32(c0, c1, c2, c3, low, high, ROUNDS)
    tl.store(out_ptr + i, w0.to(tl.int64), mask=i < n)
    tl.store(out_ptr + n + i, w1.to(tl.int64), mask=i < n)
    tl.store(out_ptr + 2 * n + i, w2.to(tl.int64), mask=i < n)
    tl.store(out_ptr + 3 * n + i, w3.to(tl.int64), mask=i < n)


@triton.jit
def normals_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = noise.box_muller(
        tl.load(words_ptr + i, mask=i < n, other=0).to(tl.uint32),
        tl.load(words_ptr + n + i, mask=i < n, other=0).to(tl.uint32),
    )
    tl.store(out_ptr + i, first, mask=i < n)
    tl.store(out_ptr + n + i, second, mask=i < n)


def words(counter, key, rounds):
    out = torch.zeros(4, counter.shape[1], dtype=torch.int64)
    words_kernel[(1,)](counter, torch.tensor(key), out, counter.shape[1], ROUNDS=rounds, BLOCK=64)
    return out


@pytest.mark.parametrize("row", KNOWN_ANSWERS)
def test_philox_known_answers(row):
    rounds, counter, key, answer = row[0], row[1:5], row[5:7], row[7:]
    assert tuple(words(torch.tensor([counter]).T.contiguous(), key, rounds)[:, 0].tolist()) == answer


def test_all_six_known_answers_are_there():
    assert [row[0] for row in KNOWN_ANSWERS] == [7, 7, 7, 10, 10, 10]


def test_philox_equals_the_oracle():
    counter = torch.randint(0, 1 << 32, (4, 50), generator=torch.Generator().manual_seed(1))
    expected = eager_noise.philox4x32(tuple(counter), (0x89ABCDEF, 0xFEDCBA98))
    assert torch.equal(words(counter, (0x89ABCDEF, 0xFEDCBA98), 10), torch.stack(expected))


def test_normals_of_random_and_extreme_words():
    n = 100_000
    drawn = torch.randint(0, 1 << 32, (2, n), generator=torch.Generator().manual_seed(0))
    extreme = torch.tensor(
        [0, 1, 511, 512, (1 << 32) - 1, (1 << 32) - 512, 1 << 29, 3 << 29, 5 << 29, 7 << 29, 1 << 31]
    )
    drawn[0, :121], drawn[1, :121] = extreme.repeat_interleave(11), extreme.repeat(11)
    out = torch.empty(2, n)
    normals_kernel[(-(-n // 16384),)](drawn, out, n, BLOCK=16384)
    assert torch.equal(out, torch.stack(eager_noise.box_muller(drawn[0], drawn[1])))


@pytest.mark.parametrize("dim", [1, 3, 4, 5, 16, 17, 63, 64, 65, 150])
@pytest.mark.parametrize("chains", [1, 33])
def test_field_equals_the_oracle(chains, dim):
    where = {"first_step": 3, "first_chain": 1_000_003, "stream": 1}
    key = 0xFEDCBA9876543210
    ours = backend.langevin_noise(key, 2, chains, dim, device="cpu", **where)
    assert torch.equal(ours, eager_noise.langevin_noise(key, 2, chains, dim, **where))


def test_fifty_thousand_normals():
    ours = backend.langevin_noise(7, 5, 1000, 10, device="cpu")
    assert torch.equal(ours, eager_noise.langevin_noise(7, 5, 1000, 10))


def test_counters_wrap():
    top = (1 << 32) - 2
    for where in ({"first_chain": top}, {"first_step": top}, {"first_chain": 1 << 31, "stream": (1 << 32) - 1}):
        ours = backend.langevin_noise(1, 4, 5, 4, device="cpu", **where)
        assert torch.equal(ours, eager_noise.langevin_noise(1, 4, 5, 4, **where))


@pytest.mark.parametrize("key", [0, 1, (1 << 32) - 1, 1 << 31, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF])
def test_keys_as_integers_and_as_tensors(key):
    expected = eager_noise.langevin_noise(key, 2, 3, 5)
    assert torch.equal(backend.langevin_noise(key, 2, 3, 5, device="cpu"), expected)
    as_tensor = torch.tensor([key - (1 << 64) if key >> 63 else key])
    assert torch.equal(backend.langevin_noise(as_tensor, 2, 3, 5, device="cpu"), expected)


def test_keys_advance_as_on_the_other_backends():
    key = torch.tensor([-5])
    backend.advance_noise_key(key)
    assert int(key) % (1 << 64) == ((1 << 64) - 5 + 0x9E3779B97F4A7C15) % (1 << 64)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_block_sizes_change_nothing(groups):
    out = torch.empty(2, 40, 19)
    launch.noise_call(out, 5, 1, 2, 0, groups).run()
    assert torch.equal(out, eager_noise.langevin_noise(5, 2, 40, 19, first_step=1, first_chain=2))


def test_empty_fields():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert backend.langevin_noise(1, *shape, device="cpu").shape == shape


def test_key_range_is_that_of_the_package():
    assert launch.signed(rng.KEY_RANGE - 1) == -1
    assert launch.signed(rng.COUNTER_RANGE - 1) == -1
    assert launch.signed(1 << 31) == -(1 << 31)
