"""The tensors that a plain call tells of a chain in: tensors like others, in memory that is used again."""

import os
import pickle

import pytest
import torch
from test_plain_samples import DIM, DIMS, energy, layers, normal, pytestmark  # noqa: F401  the last skips these, too

import jlebm_fast as jf


def test_diagnostics_are_tensors_like_others():
    sampler = jf.FastLangevin(energy(), n_steps=5)
    for _ in range(2):  # the second call is a plain one
        _, info = sampler.sample(layers(), return_info=True)
    del sampler
    for tensor in info[:4]:
        assert (tensor.is_inference(), tensor._is_view(), tensor.is_leaf, tensor.data_ptr() % 64) == (
            False,
            False,
            True,
            0,
        )
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
        assert torch.equal(tensor.clone().share_memory_(), tensor)
        kept = tensor[-1:].clone()
        piece = tensor[-1:]
        del tensor
        assert torch.equal(piece, kept)
    weight = info.energy.requires_grad_()
    (weight * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))
    info.grad_norm.zero_()
    assert not info.grad_norm.any()
    assert info.displacement.all()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="tells a process's memory on Linux")
def test_diagnostics_leave_no_memory_behind():
    sampler, z = jf.FastLangevin(energy(), n_steps=100), normal(2000, DIM)

    def kilobytes():
        for _ in range(20):
            sampler.sample(z, return_info=True)  # 2.4 MB each
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

    first = kilobytes()
    assert kilobytes() < first + 10_000


@pytest.mark.parametrize("latents", [lambda: normal(4000, DIM), lambda: [normal(20_000, d) for d in DIMS]])
def test_memory_of_diagnostics_is_used_again_once_they_are_gone(latents):
    sampler, z = jf.FastLangevin(energy(), n_steps=20), latents()
    sampler(z)

    def told(key):
        return sampler.sample(z, noise_key=key, return_info=True)[1][:3]

    def places(tensors):
        return {tensor.data_ptr() for tensor in tensors}

    first = told(1)
    kept, known = [tensor.clone() for tensor in first], places(first)
    second = told(2)
    assert not known & places(second)
    known |= places(second)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    part = first[0][3]  # a view keeps all of it
    del first, second
    third = told(1)
    known |= places(third)
    assert torch.equal(part, kept[0][3])
    assert all(torch.equal(a, b) for a, b in zip(third, kept, strict=True))
    del part, third
    assert places(told(3)) <= known
