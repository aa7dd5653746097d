"""Chains whose step goes through autograd, on a GPU: the step captured once in a CUDA graph, then replayed.

    step 0         runs as it is, on the stream of the capture: it initialises what a capture may not (and counts)
    step 1         is captured, which computes nothing, and replayed
    steps 2 …      per step: the noise of this step, its coefficients, one replay

A decoder's forward and backward are a hundred launches; a replay is one. The noise is the contract's own, written by
`langevin_noise` outside the graph, so the result is that of an uncaptured chain. Each thread keeps, for each of its
streams, the last graph and the memory of its step, about one forward and backward: the next chain is captured into the
same memory. Not yet run on a GPU: tested with a stand-in for the capture that replays the step's function.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
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
    """CUDA graphs captured on a stream of their own, one after the other into one pool of memory.

    Not `torch.cuda.graph`: that waits for the device and empties torch's cache before each capture, and leaves its
    stream current where one fails.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None  # keeps the pool's memory for the next one

    def first(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, ended = torch.cuda.CUDAGraph(), False
        try:
            with torch.cuda.stream(self._stream), _no_garbage_collection():
                # other threads may go on calling CUDA meanwhile: one that loads data, one that watches NCCL
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
                    ended = True
        except BaseException as error:
            if not ended:
                self._forget_broken_capture(graph)
            # the pool's memory goes with its last graph, and its name cannot be used again then
            self._graph, self._pool = None, torch.cuda.graph_pool_handle()
            if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                "the step of this chain cannot be captured in a CUDA graph: its energy or log_likelihood waits for the "
                f"device or allocates on the host ({error}); pass capture=False to run it step by step"
            ) from error
        self._graph = graph
        return graph.replay

    def _forget_broken_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that CUDA broke off: torch's generator and allocators would go on believing in it."""
        _BROKEN.append(graph)
        with contextlib.suppress(RuntimeError):  # nothing to end where it never began
            end = getattr(torch._C, "_cuda_endAllocateToPool", None)
            end = end or torch._C._cuda_endAllocateCurrentStreamToPool  # the same, as torch 2.6 names it
            end(self._device.index, self._pool)
        # The end of a capture that succeeds tells the generator that none is under way. Its offset was never touched;
        # graphs of the user's that draw from it go on as before, to which a copy of its state would be another one.
        written = torch.empty(1, device=self._device)
        sound = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), contextlib.suppress(RuntimeError):
            sound.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            written.zero_()
            sound.capture_end()


# torch's allocator of pinned memory keeps the address of a graph whose capture was broken off, and cannot be told
_BROKEN: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What the collector frees, another graph for instance, may call what a capture forbids."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _OfThread(threading.local):
    """The captures of a thread: its chains follow each other on each stream, so they can share memory."""

    def __init__(self) -> None:
        self.captures: dict[tuple[int, int], CudaCapture] = {}

    def on(self, device: torch.device) -> CudaCapture:
        stream = torch.cuda.current_stream(device)
        key = (stream.device.index, stream.cuda_stream)
        if key not in self.captures:
            self.captures[key] = CudaCapture(stream.device)
        return self.captures[key]


_OF_THREAD = _OfThread()


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
            if z.is_cuda:  # made on the capture's stream, read on this one, and let go before it may have read it
                for made in results[0]:
                    if made is not None:
                        made.record_stream(torch.cuda.current_stream(z.device))
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
    return _OF_THREAD.on(z.device) if wanted and can_capture(z, n_steps) else None
