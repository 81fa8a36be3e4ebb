"""Optional files: if one cannot be written, the run warns once and goes on.

Logs and previews are such files. Checkpoints, which a run needs, are in `checkpoint_files.py`.
"""

import os
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from diffzoo.cache import system_error
from diffzoo.errors import causes

__all__ = ["write_or_warn"]

_told: set[Path] = set()


def write_or_warn(path: Path, write: Callable[[], object]) -> bool:
    """Call `write`; if the disk is full or fails, warn once for each path. Returns whether it was written."""
    try:
        write()
    except Exception as error:
        number = next((n for e in causes(error) if (n := system_error(e)) is not None), None)
        if number is None:
            raise
        if path not in _told:
            _told.add(path)
            rank_zero_warn(f"{path} could not be written ({os.strerror(number)}): training goes on without it")
        return False
    return True
