"""A network of the user's own, named on the command line as Python would import it."""

from __future__ import annotations

import os
import pkgutil
import sys
from contextlib import suppress
from typing import Any

from distmatch.base.errors import UserError, cause


def imported(path: str) -> Any:
    """What ``MODULE:NAME`` stands for; None for an empty path.

    The code is that of the user's program and comes from a command line alone, never from a file: modules are
    found in the current folder and where Python finds them.

    Args:
        path: For example ``nets.velocity:Velocity``.

    Raises:
        UserError: It is not of this form, the import fails, or there is no such name.
    """
    if not path:
        return None
    sys.path.insert(0, here := os.getcwd())
    try:
        if not path.partition(":")[2]:
            raise ValueError("no name behind a colon")
        return pkgutil.resolve_name(path)
    except Exception as error:
        raise UserError(
            "--network names nothing that can be imported from here",
            got=f"{path}: {cause(error)}",
            expected="MODULE:NAME, such as nets.velocity:Velocity",
        ) from error
    finally:
        with suppress(ValueError):  # the module may have taken it out
            sys.path.remove(here)
