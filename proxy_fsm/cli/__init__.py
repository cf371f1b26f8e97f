"""The command line ``proxy-fsm``; it uses the public API only, and needs the extra ``cli``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_EXTRA = {"cyclopts", "fabric", "invoke", "rich"}
_USAGE = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those after the program's name; by default this process's own.

    Returns:
        The exit status.
    """
    try:
        from proxy_fsm.cli.app import execute  # noqa: PLC0415 - the extra may be missing, see below

        return execute(sys.argv[1:] if arguments is None else arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print('The command line needs its extra: pip install "proxy_fsm[cli]".', file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
