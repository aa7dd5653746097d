"""The checks under interpreted/ belong to a process of their own (test_interpreter.py)."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
