"""`python -m jlebm_fast`: the command line."""

import sys


def run() -> int:
    """What `jlebm` does; an interruption is one line even while the command line itself is imported."""
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        print("jlebm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
