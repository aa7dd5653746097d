"""The checks under checks/ belong to processes of their own (test_interpreter.py, test_ptx_of_triton.py)."""

import os

_own = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("JLEBM_TEST_PTX", "").startswith("sm_")
collect_ignore = [] if _own else ["checks"]
