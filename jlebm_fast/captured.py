"""Chains whose step goes through autograd, on a GPU: the step captured once in a CUDA graph, then replayed.

    step 0         runs as it is, on the stream of the capture: it initialises what a capture may not (and counts)
    step 1         is captured, which computes nothing, and replayed
    steps 2 …      per step: the noise of this step, its coefficients, one replay

A decoder's forward and backward are a hundred launches; a replay is one. The noise is the contract's own, written by
`langevin_noise` outside the graph, so the result is that of an uncaptured chain. Not yet run on a GPU: tested with a
stand-in for the capture that replays the step's function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .problem import ChainResult, Update

# two steps cost as much captured as not
FEWEST_STEPS = 3
Step = Callable[[Tensor, Update], ChainResult]


class Capture(Protocol):
    """How a step is captured: `first` runs one, `record` captures one and gives what replays it."""

    def first(self, run: Callable[[], None]) -> None: ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]: ...


class CudaCapture:
    """torch.cuda.graph on a stream of its own, which the current stream waits for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def first(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                run()
        except RuntimeError as error:
            raise RuntimeError(
                "the step of this chain cannot be captured in a CUDA graph: its energy or log_likelihood waits for the "
                f"device or allocates on the host ({error}); pass capture=False to run it step by step"
            ) from error
        return graph.replay


def can_capture(z: Tensor, n_steps: int) -> bool:
    """Whether a chain from z is captured: reasons known before the launch."""
    return (
        z.device.type == "cuda"
        and torch.version.hip is None
        and n_steps >= FEWEST_STEPS
        and z.shape[0] > 0
        and not torch.cuda.is_current_stream_capturing()
    )


def captured_chain(
    z: Tensor, step: Step, update: Update, n_steps: int, keep: Callable[[int, ChainResult], None],
    capture: Capture, backend: str,
) -> Tensor:  # fmt: skip
    """The end of a chain of `step`s; `keep(k, result)` is called after each, to copy what it wants."""
    at, coefficients = z.clone(), update.step_coefficients[:1].clone()
    eps = torch.empty((1, *z.shape), dtype=z.dtype, device=z.device)
    standing = update._replace(step_coefficients=coefficients, noise=eps, noise_key=0, first_step=0)
    results: list[ChainResult] = []

    def run() -> None:
        results[:] = [step(at, standing)]

    def advance() -> None:
        at.copy_(results[0].z)

    replay: Callable[[], None] | None = None
    for k in range(n_steps):
        coefficients.copy_(update.step_coefficients[k : k + 1])
        eps.copy_(_noise_of(update, k, z, backend))
        if k == 0:
            capture.first(run)
        else:
            if replay is None:
                replay = capture.record(run)
            replay()
        keep(k, results[0])
        advance()
    return at


def _noise_of(update: Update, k: int, z: Tensor, backend: str) -> Tensor:
    if update.noise is not None:
        return update.noise[k : k + 1]
    return ops.langevin_noise(
        update.noise_key,
        1,
        *z.shape,
        first_step=(update.first_step + k) % (1 << 32),
        first_chain=update.first_chain,
        device=z.device,
        dtype=z.dtype,
        backend=backend,
    )


def capture_of(z: Tensor, n_steps: int, wanted: bool) -> Capture | None:
    """The capture for a chain from z, or None where it runs step by step."""
    return CudaCapture(z.device) if wanted and can_capture(z, n_steps) else None
