"""Where programs and maps outlive the process: a bpffs of our own, a folder a network namespace and generation.

    RUN_DIR/bpf/NETNS/current -> 3     the generation in force (a symbolic link, replaced atomically)
    RUN_DIR/bpf/NETNS/3/map_*, prog_*, description

`ip netns exec` gives each command a mount namespace of its own, whose mounts die with it, and hides /sys/fs/bpf in it.
So the bpffs is mounted in the mount namespace of our oldest ancestor that we may look at (as a rule, init's), and where
that is not our own, it is reached through /proc/PID/root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from xdp.errors import LoadError, NotPermitted, XdpError
from xdp.object import pinned_program

_CURRENT = "current"


def run_dir() -> Path:
    """The run directory, by the environment."""
    return Path(os.environ.get("XDP_LB_RUN_DIR") or "/run/xdp-lb")


def _ancestors() -> Iterator[int]:
    """Our process, its parent, and so on up to init."""
    pid = os.getpid()
    while pid:
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        pid = int(stat[stat.rindex(")") + 1 :].split()[1])


def _mount_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


_known_home: tuple[int, str | None] = (0, None)


def _home() -> int:
    """The oldest ancestor whose mount namespace we may look at; searched for again only when that one has ended."""
    global _known_home
    pid, namespace = _known_home
    if namespace is None or _mount_namespace(pid) != namespace:
        pid = [pid for pid in _ancestors() if _mount_namespace(pid)][-1]
        _known_home = pid, _mount_namespace(pid)
    return pid


def _is_mounted(path: Path, pid: int) -> bool:
    """Whether a bpffs is mounted at `path`, as process `pid` sees it."""
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return any(f" {_escaped(path)} " in line and " - bpf " in line for line in mounts)


def _escaped(path: Path) -> str:
    """As proc_pid_mountinfo(5) writes it, in octal."""
    return re.sub(r"[ \t\n\\]", lambda found: f"\\{ord(found[0]):03o}", str(path))


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


def _in_home(home: int, *command: str) -> None:
    done = subprocess.run(
        ["nsenter", f"--mount=/proc/{home}/ns/mnt", *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NotPermitted(f"{' '.join(command)}: {done.stderr.strip()}: run as root (CAP_SYS_ADMIN)")


class Pins:
    """The generations of one network namespace."""

    def __init__(self, run_dir: Path, netns: str) -> None:
        self.mount_point = run_dir.resolve() / "bpf"
        # A bpffs has no names with dots.
        self._folder = netns.replace("%", "%25").replace(".", "%2E")

    def _root(self) -> Path | None:
        """The mount as this process reaches it; None while there is none. What its own mount namespace has, if that is
        another one, may be a copy of a mount that has been taken off since."""
        home = _home()
        if not _is_mounted(self.mount_point, home):
            return None
        there = Path(f"/proc/{home}/root{self.mount_point}")
        return self.mount_point if _is_same(self.mount_point, there) else there

    def _mount(self) -> Path:
        if not self._root():
            self.mount_point.mkdir(parents=True, exist_ok=True)
            _in_home(_home(), "mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(self.mount_point))
        root = self._root()
        if root is None:
            raise XdpError(f"{self.mount_point}: mounted, but not visible")
        return root

    def current(self) -> Path | None:
        """The folder of the generation in force."""
        root = self._root()
        link = root / self._folder / _CURRENT if root else None
        return link.parent / os.readlink(link) if link and link.is_symlink() else None

    def others(self) -> list[Path]:
        """Generations that a change cut short left behind, besides the one in force."""
        root, current = self._root(), self.current()
        folder = root / self._folder if root else None
        if folder is None or not folder.is_dir():
            return []
        return [path for path in folder.iterdir() if path.name.isdigit() and path != current]

    def prepare(self) -> Path:
        """A new, empty folder for the next generation."""
        folder = self._mount() / self._folder
        folder.mkdir(exist_ok=True)
        number = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) + 1
        (folder / str(number)).mkdir()
        return folder / str(number)

    def put_in_force(self, generation: Path) -> None:
        following = generation.parent / "next"
        with suppress(FileNotFoundError):
            following.unlink()
        following.symlink_to(generation.name)
        following.rename(generation.parent / _CURRENT)

    def discard(self, generation: Path) -> None:
        """Forgets the pins; what is attached goes on running."""
        shutil.rmtree(generation)

    def remove(self) -> None:
        """Forgets all generations, and the bpffs too when no network namespace has any left."""
        root = self._root()
        if root is None:
            return
        with suppress(FileNotFoundError):
            shutil.rmtree(root / self._folder)
        if all("." in path.name for path in root.iterdir()):  # the kernel's own: maps.debug, progs.debug
            with suppress(NotPermitted):  # an empty one may stay: it takes more to unmount it than to use it
                _in_home(_home(), "umount", str(self.mount_point))


def generation_of(program_id: int, name: str, run_dir: Path) -> Path | None:
    """The folder of the generation in force, of whichever network namespace, that pins this program under this name."""
    root = Pins(run_dir, "")._root()
    for link in root.glob(f"*/{_CURRENT}") if root else ():
        generation = link.parent / os.readlink(link)
        with suppress(LoadError):
            if pinned_program(str(generation), name).id == program_id:
                return generation
    return None
