"""python-x2go's NX backend on top of the engine: ``x2go.backends.proxy.nx3.X2GoProxy``."""

from __future__ import annotations

from typing import Any

from proxy_fsm.backends.nx3 import NXPROXY
from proxy_fsm.x2go.backends import HookedNX3
from proxy_fsm.x2go.option_string import OptionStringProxy

__all__ = ["X2GoProxy"]


class X2GoProxy(OptionStringProxy):
    """Runs ``nxproxy -S``; the session's cookie is passed in the environment, which only its owner can read.

    ``proxy_options`` that fit into an NX option string, and are not set from the session, are added to it.

    Args:
        args: As in `proxy_fsm.x2go.base.X2GoProxy`.
        kwargs: As there.
    """

    subsystem = "NX Proxy"
    _backend_class = HookedNX3
    _program = NXPROXY

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.PROXY_ENV["NX_CLIENT"] = "/bin/true"  # else nxproxy opens a dialog after some time, and waits for it

    def _options_of(self, info: Any) -> dict[str, Any]:
        """Nxproxy names its statistics directory after ``id``, else after the display, which two servers may share."""
        return {**super()._options_of(info), "id": getattr(info, "name", None)}
