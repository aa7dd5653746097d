"""EnergyMLP's forward and backward on the GPU beside the same formula in plain torch: what a training step pays for f.

python benchmarks/gpu/energy.py TARGET.json [--dry-run]
"""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from timing import measure

from jlebm_fast.backends import eager
from jlebm_fast.bench.cases import CASES
from jlebm_fast.bench.sections import energy_of

# relative, of gradients in float32 against the plain formula in float32
ALLOWED = 1e-3


def measured(name: str, chains: int, what: str, device: torch.device) -> dict:
    """Milliseconds of f(z) and its gradient in "parameters" or "z", ours and plain."""
    case = CASES[name]
    f = energy_of(case, case.network(), False).to(device)
    z = torch.randn(chains, case.dim, device=device)
    if what == "z":
        f.requires_grad_(False)
        z.requires_grad_()
    leaves = [z] if what == "z" else list(f.parameters())

    def run(plain: bool) -> tuple[torch.Tensor, ...]:
        value = eager.mlp_forward(z, f.mlp(z))[0] if plain else f(z)
        return torch.autograd.grad(value.mean(), leaves)

    entry: dict = {"case": name, "chains": chains, "what": what}
    for ours, theirs in zip(run(False), run(True), strict=True):
        if float((ours - theirs).norm()) > ALLOWED * float(theirs.norm()) + 1e-7:
            return {**entry, "skipped": "the two gradients differ"}
    entry["fused"] = measure(lambda: run(False), device)
    entry["plain"] = measure(lambda: run(True), device)
    times = {kind: entry[kind]["median_ms"] for kind in ("fused", "plain")}
    print(f"{name:5}{chains:>8} gradient in {what:10} fused {times['fused']:.3f} ms, plain {times['plain']:.3f} ms")
    return entry


def main() -> int:
    dry_run = "--dry-run" in sys.argv
    device = torch.device("cpu" if dry_run else "cuda")
    torch.set_float32_matmul_precision("highest")
    numbers = (8,) if dry_run else (100, 10_000, 1_000_000)
    found = [
        measured(name, chains, what, device)
        for name in ("HS", "LEBM")
        for chains in numbers
        for what in ("parameters", "z")
    ]
    pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
    return 0 if not any("skipped" in entry for entry in found) else 1


if __name__ == "__main__":
    sys.exit(main())
