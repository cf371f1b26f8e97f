"""Shared by python-x2go's NX and KDrive backends: an option string for the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from proxy_fsm.backends.option_string import OptionStringBackend, split_options
from proxy_fsm.x2go import base

if TYPE_CHECKING:
    from proxy_fsm.backends.base import Program

__all__ = ["OptionStringProxy"]


class OptionStringProxy(base.X2GoProxy):
    """A proxy whose program takes ``nx/nx,key=value,…:DISPLAY`` after ``-S``.

    ``proxy_options`` that fit into an option string, and are not set from the session, are added to it.

    Args:
        args: As in `proxy_fsm.x2go.base.X2GoProxy`.
        kwargs: As there.
    """

    PROXY_MODE = "-S"
    #: The program, and how to find it.
    _program: ClassVar[Program]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.PROXY_CMD = self.PROXY_CMD or self._program.look_up()
        self.PROXY_ENV["NX_ROOT"] = self.sessions_rootdir
        info = self.session_info
        if info is not None:  # the engine reports what it lacks when it starts
            options = {**self._options_of(info), **OptionStringBackend.DEFAULT_OPTIONS}
            self.PROXY_OPTIONS = ["nx/nx", *(f"{name}={value}" for name, value in options.items())]
            self.PROXY_DISPLAY = getattr(info, "display", None)

    def process_proxy_options(self) -> None:
        """Move the options that fit into the option string; log the others as ignored."""
        accepted, self.proxy_options = split_options(self.proxy_options)
        kept = [option for option in self.PROXY_OPTIONS if option.partition("=")[0] not in accepted]
        self.PROXY_OPTIONS = [*kept, *(f"{name}={value}" for name, value in accepted.items())]
        super().process_proxy_options()

    def _options_of(self, info: Any) -> dict[str, Any]:
        """Return the options of a session; ``connect`` comes first, since without it nxproxy would listen."""
        return {
            "connect": "127.0.0.1",
            "cookie": getattr(info, "cookie", None),
            "port": getattr(info, "graphics_port", None),
        }
