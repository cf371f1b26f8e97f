"""python-x2go's NX backend on top of the engine: ``x2go.backends.proxy.nx3.X2GoProxy``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from proxy_fsm.backends.nx3 import NX3Backend
from proxy_fsm.x2go import base
from proxy_fsm.x2go.hooked import HookedKDrive, HookedNX3
from proxy_fsm.x2go.lookup import look_up

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["X2GoProxy", "nx_options"]

_FOLDERS = (r"PyHoca-GUI\nxproxy", "x2goclient", r"NX Client for Windows\bin")


class X2GoProxy(base.X2GoProxy):
    """Runs ``nxproxy -S``; the session's cookie goes by the environment, where its owner alone can read it.

    `proxy_options` that can stand in an NX option string, and are not set from the session, are taken into it.

    Args:
        args: As in `proxy_fsm.x2go.base.X2GoProxy`.
        kwargs: As there.
    """

    _backend_class: ClassVar[type[HookedNX3 | HookedKDrive] | None] = HookedNX3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subsystem = "NX Proxy"
        self.PROXY_CMD = look_up("nxproxy", "NXPROXY_BINARY", _FOLDERS, environ=os.environ)
        # Without NX_CLIENT a dialog opens after some time, and nxproxy waits for it.
        self.PROXY_ENV.update({"NX_CLIENT": "/bin/true", "NX_ROOT": self.sessions_rootdir})
        self.PROXY_MODE = "-S"
        if self.session_info is not None:
            self.PROXY_OPTIONS = nx_options(self.session_info, id=self.session_info.name)
            self.PROXY_DISPLAY = self.session_info.display

    def process_proxy_options(self) -> None:
        """Take what fits into the option string; log the others as ignored."""
        ignored = NX3Backend().process_options(self.proxy_options)
        taken = {name: value for name, value in self.proxy_options.items() if name not in ignored}
        kept = [option for option in self.PROXY_OPTIONS if option.partition("=")[0] not in taken]
        self.PROXY_OPTIONS = [*kept, *(f"{name}={value}" for name, value in taken.items())]
        self.proxy_options = ignored
        super().process_proxy_options()


def nx_options(info: Any, **others: str) -> list[str]:
    """Return the options of a session; ``connect`` comes first, since without it nxproxy would listen."""
    own = {"connect": "127.0.0.1", "cookie": info.cookie, "port": info.graphics_port, **others}
    every: Mapping[str, Any] = {**own, **NX3Backend.DEFAULT_OPTIONS}
    return ["nx/nx", *(f"{name}={value}" for name, value in every.items())]
