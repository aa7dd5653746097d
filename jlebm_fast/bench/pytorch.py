"""`python -m jlebm_fast.bench.pytorch`: what the package costs and saves around its kernels, inside PyTorch.

    posterior   the published posterior loop of LEBM on SVHN: four transposed convolutions, 20 steps, batch 100
    energy      EnergyMLP.forward, alone and with backward, beside the same formula in plain torch
    overhead    one call of an operation on a tiny problem, less the time of its native call
    sample      FastLangevin.sample of one step and two chains: all that is not the chain

Contenders take turns, call by call, and the ratio is the median over the turns, so that a slow moment of a shared
machine meets both. What is timed is compared first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jlebm_fast import FastLangevin, ops, registration, rng
from jlebm_fast.backends import _native, cpu, eager, native_fields
from jlebm_fast.bench import machine, report
from jlebm_fast.bench.cases import CASES, LEBM, mlp_of
from jlebm_fast.bench.sections import energy_of, sampler_of
from jlebm_fast.errors import RunError
from jlebm_fast.problem import MLP, MLPSpec, Update

POSTERIOR_STEPS, POSTERIOR_STEP_SIZE, SIGMA = 20, 0.1, 0.3
_NOISE_KEY = 20201206


def in_turns(contenders: dict[str, Callable[[], object]], turns: int) -> dict[str, object]:
    """Median and least seconds of each, and how many times faster the second is than the first, turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(turns):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    first, second = times.values()
    return {
        "seconds": {name: {"median": statistics.median(t), "least": min(t)} for name, t in times.items()},
        "times_faster": statistics.median(a / b for a, b in zip(first, second, strict=True)),
        "times_faster_least": min(first) / min(second),
        "turns": turns,
    }


# --- posterior --------------------------------------------------------------------------------------------------------


