"""``python -m proxy_fsm``: the command line."""

from __future__ import annotations

import sys

from proxy_fsm.cli import main

if __name__ == "__main__":
    sys.exit(main())
