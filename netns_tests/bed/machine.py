"""A host of the bed as a machine with systemd: process 1 of its own, and the program installed as a service.

Enters: a host and a folder. Leaves: a Machine that runs commands in there as root. It is no virtual machine but
namespaces (mounts, processes, cgroups) around the host's network namespace. Its root is a tmpfs; of this system it has
/usr and, below /opt as a package would put them, Python and the repository, none of which it can write to. Of systemd's
own units there are those of UNITS: what would set up hardware, disks and sysctls is left out, and of /proc/sys only
net/ can be written.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Self

from netns_tests.bed.commands import scripts
from netns_tests.bed.servers import REPOSITORY
from netns_tests.bed.topology import XDP_LB, Host, wait_until

PROGRAM = "/usr/local/bin/xdp-lb"
UNIT = "/etc/systemd/system/xdp-lb.service"
ENVIRONMENT = ("HOME=/root", "LANG=C.UTF-8", "PATH=/usr/local/bin:/usr/sbin:/usr/bin")
UNITS = (
    *("sysinit.target", "basic.target", "network.target", "multi-user.target", "shutdown.target"),
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
)
START_TIMEOUT_S = 120  # emulated, it takes ten times as long as elsewhere

# The hierarchy of cgroups is one for the whole host; where the host has it is not to be known.
CGROUPS = """\
set -eu
mount --make-rprivate /
mount -t cgroup2 cgroups {root}
"""
BOOT = """\
mkdir {root}/{name}
echo $$ >{root}/{name}/cgroup.procs
umount {root}
exec unshare --mount --pid --fork --kill-child --cgroup --ipc --uts sh {root}.init
"""
SWEEP = """\
[ ! -d {root}/{name} ] || find {root}/{name} -depth -type d -exec rmdir {{}} +
"""
INIT = """\
set -eu
mount -t tmpfs -o mode=755 root {root}
cd {root}
mkdir -p dev etc/systemd/system/sysinit.target.wants old opt/packages opt/python opt/xdp-lb proc root run sys tmp usr \\
	var/lib var/log
chmod 1777 tmp
mount --bind /usr usr
mount --bind {packages} opt/packages
mount --rbind {python} opt/python
mount --bind {repository} opt/xdp-lb
for folder in usr opt/packages opt/python opt/xdp-lb; do mount -o remount,bind,ro $folder; done
for link in bin lib lib64 sbin; do ln -s usr/$link $link; done
mount -t tmpfs -o mode=755 programs usr/local/bin
cp {root}.program .{program}
chmod 755 .{program}
cp -a /etc/group /etc/ld.so.cache /etc/nsswitch.conf /etc/passwd etc
for unit in {units}; do ln -s /lib/systemd/system/$unit etc/systemd/system; done
ln -s ../systemd-journald.service etc/systemd/system/sysinit.target.wants
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,rw proc/sys/net
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroups sys/fs/cgroup
mount -t tmpfs -o mode=755 devices dev
for device in full null random tty urandom zero; do
	touch dev/$device
	mount --bind /dev/$device dev/$device
done
ln -s pts/ptmx dev/ptmx
pivot_root . old
exec chroot . sh -c 'umount --lazy /old && rmdir /old && exec env -i "$@"' sh {environment} container=namespaces \\
	SYSTEMD_UNIT_PATH=/etc/systemd/system /lib/systemd/systemd --log-target=journal --unit=multi-user.target
"""
# In the place of what pip makes of the entry in pyproject.toml, since Python and the modules lie elsewhere in there.
ENTRY = """\
#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/xdp-lb:/opt/packages
code='import sys; sys.argv[0] = "{program}"; from {module} import {function}; {function}()'
exec /opt/python/bin/python{version} -c "$code" "$@"
"""


class Machine:
    """Up while it is entered. `root` is an empty folder; files of the machine's lie beside it."""

    def __init__(self, host: Host, root: Path) -> None:
        self._host = host
        self._root = root
        self._process: subprocess.Popen[str] | None = None
        self._init: int | None = None

    def __enter__(self) -> Self:
        self._beside("program").write_text(self._filled(ENTRY))
        self._beside("init").write_text(self._filled(INIT))
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in there to its end. CalledProcessError, with stderr as a note, unless `check` is off."""
        command = ["nsenter", f"--target={self._init}", "--all", "env", "-i", *ENVIRONMENT, *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, argv, done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done

    def xdp_lb(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("xdp-lb", *words, check=check)

    def write(self, path: str, text: str) -> None:
        """A file in there, and the folder that it is in."""
        there = Path(f"/proc/{self._init}/root{path}")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(text)

    def property(self, name: str) -> str:
        """What systemd says of the service, as `systemctl show` names it."""
        return self.run("systemctl", "show", f"--property={name}", "--value", "xdp-lb").stdout.strip()

    def journal(self) -> str:
        return self.run("journalctl", "--unit=xdp-lb", "--output=cat", "--no-pager").stdout

    def close(self) -> None:
        """All that runs in there ends with its process 1."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init or self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=START_TIMEOUT_S)
        subprocess.run(["unshare", "--mount", "sh", "-c", self._filled(CGROUPS + SWEEP)], check=True)

    def _boot(self) -> None:
        with self._beside("console").open("w") as console:
            boot = ["sh", "-c", self._filled(CGROUPS + BOOT)]
            self._process = self._host.popen(boot, stdout=console, stderr=subprocess.STDOUT)
        wait_until(self._is_up, "systemd up", START_TIMEOUT_S)

    def _is_up(self) -> bool:
        assert self._process
        assert self._process.poll() is None, self._beside("console").read_text()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self._init = int(children) if children else None
        return bool(self._init) and self.run("systemctl", "is-system-running", check=False).stdout == "running\n"

    def _beside(self, suffix: str) -> Path:
        return self._root.with_suffix(f".{suffix}")

    def _filled(self, template: str) -> str:
        entry = scripts()[str(XDP_LB)]
        return template.format(
            environment=shlex.join(ENVIRONMENT),
            function=entry.attr,
            module=entry.module,
            name=self._host.name,
            packages=shlex.quote(sysconfig.get_path("purelib")),
            program=PROGRAM,
            python=shlex.quote(sys.base_prefix),
            repository=shlex.quote(str(REPOSITORY)),
            root=shlex.quote(str(self._root)),
            units=shlex.join(UNITS),
            version=sysconfig.get_python_version(),
        )
