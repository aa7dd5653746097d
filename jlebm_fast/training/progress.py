"""One style of progress bar for every command."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LOG_FILE_INTERVAL = 10.0  # seconds between updates where nobody watches: keeps log files short


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A tqdm bar on stderr; rare updates when stderr is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else LOG_FILE_INTERVAL
    return tqdm(*arguments, mininterval=interval, dynamic_ncols=True, **options)
