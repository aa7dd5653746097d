"""What a model meets in one learning step: the batch, the optimisers, and randomness with an address."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jlebm_fast.functional import langevin_noise
from jlebm_fast.rng import INITIAL_Z


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite; the step that met it changed no parameter."""


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """Adam's learning rates at the start, of generator and encoder and of the energy, and the energy's weight decay.

    The decay is decoupled: each step multiplies the energy's parameters by 1 - energy * energy_weight_decay.
    """

    autoencoder: float
    energy: float
    energy_weight_decay: float = 0.0


class Batch(NamedTuple):
    """Images to learn from in one step.

    images         [n, channels, size, size] float32 in [-1, 1]
    rows           [n] int64 on the CPU: their places in the training set
    training_set   uint8 [N, channels, size, size]: all training images, for the steps that need every one (the
                   Gaussian mixture of RAE); None where a caller has only the batch
    """

    images: Tensor
    rows: Tensor
    training_set: Tensor | None = None


@dataclasses.dataclass
class LearningStep:
    """One learning step as a model sees it: the loop makes it, `model.update(batch, step)` uses it.

    Its randomness is no stream but a function of (seed, index, purpose, row): a resumed run needs no generator state,
    and ranks that share a batch draw exactly the rows of the one-process run.

    optimisers     by the names that `model.optimisers` gave them
    seed, index    of the run, and the number of the step, counted over all stages
    stage          which of `model.stages(…)` this step belongs to
    first_row      place of this rank's first image in the whole batch
    """

    optimisers: Mapping[str, torch.optim.Optimizer]
    seed: int = 0
    index: int = 0
    stage: int = 0
    first_row: int = 0

    def noise_key(self, purpose: str) -> int:
        """The 64 bits that name the noise of this step for one purpose."""
        digest = hashlib.blake2b(f"{self.seed}/{self.index}/{purpose}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def normal(self, purpose: str, n: int, dims: Sequence[int], device: torch.device | str = "cpu") -> list[Tensor]:
        """Standard normals for the n rows of this rank: one [n, d] per entry of `dims`."""
        return self._normal(purpose, n, dims, device, self.first_row)

    def normal_of_every_rank(
        self, purpose: str, n: int, dims: Sequence[int], device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """The same for n rows that are not shared out among the ranks: each has the same."""
        return self._normal(purpose, n, dims, device, 0)

    def _normal(
        self, purpose: str, n: int, dims: Sequence[int], device: torch.device | str, first_row: int
    ) -> list[Tensor]:
        noise = langevin_noise(
            self.noise_key(purpose), 1, n, sum(dims), first_chain=first_row, stream=INITIAL_Z, device=device
        )
        return list(noise[0].split(tuple(dims), dim=1))

    def chain_noise(self, purpose: str) -> dict[str, Any]:
        """Keyword arguments of `FastLangevin.sample` that address the noise of a chain of this step."""
        return {"noise_key": self.noise_key(purpose), "first_chain": self.first_row}

    def run_chain(self, purpose: str, chain: Callable[[dict[str, Any]], Any]) -> Any:
        """`chain(noise)`, a chain of this step under the noise of its purpose; what it returns.

        A run keeps `chain` until the step is over: should the loss turn out not to be finite, the chain is run once
        more with `return_info` among its keyword arguments, to name the Langevin step that went wrong.
        """
        return chain(self.chain_noise(purpose))

    def prior_start(self, n: int, dims: Sequence[int], device: torch.device | str = "cpu") -> list[Tensor]:
        """Where the n prior chains of this step start: N(0, I), the short-run chains of the paper."""
        return self.normal("prior start", n, dims, device)

    def prior_end(self, zs: list[Tensor]) -> None:
        """Hears where the prior chains ended; short-run chains forget it."""

    def gather(self, rows: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' (rows, z), for what models remember per training example; one process has its own only."""
        return rows, z

    def descend(self, name: str, loss: Tensor, description: str) -> None:
        """One step of the optimiser `name` down `loss`; gradients of earlier losses are dropped first.

        Raises:
            NonFiniteLoss: `loss` is NaN or infinite; nothing was changed.
        """
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteLoss(f"{description} is {value}")
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
