"""What a card reaches with torch's kernels on random numbers: a large bf16 and fp32 matrix product, a large copy."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import torch
from timing import measure

from jlebm_fast.bench import machine


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown (no nvidia-smi)"
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def main() -> int:
    target, dry_run = pathlib.Path(sys.argv[1]), "--dry-run" in sys.argv
    device = torch.device("cpu" if dry_run else "cuda")
    n, n_copied = (256, 1 << 20) if dry_run else (8192, 1 << 30)
    found: dict[str, object] = {
        "device": "no GPU (rehearsal)" if dry_run else torch.cuda.get_device_name(0),
        "driver": "none" if dry_run else driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    torch.set_float32_matmul_precision("highest")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        timing = measure(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        found[f"{name}_tflops"] = 2 * n**3 / timing["median_ms"] / 1e9
    source = torch.randn(n_copied // 4, device=device)
    copy = torch.empty_like(source)
    timing = measure(lambda: copy.copy_(source), device)
    found["copy_gb_s"] = 2 * n_copied / timing["median_ms"] / 1e6  # read and written
    target.write_text(json.dumps(found))
    print({name: value for name, value in found.items() if name != "machine"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
