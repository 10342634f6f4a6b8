"""What this process may do, asked before the first write: a change that is refused halfway has to be taken back."""

from __future__ import annotations

from pathlib import Path

from lb.errors import DataplaneError

# include/uapi/linux/capability.h. CAP_SYS_ADMIN, which contains CAP_BPF, for the bpffs is mounted too.
NEEDED = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}


def effective(status: str) -> int:
    """The bits of CapEff in the text of /proc/PID/status, proc_pid_status(5)."""
    (line,) = (line for line in status.splitlines() if line.startswith("CapEff:"))
    return int(line.split()[1], 16)


def check_may_change() -> None:
    """Raises DataplaneError, naming what is missing."""
    held = effective(Path("/proc/self/status").read_text())
    missing = [name for bit, name in NEEDED.items() if not held >> bit & 1]
    if missing:
        raise DataplaneError(f"not permitted: run as root ({' and '.join(missing)} missing)")
