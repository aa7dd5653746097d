"""Importing this skips a test module where Triton cannot compile."""

import os

import pytest

from jlebm_fast.backends import triton as backend

found = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
if backend._release(found.__version__) < backend.OLDEST_TRITON:
    pytest.skip(f"Triton {found.__version__} is too old for the backend", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)
