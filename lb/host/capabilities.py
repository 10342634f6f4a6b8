"""Capabilities of this process, checked before the first write: a change refused halfway would need a rollback."""

from __future__ import annotations

from pathlib import Path

from lb.errors import DataplaneError

# include/uapi/linux/capability.h. Where the bpffs is not mounted yet, it takes CAP_SYS_ADMIN to mount it.
NEEDED = {12: "CAP_NET_ADMIN", 38: "CAP_PERFMON", 39: "CAP_BPF"}
SYS_ADMIN = 21  # contains the last two


def effective(status: str) -> int:
    """The bits of CapEff in the text of /proc/PID/status, proc_pid_status(5)."""
    (line,) = (line for line in status.splitlines() if line.startswith("CapEff:"))
    return int(line.split()[1], 16)


def missing(status: str) -> tuple[str, ...]:
    """The capabilities that a change needs and the process of that status does not have."""
    held = effective(status)
    if held >> SYS_ADMIN & 1:
        held |= 1 << 38 | 1 << 39
    return tuple(name for bit, name in NEEDED.items() if not held >> bit & 1)


def check_may_change() -> None:
    """Raises DataplaneError, naming what is missing."""
    if names := missing(Path("/proc/self/status").read_text()):
        raise DataplaneError(f"not permitted: run as root ({', '.join(names)} missing)")
