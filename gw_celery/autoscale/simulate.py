"""``python -m gw_celery.autoscale.simulate``: an alias of ``python -m gw_celery.simulate``."""

from __future__ import annotations

import sys

from gw_celery.simulate.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
