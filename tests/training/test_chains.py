"""Persistent chains: a buffer that any number of ranks can share, and the law of where chains start."""

import dataclasses

import pytest
import torch

from jlebm_fast.errors import CheckpointError
from jlebm_fast.models import LearningStep
from jlebm_fast.training.chains import PersistentChains

DIMS = (2, 3)


def step(index, first_row=0):
    return LearningStep({}, seed=4, index=index, first_row=first_row)


def run(ranks, steps, batch_size=12, refresh=0.3, depth=3, states=None):
    """Starts of every step and the buffer at the end, both of the whole batch, with the chains spread over `ranks`."""
    n = batch_size // ranks
    buffers = [PersistentChains(depth, batch_size, DIMS, refresh, first=r * n, n=n) for r in range(ranks)]
    if states is not None:
        for buffer in buffers:
            buffer.load(states)
    starts = []
    for i in steps:
        pieces = []
        for r, buffer in enumerate(buffers):
            z0 = buffer.start(step(i, first_row=r * n))
            pieces.append(torch.cat(z0, dim=1))
            buffer.end([z * 0.5 + i for z in z0])
        starts.append(torch.cat(pieces))
    return starts, torch.cat([buffer.states for buffer in buffers], dim=1)


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_ranks_together_are_the_one_process_run(ranks):
    whole, buffer = run(1, range(8))
    parts, parted_buffer = run(ranks, range(8))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(buffer, parted_buffer)


def test_a_buffer_moves_to_another_number_of_ranks():
    whole, end = run(1, range(8))
    _, middle = run(2, range(4))
    later, moved_end = run(3, range(4, 8), states=middle)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], later, strict=True))
    assert torch.equal(end, moved_end)


def test_without_refresh_each_chain_goes_on_where_it_ended():
    chains = PersistentChains(1, 5, DIMS, refresh=0.0)
    z0 = chains.start(step(0))
    chains.end([z + 1 for z in z0])
    again = chains.start(step(1))
    assert all(torch.equal(a + 1, b) for a, b in zip(z0, again, strict=True))


def test_with_full_refresh_chains_start_like_short_runs():
    chains = PersistentChains(4, 5, DIMS, refresh=1.0)
    expected = step(7).prior_start(5, DIMS)
    assert all(torch.equal(a, b) for a, b in zip(chains.start(step(7)), expected, strict=True))


def test_places_are_uniform_and_refreshed_at_their_rate():
    depth, n, refresh = 5, 20_000, 0.05
    chains = PersistentChains(depth, n, (1,), refresh)
    chains.states = torch.arange(depth, dtype=torch.float32).add(100)[:, None, None].expand(depth, n, 1).clone()
    (z0,) = chains.start(step(0))
    counts = torch.stack([(z0[:, 0] == 100 + k).sum() for k in range(depth)]).double()
    fresh = n - float(counts.sum())
    # five standard deviations of the binomial counts
    assert abs(fresh - n * refresh) < 5 * (n * refresh * (1 - refresh)) ** 0.5
    p = (1 - refresh) / depth
    assert float((counts - n * p).abs().max()) < 5 * (n * p * (1 - p)) ** 0.5


def test_first_states_are_standard_normal_and_depend_on_the_key():
    states = PersistentChains(10, 2000, (3,), 0.1, noise_key=1).states
    assert abs(float(states.mean())) < 5 / states.numel() ** 0.5
    assert abs(float(states.var()) - 1) < 5 * (2 / states.numel()) ** 0.5
    assert not torch.equal(states, PersistentChains(10, 2000, (3,), 0.1, noise_key=2).states)


def test_misuse_is_named():
    chains = PersistentChains(2, 4, DIMS, 0.1)
    with pytest.raises(ValueError, match="call start"):
        chains.end([torch.zeros(4, 2), torch.zeros(4, 3)])
    with pytest.raises(CheckpointError, match=r"must be \[2, 4, 5\], got \[3, 4, 5\]"):
        chains.load(torch.zeros(3, 4, 5))


def test_start_leaves_the_buffer_alone():
    chains = PersistentChains(2, 4, DIMS, 0.5)
    before = chains.states.clone()
    for z in chains.start(dataclasses.replace(step(3))):
        z.fill_(9.0)
    assert torch.equal(chains.states, before)
