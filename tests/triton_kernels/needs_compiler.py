"""Importing this skips a test module where Triton cannot compile."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)
