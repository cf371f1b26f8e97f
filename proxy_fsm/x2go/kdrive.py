"""python-x2go's KDrive backend on top of the engine: ``x2go.backends.proxy.kdrive.X2GoProxy``.

**Not tried against the real x2gokdriveclient**, which no package source reached here has; see
`proxy_fsm.backends.kdrive` for what is known of it and what is assumed.
"""

from __future__ import annotations

import os
from typing import Any

from proxy_fsm.x2go import nx3
from proxy_fsm.x2go.hooked import HookedKDrive
from proxy_fsm.x2go.lookup import look_up

__all__ = ["X2GoProxy"]

_FOLDERS = (r"PyHoca-GUI\x2gokdrive", "x2goclient")


class X2GoProxy(nx3.X2GoProxy):
    """Runs ``x2gokdriveclient -S``; the session's cookie goes by a file that its owner alone can read.

    The file is removed when the program has ended. `proxy_options` as in `proxy_fsm.x2go.nx3.X2GoProxy`.

    Args:
        args: As in `proxy_fsm.x2go.base.X2GoProxy`.
        kwargs: As there.
    """

    _backend_class = HookedKDrive

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subsystem = "X2Go KDrive Client"
        self.PROXY_CMD = look_up("x2gokdriveclient", "X2GOKDRIVECLIENT_BINARY", _FOLDERS, environ=os.environ)
        del self.PROXY_ENV["NX_CLIENT"]
        if self.session_info is not None:
            self.PROXY_OPTIONS = nx3.nx_options(self.session_info)
