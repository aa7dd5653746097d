"""`make gpu`: build, test, measure on a machine with a GPU; one command, offline, within nine minutes.

Sections are programs of their own, each with a limit, one after the other; one that fails or is late costs no other.
After every section the JSON is written: benchmarks/results/gpu-<date>.json, and $OUT/gpu.json where OUT is set.

    build       the package with the CUDA kernels of this card's architecture, --no-build-isolation --no-deps
    limits      what this card reaches: a large bf16 and fp32 matrix product, a large copy
    tests       tests/gpu/test_cuda.py: parity in all precisions, noise, law, graphs, streams, fuzz
    tried       tests/gpu/test_cuda_tried.py: the regimes that are used only by who asks; timed only where they pass
    chains      the published problems against eager, torch.compile and the published loop (chains.py)
    energy      EnergyMLP's forward and backward beside plain torch (energy.py)
    backends    the tests that run on every backend, for cuda and eager on this card
    triton      the same tests for Triton, which compiles for a second or two in most of them: may end unfinished
    sanitizer   compute-sanitizer on a small case, if it is there
    races       its tool for missing barriers on the same case: only where --sections names it
    tiles       candidates for the tiles of the Triton kernels (tiles.py): likewise

`--dry-run` goes through the same programs without a GPU: the kernels as built for the host, tiny sizes, no build.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# tests that run on every backend
BACKEND_TESTS = [f"tests/test_{name}.py" for name in ("noise", "ops", "sampler", "registration")]
TOTAL_S = 530  # of 9 minutes, with time to print
# most seconds of each section; `chains` gets what is left beside FOR_LATER_S
LIMITS_S = {
    "build": 180, "limits": 45, "tests": 90, "tried": 60, "energy": 30, "backends": 90, "triton": 100, "sanitizer": 60,
    "races": 300, "tiles": 200,
}  # fmt: skip
FOR_LATER_S = 160
# torch and its libraries ask CUDA for what some drivers lack, and go on; our own launches raise
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--tool"]
# late without a fault of the code: under compute-sanitizer the import of torch alone may take longer than there is
MAY_BE_LATE = ("triton", "sanitizer", "races")
# the tests of Triton compile for two to three minutes of one processor
TRITON_SIDE_BY_SIDE, TRITON_ALONE_S = 8, 200


class Report:
    """The JSON that grows section by section."""

    def __init__(self, dry_run: bool) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        self.content: dict = {"date": now.isoformat(timespec="seconds"), "dry_run": dry_run, "sections": {}}
        folder = ROOT / "build" if dry_run else ROOT / "benchmarks" / "results"
        self.files = [folder / f"gpu-{now:%Y-%m-%d-%H%M}.json"]
        if os.environ.get("OUT"):
            self.files.append(pathlib.Path(os.environ["OUT"]) / "gpu.json")

    def write(self) -> None:
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.content, indent=1) + "\n")


def run(name: str, command: list[str], limit_s: float, environment: dict[str, str]) -> dict:
    """Run one section; its last lines, exit status and seconds."""
    print(f"\n=== {name} (at most {limit_s:.0f} s): {' '.join(command)}", flush=True)
    began = time.monotonic()
    if limit_s < 5:
        return {"status": "no time left", "seconds": 0.0}
    lines: list[str] = []
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=limit_s)
        status = "ok" if child.returncode == 0 else f"exit status {child.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)  # our own session: the child and what it started
        output, _ = child.communicate()
        status = f"stopped after {limit_s:.0f} s"
    lines = output.splitlines()
    print("\n".join(lines[-40:]), flush=True)
    seconds = round(time.monotonic() - began, 1)
    print(f"--- {name}: {status}, {seconds} s", flush=True)
    return {"status": status, "seconds": seconds, "tail": lines[-60:]}


def with_toolkit_on_path() -> None:
    """nvcc and compute-sanitizer from where CUDA's installer puts them, as CMake itself does not look there."""
    folder = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    if shutil.which("nvcc") is None and (folder / "nvcc").exists():
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(folder)])


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def capability() -> str:
    """Compute capability of the first GPU as "90"; empty where torch sees none."""
    code = "import torch; print(''.join(map(str, torch.cuda.get_device_capability(0))))"
    done = subprocess.run(python("-c", code), capture_output=True, text=True, check=False)
    return done.stdout.strip()


