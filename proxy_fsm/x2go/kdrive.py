"""python-x2go's KDrive backend on top of the engine: ``x2go.backends.proxy.kdrive.X2GoProxy``.

**Not tested against the real x2gokdriveclient**: no package repository that we know of offers it (November 2026). See
`proxy_fsm.backends.kdrive` for what is known about it and what is assumed.
"""

from __future__ import annotations

from proxy_fsm.backends.kdrive import X2GOKDRIVECLIENT
from proxy_fsm.x2go.backends import HookedKDrive
from proxy_fsm.x2go.option_string import OptionStringProxy

__all__ = ["X2GoProxy"]


class X2GoProxy(OptionStringProxy):
    """Runs ``x2gokdriveclient -S``; the session's cookie is passed in a file that only its owner can read.

    The file is removed when the program has exited. ``proxy_options`` as in `proxy_fsm.x2go.nx3.X2GoProxy`.

    Args:
        args: As in `proxy_fsm.x2go.base.X2GoProxy`.
        kwargs: As there.
    """

    subsystem = "X2Go KDrive Client"
    _backend_class = HookedKDrive
    _program = X2GOKDRIVECLIENT
