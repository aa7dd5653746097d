"""What is timed: our backends in each precision, and what people run today, on the same weights and device.

    cuda fp32, tf32, bf16   FastLangevin.sample, Python and launch included      (graph)   the same call, replayed by a
    cuda bf16 warpgroup     the same in a regime that is not used unless asked for; cuda fp32 cluster, bf16 cluster too
    triton fp32, bf16       the same through Triton, where it is there                     CUDA graph
    cuda fp32 spectral      the same with a spectral norm, converged once a call
    eager                   the loop of the published codes, one latent layer after the other
    eager spectral          the same with a power iteration in every step, as published
    eager graph             the plain loop as one CUDA graph
    compiled graph          one step by torch.compile with CUDA graphs ("reduce-overhead")

A maker returns a function without arguments that enqueues one whole chain.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jlebm_fast import FastLangevin, backends
from jlebm_fast.backends.cuda_tried import trying
from jlebm_fast.bench import rivals
from jlebm_fast.bench.cases import Case
from jlebm_fast.bench.sections import energy_of

Run = Callable[[], object]


def kernels_of(dry_run: bool):
    """The operations of the CUDA backend: on the GPU, or its host build."""
    if not dry_run:
        return backends.load("cuda")
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "cuda"))
    from host_build import on_host

    return on_host()


def ours(case: Case, network: nn.Sequential, z: Tensor, backend: str, precision: str, norm: str = "") -> Run:
    energy = energy_of(case, network.cpu(), norm == "spectral").to(z.device)
    network.to(z.device)
    sampler = FastLangevin(energy, n_steps=case.n_steps, step_size=case.step_size, backend=backend, precision=precision)
    return lambda: sampler.sample(z)


def ours_trying(case: Case, network: nn.Sequential, z: Tensor, backend: str, precision: str, regime: str) -> Run:
    chain = ours(case, network, z, backend, precision)

    def run() -> object:
        with trying(regime):
            return chain()

    return run


def ours_replayed(case: Case, network: nn.Sequential, z: Tensor, precision: str) -> Run:
    """The call in a CUDA graph: the key stands on the device and is advanced there, each replay draws fresh noise."""
    energy = energy_of(case, network.cpu(), False).to(z.device)
    network.to(z.device)
    sampler = FastLangevin(energy, n_steps=case.n_steps, step_size=case.step_size, backend="cuda", precision=precision)
    key = torch.tensor([1], dtype=torch.int64, device=z.device)

    def chain() -> None:
        sampler.sample(z, noise_key=key)
        backends.load("cuda").advance_noise_key(key)

    return replayed(chain)


def replayed(chain: Run) -> Run:
    """`chain` captured after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()

    def replay(_held: Run = chain) -> None:
        # a graph holds addresses, not tensors: the chain's weights, starts and key live as long as its replays
        graph.replay()

    return replay


def eager(case: Case, network: nn.Sequential, z: Tensor) -> Run:
    run, layers = rivals.eager(case, network), list(z.split(case.latent_dims, dim=1))
    return lambda: run(layers)


def eager_spectral(case: Case, network: nn.Sequential, z: Tensor) -> Run:
    run, layers = rivals.eager_spectral(case, network.cpu()), list(z.split(case.latent_dims, dim=1))
    # the published loop normalises on the device of its net: rivals builds it on the CPU, where its test input is
    for cell in run.__closure__ or ():
        if isinstance(cell.cell_contents, nn.Module):
            cell.cell_contents.to(z.device)
    network.to(z.device)
    return lambda: run(layers)


def eager_graph(case: Case, network: nn.Sequential, z: Tensor) -> Run:
    return replayed(eager(case, network, z))


def compiled_graph(case: Case, network: nn.Sequential, z: Tensor) -> Run:
    """One step, gradient, noise and update, in one CUDA graph made by torch.compile; the steps are a Python loop."""
    s = case.step_size
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def energy(at: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (at,)).sum()

    @torch.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if z.is_cuda else "default")
    def step(at: Tensor) -> Tensor:
        drift = torch.func.grad(energy)(at) - at
        return at + 0.5 * s * s * drift + s * torch.randn_like(at)

    def chain() -> Tensor:
        at = z
        with torch.no_grad():
            for _ in range(case.n_steps):
                if z.is_cuda:
                    torch.compiler.cudagraph_mark_step_begin()
                    at = at.clone()  # the graph's output memory is written again by the next replay
                at = step(at)
        return at

    return chain
