"""The promises of the installation: what may be missing, what must not be included, what must agree."""

from __future__ import annotations

import ast
import json
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import jlebm_fast

ROOT = pathlib.Path(__file__).resolve().parent.parent
LONGEST_FILE = 450  # lines; about 400 is the rule


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in NAMES or name.split('.')[0] in NAMES:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Hidden())
"""


def without(*names: str) -> str:
    return f"NAMES = {names!r}\n{HIDE}"


@pytest.mark.parametrize("missing", ["jlebm_fast._C", "triton"])
def test_chains_run_without(missing):
    """Eager serves without the compiled module; what is missing is named with its remedy."""
    done = run_python(
        # find_spec(name) of a missing module is None
        "import importlib.util as u; true = u.find_spec\n"
        f"u.find_spec = lambda name, package=None: None if name == {missing!r} else true(name, package)\n"
        + without(missing)
        + "import torch, jlebm_fast as jf\n"
        "f = jf.EnergyMLP((2, 3), hidden=8, depth=2)\n"
        "z = jf.FastLangevin(f, n_steps=3)([torch.zeros(4, 2), torch.zeros(4, 3)])\n"
        "print([tuple(layer.shape) for layer in z])\n"
        "print({b.name: (b.available, b.reason) for b in jf.available_backends()})\n"
    )
    assert done.returncode == 0, done.stderr
    shapes, status = done.stdout.splitlines()
    assert shapes == "[(4, 2), (4, 3)]"
    backends = ast.literal_eval(status)
    assert backends["eager"][0]
    if missing == "jlebm_fast._C":
        available, reason = backends["cpu"]
        assert not available
        assert "_C" in reason
        assert "pip install" in reason


def test_a_module_of_older_sources_is_named():
    """After a `git pull` without a build: eager serves, and the remedy is said."""
    pytest.importorskip("jlebm_fast._C")
    done = run_python(
        "import jlebm_fast._C as compiled; del compiled.same_things\n"
        "import torch, jlebm_fast as jf\n"
        "sampler = jf.FastLangevin(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)), n_steps=2)\n"
        "print(sampler(sampler(torch.zeros(4, 2))).shape == (4, 2))\n"
        "print({b.name: b.reason for b in jf.available_backends()}['cpu'])\n"
    )
    assert done.returncode == 0, done.stderr
    ran, reason = done.stdout.splitlines()
    assert ran == "True"
    assert "built from older sources and lacks same_things" in reason
    assert "pip install" in reason


def test_core_imports_need_torch_and_numpy_alone():
    """`import jlebm_fast` pulls in nothing that only an extra brings, and works where those are absent."""
    extras = "datasets matplotlib PIL pyarrow safetensors sklearn scipy tqdm tyro jax pytest hypothesis".split()  # noqa: SIM905
    done = run_python(without(*extras) + "import jlebm_fast, jlebm_fast.cli, jlebm_fast.bench")
    assert done.returncode == 0, done.stderr


def test_errors_of_the_command_line_need_no_training():
    done = run_python("import sys, jlebm_fast.cli; print([n for n in sys.modules if 'jlebm_fast.training' in n])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_setup_never_imports_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "torch" not in imported
    assert imported <= {*sys.stdlib_module_names, "setuptools", "pybind11"}


def test_what_a_build_without_isolation_lacks_is_named():
    done = run_python(
        "import importlib.util as u, runpy, shutil, sys; true = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'pybind11' else true(name, package)\n"
        "shutil.which = lambda *_, **__: None\n"
        f"sys.argv = ['setup.py', 'dist_info']; runpy.run_path({str(ROOT / 'setup.py')!r})\n"
    )
    assert done.returncode == 1
    assert "`pip install pybind11 cmake ninja` first" in done.stderr


def native_sources() -> list[pathlib.Path]:
    return [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def test_no_torch_header_in_csrc():
    assert native_sources()
    for path in native_sources():
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE)
        framework = [name for name in included if re.match(r"(torch|ATen|c10|caffe2)/", name)]
        assert not framework, f"{path.name} includes {framework}"


def test_only_bindings_know_pybind11():
    knowing = [path.name for path in native_sources() if "pybind11" in path.read_text()]
    assert sorted(knowing) == ["bindings_records.h"]


def test_build_uses_neither_fast_math_nor_native_march():
    lines = (ROOT / "CMakeLists.txt").read_text().splitlines()
    code = "\n".join(line.split("#", 1)[0] for line in lines)
    assert "fast-math" not in code
    assert "march=native" not in code


def test_flags_of_the_user_reach_no_target(tmp_path):
    """CXXFLAGS stand before a target's own options, which win; -ffast-math, which nothing undoes, is refused."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs cmake, ninja and an x86 processor")
    pybind11 = pytest.importorskip("pybind11")
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DJLEBM_CUDA=off"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_CXX_FLAGS=-march=native -mavx2 -mavx512f"]
    subprocess.run(list(map(str, configure)), check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    for target, widest in (("baseline", "__SSE2__"), ("avx2", "__AVX2__"), ("avx512", "__AVX512F__")):
        (command,) = (
            entry["command"]
            for entry in commands
            if f"jlebm_cpu_{target}.dir" in entry["command"] and entry["file"].endswith("fma_peak.cpp")
        )
        arguments = shlex.split(command.split(" -o ")[0])
        macros = subprocess.run(
            [*arguments, "-dM", "-E", ROOT / "csrc/cpu/fma_peak.cpp"], cwd=tmp_path, check=True, capture_output=True
        ).stdout.decode()
        assert f"#define {widest} 1" in macros
        if target == "baseline":
            assert "__AVX__" not in macros
        if target == "avx2":
            assert "__AVX512F__" not in macros
        fast = subprocess.run(
            [*arguments, "-ffast-math", "-fsyntax-only", ROOT / "csrc/cpu/fma_peak.cpp"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert fast.returncode != 0
        assert "take it out of CXXFLAGS" in fast.stderr


def test_paths_in_comments_exist():
    """What a comment of the native sources names as a file of the package is there."""
    for path in native_sources():
        for named in re.findall(r"jlebm_fast/[\w/]+\.py", path.read_text()):
            assert (ROOT / named).exists(), f"{path.name} names {named}"


def test_version_is_one():
    """The package's literal, the installed metadata and the module's own build agree."""
    import importlib.metadata

    tree = ast.parse((ROOT / "jlebm_fast" / "__init__.py").read_text())
    literals = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__"
    ]
    assert literals == [jlebm_fast.__version__]
    try:
        installed = importlib.metadata.version("jlebm-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == jlebm_fast.__version__


def test_constraints_pin_every_requirement():
    """Each requirement of pyproject.toml has an exact version in constraints.txt."""
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    # every requirement stands in quotes with a lower bound
    required = re.findall(r'"([A-Za-z0-9._-]+)>=', (ROOT / "pyproject.toml").read_text())
    assert {"torch", "numpy", "pybind11", "pytest"} <= set(required)
    assert {name.lower() for name in required} <= {name.lower() for name in pinned}


def test_files_stay_readable():
    """No source file passes the wall."""
    folders = ("jlebm_fast", "csrc", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".h", ".cpp"}]
    too_long = {path.name: n for path in files if (n := len(path.read_text().splitlines())) > LONGEST_FILE}
    assert not too_long


def test_source_distribution_can_be_built_from(tmp_path):
    """The sdist holds what the native build needs."""
    setuptools = pytest.importorskip("setuptools.build_meta")
    del setuptools
    done = subprocess.run(
        [sys.executable, "-c", f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"],
        cwd=_copy_of_the_sources(tmp_path / "sources"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    import tarfile

    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {path.relative_to(ROOT).as_posix() for path in native_sources()}
    wanted |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "jlebm_fast/__init__.py"}
    wanted |= {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")
    }  # README and tests name them
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def _copy_of_the_sources(target: pathlib.Path) -> pathlib.Path:
    """A copy, so that building leaves nothing in the checkout and tests may run side by side."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    target.mkdir()
    for name in ("csrc", "docs", "jlebm_fast", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, target / path.name)
    return target
