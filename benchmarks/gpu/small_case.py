"""A small chain of every precision and both regimes: what compute-sanitizer looks at."""

from __future__ import annotations

import sys

import torch
from contenders import kernels_of

from jlebm_fast import precision
from jlebm_fast.bench.cases import CASES, mlp_of
from jlebm_fast.problem import Record, Update


def main() -> int:
    dry_run = "--dry-run" in sys.argv
    device = torch.device("cpu" if dry_run else "cuda")
    kernels = kernels_of(dry_run)
    # WIDE is streamed; without a chip it would take minutes, and the tests of the host build cover it
    for case in (CASES["HS"],) if dry_run else (CASES["HS"], CASES["WIDE"]):
        network = case.network().to(device)
        z = torch.cat(case.initial(9), dim=1).to(device)
        rows = torch.tensor([[0.08, 0.08, 0.4]] * 2, device=device)
        update = Update(rows, prior_precision=torch.ones(case.dim, device=device), noise_key=5)
        for name in precision.NAMES:
            with precision.using(name):
                end = kernels.mlp_langevin_chain(z, mlp_of(network, case.spec), update, 2, Record(True, True)).z
            assert torch.isfinite(end).all()
            print(case.name, name, float(end.norm()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
