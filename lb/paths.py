"""Where xdp-lb keeps its things: one folder for each network namespace.

Enters: the environment (XDP_LB_STATE_DIR, XDP_LB_RUN_DIR) and the namespace this process is in.
Leaves: paths, of which nothing is created here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_NETNS = "default"
# A file that /proc has once for each network namespace. It takes no privilege to look at; proc_pid_ns(5) does, which
# the daemon does not have under systemd.
OWN_NAMESPACE, ROOT_NAMESPACE = Path("/proc/self/net/dev"), Path("/proc/1/net/dev")
NAMED_NAMESPACES = Path("/run/netns")  # where ip-netns(8) mounts them


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells one namespace from another: device and inode of its file, or of one that it has for itself."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _named_namespaces() -> Iterator[Path]:
    if NAMED_NAMESPACES.is_dir():
        yield from NAMED_NAMESPACES.iterdir()


def current_netns() -> str:
    """What this process's network namespace is called: `default` if it is that of process 1, else
    by its ip-netns(8) name, else `net-INODE`."""
    own = _identity(Path("/proc/self/ns/net"))
    if own is None or _identity(OWN_NAMESPACE) == _identity(ROOT_NAMESPACE):
        return DEFAULT_NETNS
    for path in _named_namespaces():
        if path.name != DEFAULT_NETNS and _identity(path) == own:
            return path.name
    return f"net-{own[1]}"


@dataclass(frozen=True, slots=True)
class Paths:
    """`state_dir` outlives a reboot, `run_dir` holds the pins and does not."""

    state_dir: Path
    run_dir: Path
    netns: str = DEFAULT_NETNS

    @classmethod
    def here(cls) -> Paths:
        """The paths for the network namespace of this process, by the environment."""
        return cls(
            Path(os.environ.get("XDP_LB_STATE_DIR") or "/var/lib/xdp-lb"),
            Path(os.environ.get("XDP_LB_RUN_DIR") or "/run/xdp-lb"),
            current_netns(),
        )

    @property
    def store(self) -> Path:
        return self.state_dir / self.netns / "state.db"

    @property
    def lock(self) -> Path:
        return self.state_dir / self.netns / "lock"

    @property
    def filter_lock(self) -> Path:
        """Of the filter rules, which change independently of a daemon. Take `lock` first if both are needed."""
        return self.state_dir / self.netns / "filter.lock"

    @property
    def stage_lock(self) -> Path:
        """Of the list of users' stages; taken alone."""
        return self.state_dir / self.netns / "stage.lock"

    @property
    def access(self) -> Path:
        """Tokens of the daemon, and who changed what."""
        return self.state_dir / self.netns / "access.db"

    @property
    def health(self) -> Path:
        """What health checks have found last."""
        return self.run_dir / self.netns / "health.json"

    @property
    def socket(self) -> Path:
        """Unix socket of the daemon."""
        return self.run_dir / self.netns / "api.sock"
