"""One rank of `colossal run`: `python -m colossal_launch.run.script SCRIPT ARGUMENTS`, the script as its own main module."""

from __future__ import annotations

import os
import runpy
import sys
from datetime import timedelta


def main() -> None:
    """Runs the script as `python SCRIPT` would, its errors recorded for the launcher."""
    from colossal_launch.run.failure import recorded
    from colossal_launch.run.parent import end_with_launcher

    end_with_launcher()
    sys.argv = sys.argv[1:]
    # `python -m` put the current folder first; `python SCRIPT` puts the script's.
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))

    def run() -> int:
        from colossal_launch import session

        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except Exception:
            session.finish(grace=timedelta(0))
            raise
        return 0

    sys.exit(recorded(run, aloud=False))


if __name__ == "__main__":
    main()
