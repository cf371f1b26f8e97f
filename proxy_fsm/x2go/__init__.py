"""The API of python-x2go's proxy backends, on top of the engine: see `proxy_fsm.x2go.base.X2GoProxy`.

A program that uses ``x2go`` must import it first: it lets gevent patch the standard library, and what is imported
before that would block gevent's hub.
"""

from __future__ import annotations