def build_command() -> list[str]:
    # pip's editable install, else (no permission to install) the module alone, in place
    pip = f"{sys.executable} -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable ."
    return ["sh", "-c", f"{pip} || {sys.executable} setup.py build_ext --inplace"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: host build of the kernels, tiny sizes")
    parser.add_argument("--sections", help="some of the above, with commas; without it all but those to be named")
    options = parser.parse_args()
    sections = (options.sections or "build,limits,tests,tried,chains,energy,backends,triton,sanitizer").split(",")
    if options.dry_run and options.sections is None:
        sections.append("tiles")
    began = time.monotonic()
    report = Report(options.dry_run)
    with_toolkit_on_path()
    scratch = ROOT / "build" / "gpu"
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "JLEBM_CUDA": "on"}
    if options.dry_run:
        environment["JLEBM_GPU_DRY_RUN"] = "1"
    arch = capability()
    if not arch and not options.dry_run:
        print("no GPU: torch.cuda sees none (nvidia-smi, CUDA_VISIBLE_DEVICES); --dry-run goes through without one")
        return 2
    if arch:
        environment.setdefault("JLEBM_CUDA_ARCHS", f"{arch}-real")
    dry = ["--dry-run"] if options.dry_run else []
    pytest = python("-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider")
    limits = dict(LIMITS_S)
    side_by_side = ["-n", str(min(TRITON_SIDE_BY_SIDE, os.cpu_count() or 1))]
    if importlib.util.find_spec("xdist") is None:
        side_by_side, limits["triton"] = [], TRITON_ALONE_S
    commands = {
        "build": build_command(),
        "limits": python(str(HERE / "limits.py"), str(scratch / "limits.json"), *dry),
        "tests": [*pytest, "-m", "gpu", "tests/gpu/test_cuda.py"],
        "tried": [*pytest, "-m", "gpu", "tests/gpu/test_cuda_tried.py"],
        "chains": python(str(HERE / "chains.py"), str(scratch / "chains.json"), *dry),
        "energy": python(str(HERE / "energy.py"), str(scratch / "energy.json"), *dry),
        "backends": [*pytest, *BACKEND_TESTS, "-k", "cuda-cuda or eager-cuda"],
        "triton": [*pytest, *side_by_side, "tests/gpu/test_triton.py", *BACKEND_TESTS, "-k", "triton"],
        "sanitizer": [*SANITIZER, "memcheck", *python(str(HERE / "small_case.py"), *dry)],
        "races": [*SANITIZER, "racecheck", *python(str(HERE / "small_case.py"), *dry)],
        "tiles": python(str(HERE / "tiles.py"), str(scratch / "tiles.json"), *dry),
    }
    if options.dry_run:
        # the first needs no rehearsal, the others have no device
        del commands["build"], commands["backends"], commands["triton"], commands["races"]
        commands["sanitizer"] = python(str(HERE / "small_case.py"), *dry)
    elif shutil.which("compute-sanitizer") is None:
        del commands["sanitizer"], commands["races"]
        report.content["sections"]["sanitizer"] = {"status": "compute-sanitizer is not installed", "seconds": 0.0}
    failed = False
    for name, command in commands.items():
        if name not in sections:
            continue
        left = TOTAL_S - (time.monotonic() - began)
        limit = left - FOR_LATER_S if name == "chains" else min(limits[name], left)
        if options.dry_run:
            limit = 400.0  # the first section that needs the host build makes it
        answer = scratch / f"{name}.json"
        answer.unlink(missing_ok=True)
        result = run(name, command, limit, {**environment, "JLEBM_GPU_LIMIT_S": str(limit)})
        if answer.exists():
            result["result"] = json.loads(answer.read_text())
        report.content["sections"][name] = result
        report.write()
        late = name in MAY_BE_LATE and result["status"] != "ok" and not result["status"].startswith("exit")
        failed = failed or (result["status"] != "ok" and not late)
        if name == "build" and failed:
            print("without the package there is nothing to test or measure")
            break
        if name == "tried" and result["status"] != "ok":
            environment["JLEBM_GPU_TRIED"] = "no"  # what hangs in a test would hang there too
    sys.path[:0] = [str(ROOT), str(HERE)]
    from table import summary

    print("\n" + summary(report.content), flush=True)
    print(f"written: {', '.join(map(str, report.files))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
