"""Die with the supervisor: its end of our standard input is a pipe, and the kernel closes that on any death of it.

Standard library only: the supervisor itself uses it when it is somebody's child (`managed-agents demo`).
"""

import os
import signal
import threading
import time

VARIABLE = "MANAGED_AGENTS_SUPERVISED"
GRACE_SECONDS = 20.0
CANNOT_START_STATUS = 78
"""Exit status of a process whose settings are wrong (EX_CONFIG of sysexits.h): starting it again does not help."""


def watch() -> None:
    """When we were started by a supervisor, stop cleanly once it is gone, and for certain a while later."""
    if os.environ.pop(VARIABLE, "") == "1":
        threading.Thread(target=_wait, name="parent-watch", daemon=True).start()


def _wait() -> None:
    try:
        while os.read(0, 4096):
            continue
    except OSError:
        pass  # a closed standard input means the same
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
