"""Persistent prior chains: a replay buffer on the device, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jlebm_fast.functional import langevin_noise
from jlebm_fast.models import LearningStep
from jlebm_fast.rng import INITIAL_Z

from ..errors import CheckpointError


class PersistentChains:
    """A replay buffer of prior chains: each learning step goes on from earlier ends instead of from N(0, I).

        z0_j = buffer[k_j, j] with k_j uniform,  or N(0, I) with probability refresh;    buffer[k_j, j] ← end of chain j

    Chain j of a batch has its own `depth` places, so a rank that runs the chains first … first + n of the batch holds
    just their places and nothing is sent between ranks. The draws k_j are those of the whole batch, so the union of
    the ranks' chains is the one-process run, bit for bit.

    Args:
        depth: batches of chains that the buffer holds; 1 is one persistent chain per place in the batch
        batch_size: chains of a whole batch, of all ranks together
        dims: widths of the latent layers
        refresh: probability that a chain starts anew from N(0, I)
        noise_key: 64 bits that name the noise of the first states, N(0, I)
        first, n: the chains of the batch that this rank runs; by default all
        device: where the buffer lies

    Example:
        >>> chains = PersistentChains(10, 4, (2, 3), 0.05)
        >>> z0 = chains.start(LearningStep({}, seed=0, index=0))
        >>> chains.end([z + 1 for z in z0])
        >>> tuple(chains.states.shape)
        (10, 4, 5)

    Source: Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient", ICML
    2008; Du and Mordatch, "Implicit generation and modeling with energy-based models", NeurIPS 2019, section 3.2.
    """

    def __init__(
        self,
        depth: int,
        batch_size: int,
        dims: Sequence[int],
        refresh: float,
        *,
        noise_key: int = 0,
        first: int = 0,
        n: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.depth, self.batch_size, self.dims, self.refresh = depth, batch_size, tuple(dims), refresh
        self.first, self.n = first, batch_size if n is None else n
        whole = langevin_noise(noise_key, 1, depth * batch_size, sum(self.dims), stream=INITIAL_Z, device=device)
        self.states = self._mine(whole[0].view(depth, batch_size, -1))
        self._places: Tensor | None = None

    def start(self, step: LearningStep) -> list[Tensor]:
        """Where this rank's chains of a learning step start: one [n, d] per layer."""
        device = self.states.device
        # Small, and the same on every rank: drawn for the whole batch on the CPU, whose stream no device changes.
        generator = torch.Generator().manual_seed(step.noise_key("replay") % 2**63)
        places = torch.randint(self.depth, (self.batch_size,), generator=generator)
        anew = torch.rand(self.batch_size, generator=generator) < self.refresh
        mine = slice(self.first, self.first + self.n)
        self._places = places[mine].to(device)
        z = self.states[self._places, torch.arange(self.n, device=device)]
        fresh = torch.cat(step.normal("prior start", self.n, self.dims, device), dim=1)
        z = torch.where(anew[mine].to(device)[:, None], fresh, z)
        return list(z.split(self.dims, dim=1))

    def end(self, zs: Sequence[Tensor]) -> None:
        """Puts the ends of the chains that `start` gave into their places."""
        if self._places is None:
            raise ValueError("end() of chains that were not started: call start() first")
        z = torch.cat([layer.detach() for layer in zs], dim=1)
        self.states[self._places, torch.arange(self.n, device=z.device)] = z
        self._places = None

    def load(self, whole: Tensor) -> None:
        """Takes this rank's part of a whole buffer [depth, batch_size, dim], written by any number of ranks.

        Raises:
            CheckpointError: it is the buffer of another run.
        """
        expected = (self.depth, self.batch_size, sum(self.dims))
        if tuple(whole.shape) != expected:
            raise CheckpointError(f"the replay buffer must be {list(expected)}, got {list(whole.shape)}")
        self.states = self._mine(whole.to(self.states))

    def _mine(self, whole: Tensor) -> Tensor:
        return whole[:, self.first : self.first + self.n].clone()
