"""Hands CMakeLists.txt to the build. Never imports torch: one build serves every torch."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# cmake and ninja installed beside this Python are found although its environment is not activated
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def missing_tools() -> list[str]:
    """What pip would have brought for the build, had it not been told --no-build-isolation."""
    makes_wheels = any(map(importlib.util.find_spec, ("setuptools.command.bdist_wheel", "wheel")))
    missing = [] if makes_wheels else ["'setuptools>=70.1'"]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    return missing + [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=SEARCHED) is None]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DJLEBM_VERSION={self.distribution.get_version()}",
            f"-DJLEBM_CUDA={os.environ.get('JLEBM_CUDA', 'auto')}",
            *_given("JLEBM_CUDA_ARCHS"),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        os.environ["PATH"] = SEARCHED
        target.parent.mkdir(parents=True, exist_ok=True)
        # a new Python or an isolated build's vanished tools must not meet an old cache
        subprocess.check_call([*configure, "--fresh"] if _cmake_knows_fresh() else configure)
        subprocess.check_call(["cmake", "--build", str(build), "--target", "_C"])


def _given(name: str) -> list[str]:
    return [f"-D{name}={os.environ[name]}"] if os.environ.get(name) else []


def _cmake_knows_fresh() -> bool:
    found = re.search(r"(\d+)\.(\d+)", subprocess.check_output(["cmake", "--version"], text=True))
    return (int(found[1]), int(found[2])) >= (3, 24)


if {"dist_info", "editable_wheel", "bdist_wheel"} & set(sys.argv):
    missing = missing_tools()
    if missing:
        sys.exit(f"jlebm_fast cannot be built here: `pip install {' '.join(missing)}` first, or leave out "
                 "--no-build-isolation, and pip brings what the build needs")  # fmt: skip

setup(ext_modules=[Extension("jlebm_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
