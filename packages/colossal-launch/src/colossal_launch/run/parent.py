"""A worker does not outlive the process that started it, however that one died."""

from __future__ import annotations

import os
import threading
import time

LAUNCHER_VARIABLE = "COLOSSAL_LAUNCHER_PID"
_LOOK_SECONDS = 0.2


def end_with_launcher() -> None:
    """Ends this process within a fifth of a second of its launcher's death. Does nothing where no launcher of ours started it."""
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if launcher.isdigit():
        threading.Thread(target=_watch, args=(int(launcher),), name="colossal-launcher-watch", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_SECONDS)
    # Nobody reads what this process could still say, and its peers are being ended too.
    os._exit(1)
