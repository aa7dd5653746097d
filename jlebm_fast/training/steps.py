"""A learning step of a run: LearningStep with ranks, persistent chains, clipping and a guard against divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jlebm_fast.models import LearningStep, NonFiniteLoss

from .chains import PersistentChains
from .distributed import Ranks


@dataclasses.dataclass
class TrainingStep(LearningStep):
    """What `model.update(batch, step)` meets in a run.

    ranks       this process's place among those that share the batch
    reducers    optimiser's name → the module that averages its gradients over ranks; empty in one process
    replay      persistent prior chains, or None for chains that start at N(0, I)
    clip_norm   largest norm of an optimiser's gradient, longer ones are scaled to it; 0 leaves them as they are
    """

    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    reducers: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    replay: PersistentChains | None = None
    clip_norm: float = 0.0
    _chains: dict[str, Callable[[dict[str, Any]], Any]] = dataclasses.field(default_factory=dict)

    def prior_start(self, n: int, dims: tuple[int, ...], device: torch.device | str = "cpu") -> list[Tensor]:
        if self.replay is None:
            return super().prior_start(n, dims, device)
        return self.replay.start(self)

    def prior_end(self, zs: list[Tensor]) -> None:
        if self.replay is not None:
            self.replay.end(zs)

    def run_chain(self, purpose: str, chain: Callable[[dict[str, Any]], Any]) -> Any:
        self._chains[purpose] = chain
        return super().run_chain(purpose, chain)

    def gather(self, rows: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.ranks.gather(rows), self.ranks.gather(z)

    def descend(self, name: str, loss: Tensor, description: str) -> None:
        value = self.ranks.mean(loss.detach()).item()
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteLoss(self._first_said(f"{description} is {loss.item()}", not torch.isfinite(loss).item()))
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        reducer = self.reducers.get(name)
        (loss if reducer is None else reducer(loss)).backward()
        parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if not torch.isfinite(norm):  # averaged over ranks, so they all see it
            raise NonFiniteLoss(self._first_said(f"the gradient of {description} has norm {norm.item()}", True))
        if self.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        optimiser.step()

    def _first_said(self, reason: str, mine: bool) -> str:
        """The reason of the first rank that has one, with the chain that left the finite numbers, if one did."""
        said = self.ranks.everyone(reason + self._bad_chain() if mine else None)
        rank, first = next((rank, words) for rank, words in enumerate(said) if words is not None)
        return first if self.ranks.size == 1 else f"{first} on rank {rank}"

    def _bad_chain(self) -> str:
        """Which Langevin step of which chain was the first to leave the finite numbers: the chains run once more."""
        for purpose, chain in self._chains.items():
            # the same noise on the same parameters: these very chains again
            _, info = chain(self.chain_noise(purpose) | {"return_info": True})
            bad = info.first_bad_step[info.first_bad_step >= 0]
            if len(bad):
                return (
                    f", because the {purpose} left the finite numbers at Langevin step {int(bad.min()) + 1} of "
                    f"{len(info.energy)} ({len(bad)} of {len(info.first_bad_step)} chains did)"
                )
        return ""
