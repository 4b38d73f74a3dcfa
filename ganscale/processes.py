"""Which machine this is, and whether one of its processes still exists.

A process id alone does not name a process: the system reuses ids, and every boot and every
container counts its own. With the machine and the time of its start it names one process for good.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine_id() -> str:
    """Differs between boots, hosts and containers with process ids of their own.

    A host's name would not do: containers often share names, and after a reboot all ids are new.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """When a process began, in a unit that no change of the clock affects; None if it is gone.

    A zombie, which only waits for its parent, is gone.
    """
    try:
        # The name, in parentheses, may contain spaces; after it come state and 18 other fields.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    import psutil  # no Linux

    try:
        process = psutil.Process(pid)
        gone = process.status() == psutil.STATUS_ZOMBIE
        return None if gone else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
