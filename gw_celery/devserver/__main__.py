"""Run an embedded server in the foreground."""

from __future__ import annotations

import argparse
import signal
import sys

from gw_celery import errors
from gw_celery.devserver.server import running


def main(argv: list[str] | None = None) -> int:
    """Run a server until Ctrl-C, TERM or its own end."""
    parser = argparse.ArgumentParser(prog="python -m gw_celery.devserver", description=__doc__)
    parser.add_argument("data_dir", help="folder of the server's data and log")
    data_dir = parser.parse_args(argv).data_dir
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(data_dir) as server:
            print(f"broker  {server.broker_url}\nresults {server.result_url}", flush=True)
            code = server.wait()
            print(f"the server ended with code {code}: see {server.log}", file=sys.stderr)
            return 1
    except errors.GWCeleryError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
