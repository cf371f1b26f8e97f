"""The API of python-x2go's proxy backends, on top of the engine: see `proxy_fsm.x2go.base.X2GoProxy`.

Import ``x2go`` first where it is used: it lets gevent patch the standard library, and what is imported before that
would block gevent's hub.
"""

from __future__ import annotations
