"""Processes that end with the one that started them, also when that one is killed."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait


def leave_with_parent() -> None:
    """End this process when the one that started it is gone, whatever it does then; call it once, in the new process.

    Without it a killed rank leaves helpers behind: under a forkserver a process has the server for a parent, and the
    server lives as long as its last child.
    """
    parent = parent_process()
    assert parent is not None, "this process was started by multiprocessing"
    threading.Thread(target=_follow, args=(parent.sentinel,), name="leave with parent", daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
