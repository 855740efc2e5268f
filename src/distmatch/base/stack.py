"""Where in the user's program a warning belongs."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parents[1])


def caller_level() -> int:
    """The ``stacklevel`` for ``warnings.warn`` in the calling function: the first line outside this package.

    As ``skip_file_prefixes`` of Python 3.12 does it. 1 is the line of the warning itself; where the whole
    stack is of the package, it is the outermost line.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
