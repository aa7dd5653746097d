"""What other threads do meanwhile: draw from global generators, train the very module that is sampled."""

from __future__ import annotations

import contextlib
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from jlebm_fast import FastLangevin


@contextlib.contextmanager
def meanwhile(work):
    """`work()` over and over in another thread."""
    over, begun = threading.Event(), threading.Event()

    def run():
        while not over.is_set():
            work()
            begun.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def network():
    return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 1))


class WithGaussian(nn.Module):  # its own forward runs for its parameters
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, z):
        return self.net(z) - 0.5 * z.square().sum(1, keepdim=True)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "numpy"])
def test_an_examination_leaves_the_draws_of_another_thread_alone(draw):
    drawn = []
    with meanwhile(lambda: drawn.append(draw())):
        for _ in range(3):
            assert "16 -> " not in (said := FastLangevin(network()).explain(torch.randn(9, 6)))
            assert "not recognised" not in said
    assert len(set(drawn)) == len(drawn)  # 53 bits each: none was given out twice


@pytest.mark.parametrize("energy", [network, WithGaussian], ids=["where they stand", "by a run"])
def test_a_module_that_another_thread_trains_stays_recognised(energy):
    net = energy()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def train():
        optimizer.zero_grad()
        net(torch.randn(9, 6)).sum().backward()
        optimizer.step()

    sampler = FastLangevin(net, n_steps=20)
    with meanwhile(train):
        for chains in range(40, 80):  # every number is compared anew
            assert torch.isfinite(sampler(torch.randn(chains, 6))).all()
    assert "not recognised" not in sampler.explain(torch.randn(40, 6))


def test_a_chain_is_of_one_moment_whatever_happens_to_its_biases():
    net = network()
    sampler = FastLangevin(net, n_steps=20_000, step_size=0.1)
    z = torch.randn(40, 6)
    expected = sampler(z, noise_key=3)
    begun = threading.Event()

    def disturb():
        begun.wait()
        with torch.no_grad():
            for _ in range(2000):
                for layer in (net[0], net[2], net[4]):
                    layer.bias.add_(1.0)

    thread = threading.Thread(target=disturb)
    thread.start()
    threading.Timer(0.005, begun.set).start()  # amid a chain of a tenth of a second
    got = sampler(z, noise_key=3)
    thread.join()
    assert torch.equal(got, expected)