def svhn_decoder(z_dim: int = 100, width: int = 64) -> nn.Sequential:
    """The generator that LEBM learns on SVHN: 1 x 1 -> 4 x 4 -> 8 x 8 -> 16 x 16 -> 32 x 32."""
    return nn.Sequential(
        nn.ConvTranspose2d(z_dim, 8 * width, 4, 1, 0),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(8 * width, 4 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(2 * width, 3, 4, 2, 1),
        nn.Tanh(),
    )


def posterior_loop(z: Tensor, images: Tensor, decoder: nn.Module, energy: nn.Module, noise: Tensor | None) -> Tensor:
    """The posterior chain step by step, two gradients by autograd and an update of small operations."""
    s = POSTERIOR_STEP_SIZE
    z = z.clone().requires_grad_(True)
    for k in range(POSTERIOR_STEPS):
        squares = ((decoder(z[..., None, None]) - images) ** 2).sum() / (2 * SIGMA**2)
        (of_decoder,) = torch.autograd.grad(squares, z)
        (of_energy,) = torch.autograd.grad(energy(z).sum(), z)
        z.data = z.data - 0.5 * s * s * (of_decoder + of_energy + z.data)
        z.data += s * (torch.randn_like(z) if noise is None else noise[k])
    return z.detach()


def posterior(turns: int, chains: int = LEBM.batch, width: int = 64) -> dict[str, object]:
    """The published loop beside FastLangevin with the same decoder and energy."""
    torch.manual_seed(0)
    decoder, network = svhn_decoder(width=width), LEBM.network()
    z, images = torch.randn(chains, 100), torch.rand(chains, 3, 32, 32) * 2 - 1
    sampler = FastLangevin(network, n_steps=POSTERIOR_STEPS, step_size=POSTERIOR_STEP_SIZE, maximize=False)

    def log_likelihood(z: Tensor) -> Tensor:
        return -((decoder(z[..., None, None]) - images) ** 2).sum() / (2 * SIGMA**2)

    noise = ops.langevin_noise(_NOISE_KEY, POSTERIOR_STEPS, chains, 100)
    deviation = float(
        (
            posterior_loop(z, images, decoder, network, noise)
            - sampler(z, noise_key=_NOISE_KEY, log_likelihood=log_likelihood)
        )
        .abs()
        .max()
    )
    if not deviation <= 1e-3:
        raise RuntimeError(f"the two posterior chains differ by {deviation:.2g}; nothing is timed")
    contenders = {
        "published loop": functools.partial(posterior_loop, z, images, decoder, network, None),
        "FastLangevin": functools.partial(sampler, z, log_likelihood=log_likelihood),
    }
    return {"chains": chains, "n_steps": POSTERIOR_STEPS, "deviation": deviation} | in_turns(contenders, turns)


# --- energy -----------------------------------------------------------------------------------------------------------


def energy(name: str, rows: int, what: str, turns: int) -> dict[str, object]:
    """f(z) beside the composite formula: "forward" alone, or with the gradient in "parameters" or in "z"."""
    case = CASES[name]
    f = energy_of(case, case.network(), False)
    z = torch.cat(case.initial(rows), dim=1)
    if what == "z":
        f.requires_grad_(False)
        z.requires_grad_()
    leaves = [z] if what == "z" else list(f.parameters())

    def composite(z: Tensor) -> Tensor:
        return eager.mlp_forward(z, f.mlp(z))[0]

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        if what == "forward":
            with torch.no_grad():
                return (function(z),)
        return torch.autograd.grad(function(z).mean(), leaves)

    for ours, plain in zip(run(f), run(composite), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    contenders = {"composite": functools.partial(run, composite), "EnergyMLP": functools.partial(run, f)}
    return {"case": name, "rows": rows, "what": what} | in_turns(contenders, turns)


# --- overhead ---------------------------------------------------------------------------------------------------------


def least_microseconds(run: Callable[[], object], bursts: int = 300, calls: int = 50) -> float:
    """The quickest of many short bursts: what a call costs where nobody disturbs it."""
    best = float("inf")
    for _ in range(bursts):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def microseconds_in_turns(runs: dict[str, Callable[[], object]], bursts: int = 300, calls: int = 50) -> dict:
    """Of each the quickest and the median burst, microseconds per call; the bursts take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(bursts):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append(1e6 * (time.perf_counter() - start) / calls)
    return {name: {"least": min(t), "median": statistics.median(t)} for name, t in times.items()}


def empty_operator(name: str, results: object) -> Callable[..., object]:
    """An operator of torch.library with the schema of ours that does nothing: what the mechanism alone costs."""
    library = torch.library.Library("jlebm_fast_bench", "FRAGMENT")  # its operators live as long as it does
    library.define(name + registration.SCHEMAS[name])
    library.impl(name, lambda *arguments: results, "CPU")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    operator = getattr(torch.ops.jlebm_fast_bench, name).default
    return lambda *arguments, _library=library: operator(*arguments)


def overhead() -> list[dict[str, object]]:
    """One chain of four dimensions: microseconds beyond the native call, by ops.py and by the registered operator.

    Beside them what tells a quick machine from a slow one: the empty operator with the same arguments, and torch.add.
    """
    spec = MLPSpec((4, 4, 1), ("leaky_relu",), (0.2,))
    mlp = MLP(spec, (torch.ones(4, 4), torch.ones(1, 4)), (torch.ones(4), torch.ones(1)))
    z, update = torch.ones(1, 4), Update(torch.ones(1, 3), prior_precision=torch.ones(4), noise_key=1)
    native, out, value = _native.load(), torch.empty(1, 4), torch.empty(1)
    address = native_fields.Addresses()
    fields, update_fields = native_fields.mlp_fields(mlp, address), native_fields.update_fields(update, address)
    spread_mlp, spread_update = registration.spread_mlp(mlp), registration.spread_update(update)
    at, to = z.data_ptr(), out.data_ptr()
    place = {"noise_key": 1, "first_step": 0, "first_chain": 0, "stream": 0, "n_steps": 1, "chains": 1, "dim": 4}
    # the native call by addresses, the function, what the operator takes, what it gives
    rows = {
        "langevin_noise": (
            lambda: native.cpu_langevin_noise(**place, out=to, n_threads=1),
            lambda: ops.langevin_noise(1, 1, 1, 4),
            (rng.key_tensor(1), 1, 1, 4, 0, 0, 0, z.device, z.dtype, "auto"),
            out[None],
        ),
        "langevin_step": (
            lambda: native.cpu_langevin_step(chains=1, dim=4, z=at, grad=at, update=update_fields, out=to, n_threads=1),
            lambda: ops.langevin_step(z, z, update),
            (z, z, *spread_update, "auto"),
            out,
        ),
        "mlp_energy_grad": (
            lambda: native.cpu_mlp_energy_grad(
                chains=1, z=at, mlp=fields, energy=value.data_ptr(), grad=to, n_threads=1
            ),
            lambda: ops.mlp_energy_grad(z, mlp),
            (z, *spread_mlp, "auto", None),
            (value, out),
        ),
        "mlp_langevin_chain": (
            lambda: native.cpu_mlp_langevin_chain(
                chains=1,
                n_steps=1,
                z=at,
                mlp=fields,
                update=update_fields,
                record=(1, 0, 0, 0, 0, 0),
                out=to,
                n_threads=1,
            ),
            lambda: ops.mlp_langevin_chain(z, mlp, update, 1),
            (z, *spread_mlp, *spread_update, 1, False, False, 1, "auto", None),
            [out],
        ),
    }
    found = []
    with torch.no_grad():
        for name, (kernel, function, arguments, results) in rows.items():
            runs = {
                "native_call": kernel,
                "function": function,
                "operator": functools.partial(getattr(registration.operators, name).default, *arguments),
                "empty_operator": functools.partial(empty_operator(name, results), *arguments),
                "torch_add": functools.partial(torch.add, z, z),
            }
            us = microseconds_in_turns(runs)
            row: dict[str, object] = {"op": name}
            for kind in ("least", "median"):
                at_rest = us["native_call"][kind]
                row[kind] = {
                    "native_call_us": at_rest,
                    "ops_overhead_us": us["function"][kind] - at_rest,
                    "operator_overhead_us": us["operator"][kind] - at_rest,
                    "empty_operator_us": us["empty_operator"][kind],
                    "torch_add_us": us["torch_add"][kind],
                }
            found.append(row)
    return found


def sample() -> list[dict[str, object]]:
    """Microseconds of sample() with one step and two chains."""
    found = []
    for name, norm in (("HS", False), ("HS", True), ("FID", False), ("LEBM", False)):
        case = CASES[name]
        sampler = dataclasses.replace(sampler_of(case, case.network(), "cpu", norm), n_steps=1)
        call_us = least_microseconds(functools.partial(sampler, case.initial(2)), calls=20)
        mlp = mlp_of(case.network(), case.spec)
        z, update = torch.zeros(2, case.dim), Update(torch.ones(1, 3), prior_precision=torch.ones(case.dim))
        op_us = least_microseconds(lambda: cpu.mlp_langevin_chain(z, mlp, update, 1, ops.NOTHING), calls=20)  # noqa: B023
        found.append({"case": name, "spectral_norm": norm, "sample_us": call_us, "backend_call_us": op_us})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the kernels")
    parser.add_argument("--only", nargs="+", choices=("posterior", "energy", "overhead", "sample"))
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    if options.out:
        try:
            report.require_writable(options.out)
        except RunError as error:
            parser.error(str(error))
    torch.set_num_threads(options.threads)
    wanted = options.only or ("overhead", "sample", "energy", "posterior")
    result: dict[str, object] = {"machine": machine.describe(), "threads": options.threads, "load": os.getloadavg()}
    if "overhead" in wanted:
        result["overhead"] = overhead()
    if "sample" in wanted:
        result["sample"] = sample()
    if "energy" in wanted:
        result["energy"] = [
            energy(name, rows, what, 200 if rows == 100 else 9)
            for name in ("HS", "FID", "LEBM")
            for rows in (100, 10_000)
            for what in ("forward", "parameters", "z")
        ]
    if "posterior" in wanted:
        result["posterior"] = posterior(turns=3)
    result["load_after"] = os.getloadavg()
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
