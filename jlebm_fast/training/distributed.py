"""Several ranks at one run: who they are, what they tell each other, and how they end together.

`torchrun --nproc-per-node=N -m jlebm_fast train …` starts N copies of the command; each reads its place from the
environment. The batch is split by rows; noise has the address of its row, so the ranks together draw what one process
draws. Gradients are averaged by DistributedDataParallel during backward.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import RunError

CPU = torch.device("cpu")
# A rank that says nothing for so long is taken for dead: the others end within a minute of its death.
STEP_TIMEOUT = datetime.timedelta(seconds=45)
# Before the first step ranks read their images, some of them from a slow disk.
START_TIMEOUT = datetime.timedelta(minutes=30)
# Groups are kept after their run. The last reference to one must not go before its threads are idle: its destructor
# waits for them with Python's lock held, which they need to let go of the tensors of the last collective: a deadlock.
LETTING_GO = 0.1  # seconds without that lock, which end the waiting of such threads before anything else ends
_KEPT_GROUPS: list[Any] = []


def rank_and_size() -> tuple[int, int]:
    """This process's rank and their number as the launcher's environment tells them; (0, 1) without a launcher.

    Raises:
        RunError: the environment is only half set.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if size == "1" else "")
    if not (size.isdigit() and rank.isdigit() and int(rank) < int(size)):
        raise RunError(
            f'RANK="{rank}" and WORLD_SIZE="{size}" in the environment are no place among ranks: start with '
            "torchrun --nproc-per-node=N -m jlebm_fast train …, or unset both"
        )
    return int(rank), int(size)


def require_one_process(command: str) -> None:
    """Refuses a command that would run N times, side by side, into the same folder.

    Raises:
        RunError: a launcher started several copies.
    """
    size = rank_and_size()[1]
    if size > 1:
        raise RunError(
            f"jlebm {command} runs in one process, {size} were started: call it without torchrun", shared=True
        )


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a run, and what they do together. Every call below is made by all.

    rank, size   0 … size - 1, and their number; (0, 1) is a run in one process, where nothing is sent
    device       of this rank
    group        the ranks' process group; None in one process
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes and prints."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a whole batch.

        Raises:
            RunError: the batch cannot be split evenly.
        """
        if batch_size % self.size:
            raise RunError(
                f"--batch-size {batch_size} cannot be split over {self.size} ranks: it must be a multiple of that"
            )
        n = batch_size // self.size
        return slice(self.rank * n, (self.rank + 1) * n)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, elementwise, on each of them."""
        if self.size == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values, group=self.group)
        return values / self.size

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The ranks' tensors, of one shape, side by side along `dim` in the order of ranks, on each of them."""
        if self.size == 1:
            return tensor
        pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return torch.cat(pieces, dim=dim)

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks; for rare, small things."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        # the default group, whose patience is longer: ranks read their images at different speeds
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: RunError | None, said: Mapping[str, Any]) -> None:
        """Ends all ranks with the same sentence if one of them met an error, or sees another configuration.

        Args:
            error: what this rank met, or None
            said: name → value of everything that must be equal

        Raises:
            RunError: the first rank's error, or the first difference from rank 0.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        answers = self.everyone((None if error is None else str(error), dict(said)))
        reasons = {rank: reason for rank, (reason, _) in enumerate(answers) if reason is not None}
        if reasons:
            first = min(reasons)
            who = "" if len(set(reasons.values())) == 1 and len(reasons) == self.size else f"rank {first}: "
            raise RunError(who + reasons[first], shared=True) from error
        expected = answers[0][1]
        for rank, (_, value) in enumerate(answers):
            for name in [name for name in expected if value.get(name) != expected[name]]:
                raise RunError(
                    f"rank {rank} sees {name} = {value.get(name)}, rank 0 sees {expected[name]}: start all ranks with "
                    "the same options on the same images",
                    shared=True,
                )

    def reducer(self, parameters: list[nn.Parameter]) -> nn.Module | None:
        """Averages the gradients of `parameters` over ranks: `reducer(loss).backward()`; None in one process."""
        if self.size == 1:
            return None
        # Gradients of the same parameters that another loss leaves behind are not touched: DDP listens only to the
        # backward of what its forward returned.
        return DistributedDataParallel(_Parameters(parameters), process_group=self.group)


class _Parameters(nn.Module):
    """The parameters of one optimiser as a module whose forward hands a loss through.

    Models compute their losses from several nets at once, so that DistributedDataParallel cannot wrap the nets; it
    wraps this and needs no more than the loss to see which gradients it waits for.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_loss = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks of this run, connected; in one process just that one.

    Raises:
        RunError: the other ranks cannot be reached, or one of them ended.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=START_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise RunError(f"rank {rank} cannot join the other {size - 1}: {_first_line(error)}") from error
    _KEPT_GROUPS.append(dist.group.WORLD)
    try:
        group = dist.new_group(backend=backend, timeout=STEP_TIMEOUT)
        _KEPT_GROUPS.append(group)
        yield Ranks(rank, size, device, group)
        time.sleep(LETTING_GO)
    except RuntimeError as error:
        if not _is_broken_link(error):
            raise
        raise RunError(
            f"rank {rank} of {size} lost another rank, which ended or fell silent: {_first_line(error)}; the last "
            "checkpoint is kept, --resume goes on with any number of ranks"
        ) from error
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this rank on its machine, where `device` is a GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def _is_broken_link(error: RuntimeError) -> bool:
    # gloo throws plain RuntimeErrors; the path of its source is what they have in common
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _first_line(error: Exception) -> str:
    """What an error of the network says, without the place in its source and without its advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S+\] *", "", lines[0]).split(". ")[0].rstrip(".")
