"""Latents in any structure become one flat tensor and come back as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jlebm_fast as jf
from jlebm_fast.latents import flatten_latents, flatten_mask

LAYERS = st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=5)


def make(layers, chains, container, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = [torch.randn(chains, d, *((1, 1) if image else ()), generator=g) for d, image in layers]
    return z[0] if container is torch.Tensor else container(z)


@settings(deadline=None, max_examples=60)
@given(LAYERS, st.integers(0, 5), st.sampled_from([list, tuple, torch.Tensor]))
def test_round_trip(layers, chains, container):
    z = make(layers, chains, container)
    flat, layout = flatten_latents(z)
    assert flat.shape == (chains, layout.dim)
    assert flat.is_contiguous()
    back = layout.restore(flat)
    assert type(back) is type(z)
    pairs = [(back, z)] if isinstance(z, torch.Tensor) else list(zip(back, z, strict=True))
    for a, b in pairs:
        assert torch.equal(a, b)
        assert a.is_contiguous()


@settings(deadline=None, max_examples=60)
@given(LAYERS, st.integers(1, 5), st.data())
def test_every_form_of_a_mask_says_the_same(layers, chains, data):
    z = make(layers, chains, list)
    flat, layout = flatten_latents(z)
    per_layer = data.draw(st.lists(st.booleans(), min_size=len(layers), max_size=len(layers)))
    expected = torch.cat([torch.full((d,), m) for m, d in zip(per_layer, layout.dims, strict=True)])
    tensors = [torch.full((d,), m) for m, d in zip(per_layer, layout.dims, strict=True)]
    tensors[0] = tensors[0].expand(chains, -1)
    assert torch.equal(flatten_mask(per_layer, layout, flat), expected)
    assert torch.equal(flatten_mask(expected, layout, flat), expected)
    assert torch.equal(flatten_mask(tensors, layout, flat), expected.expand(chains, -1))
    assert torch.equal(flatten_mask(expected.expand(chains, -1), layout, flat), expected.expand(chains, -1))


@pytest.mark.parametrize("recognised", [True, False])
def test_a_negation_that_torch_has_only_noted_is_carried_out(recognised):
    """The imaginary part of a conjugate shares its memory with the number: its sign is a flag."""
    g = torch.Generator().manual_seed(1)
    f, z, noise = jf.EnergyMLP(6, 5, 2), torch.randn(4, 6, generator=g), torch.randn(3, 4, 6, generator=g)
    flagged, flagged_noise = (torch.complex(t, -t).conj().imag for t in (z, noise))
    assert flagged.is_neg()
    assert torch.equal(flagged, z)
    prior = jf.FastLangevin(f if recognised else lambda z: f(z), n_steps=3)
    assert torch.equal(prior(torch._neg_view(-z), noise=torch._neg_view(-noise)), prior(z, noise=noise))
    assert torch.equal(prior(flagged, noise=flagged_noise), prior(z, noise=noise))
    assert torch.equal(f(torch._neg_view(-z)), f(z))
    step = jf.langevin_step(torch._neg_view(-z), torch._neg_view(-z), noise_key=1)
    assert torch.equal(step, jf.langevin_step(z, z, noise_key=1))
