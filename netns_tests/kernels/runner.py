"""`make test-kernels`: the checks of checks.py on this kernel and on those in .kernels/, side by side.

Enters: .kernels/NAME/, a kernel's package unpacked (boot/vmlinuz-*, lib/modules/ or usr/lib/modules/), and virtme-ng
in .kernels/venv. Leaves: a table, what has failed below it, and exit status 1 if anything has. Each kernel boots in
an emulated machine, on the files of this host, which it can read but not change; its modules come from the package.
The file system that they share is slow, so what Python reads is handed over as one archive.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netns_tests.bed.servers import REPOSITORY
from netns_tests.kernels.checks import Check, Column

KERNELS = REPOSITORY / ".kernels"
TIMEOUT_S = 1800
END_TIMEOUT_S = 10
MEMORY = "2G"
CPUS = "2"
SHOWN_OF_CONSOLE = 20
WIDTH = 120  # kernels have long names
# Large, and nothing that the tests import; of Python itself, not the packages that the host has installed for it.
LEFT_OUT = re.compile(
    r"\.git|\.hypothesis|\.kernels|\..*_cache|PIL|config-3\..*|ensurepip|fontTools|idlelib|kiwisolver|lib2to3"
    r"|matplotlib|mypy|mypyc|.*__mypyc\..*|numpy|.*\.libs|pip|playwright|ruff|test"
)

# The archive lies on the shared file system; each of its folders hides the one that it was made from, but the modules
# are loaded from there. The host's /tmp is seen here too, changing under its overlay: temporary files have another
# place. There is no udev, so a device file is there only once its module is loaded.
GUEST = """\
set -e
export PATH="$PATH:/usr/sbin:/sbin" TMPDIR=/run/temporary
mkdir /run/files "$TMPDIR"
tar --extract --directory /run/files --file {archive}
mkdir /run/files{kernels}
mount --rbind {kernels} /run/files{kernels}
for folder in {folders}; do mount --rbind "/run/files$folder" "$folder"; done
modprobe tun
cd {repository}
exec {python} -m netns_tests.kernels.checks {result}
"""
RESULT = "result.json"
STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
INSTALLED = ("site-packages", "dist-packages")


def main() -> int:
    console = Console(highlight=False, width=WIDTH)
    if os.geteuid() != 0:
        console.print("test-kernels: run as root: it makes network namespaces")
        return 1
    columns = list(all_columns(console))
    console.print(table(columns))
    failures = [(column.kernel, check) for column in columns for check in column.checks if check.failed]
    for kernel, check in failures:
        console.print(Text(f"{kernel}: {check.name}: {check.value}", style="bold red"))
        console.print(Text(check.details))
    return 1 if failures else 0


def all_columns(console: Console) -> Iterator[Column]:
    """This kernel goes first, since its run leaves Python's caches behind. The others run at the same time."""
    images = sorted(KERNELS.glob("*/boot/vmlinuz-*"))
    with TemporaryDirectory(dir=KERNELS, prefix="run-") as name:
        directory = Path(name)
        console.print(f"checking this kernel, then {len(images)} more, {TIMEOUT_S // 60} minutes each at most")
        here = check_here(directory / RESULT)
        write_archive(directory / "files.tar")
        with ThreadPoolExecutor() as machines:
            yield from machines.map(lambda image: check_in_machine(image, directory), images)
        yield here


def check_here(result: Path) -> Column:
    done, said = run([sys.executable, "-m", "netns_tests.kernels.checks", str(result)])
    return column_of(result, "this kernel", done, said)


def check_in_machine(image: Path, directory: Path) -> Column:
    kernel = image.name.removeprefix("vmlinuz-")
    results = directory / kernel
    results.mkdir()
    script = directory / f"{kernel}.sh"
    script.write_text(guest_script(directory / "files.tar", results / RESULT))
    done, said = run(machine(image, script, results))
    return column_of(results / RESULT, kernel, done, said)


def machine(image: Path, script: Path, results: Path) -> list[str]:
    """Emulated: where there is a /dev/kvm it need not work, as in many a machine that is virtual itself."""
    vng = [str(KERNELS / "venv" / "bin" / "vng"), "--verbose", "--disable-kvm", "--force-9p"]
    size = ["--cpus", CPUS, "--memory", MEMORY, "--append", "mitigations=off loglevel=4"]
    return [*vng, *size, "--rwdir", str(results), "--run", str(image), "--exec", f"bash {shlex.quote(str(script))}"]


def run(command: Sequence[str]) -> tuple[bool, str]:
    """Whether it ended in time, and what it said. Whatever it has started ends with it."""
    environment = os.environ | {"PATH": f"{KERNELS / 'venv' / 'bin'}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False, end(process)
    except BaseException:
        end(process)
        raise
    return True, said


def end(process: subprocess.Popen[str]) -> str:
    """What it had said; it may have left children that keep the pipe open."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=END_TIMEOUT_S)[0]
    return ""


def column_of(result: Path, kernel: str, done: bool, said: str) -> Column:
    """What has been found out; where that is not all, a failed check tells why."""
    column = Column.read(result) if result.exists() else Column(kernel)
    if not done or not column.complete:
        why = "stopped early" if done else f"stopped after {TIMEOUT_S} s"
        console = "\n".join(said.splitlines()[-SHOWN_OF_CONSOLE:])
        column.checks.append(Check("came to the end", why, failed=True, details=console))
    return column


# What the machine gets


def folders() -> list[Path]:
    """The repository, the virtual environment where that is not in it, Python's own modules."""
    environment = Path(sys.prefix).resolve()
    return [REPOSITORY, STDLIB, *([] if environment.is_relative_to(REPOSITORY) else [environment])]


def write_archive(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for folder in folders():
            archive.add(folder, filter=wanted)


def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    path = Path("/", member.name)
    if LEFT_OUT.fullmatch(path.name) or (path.parent == STDLIB and path.name in INSTALLED):
        return None
    return member


def guest_script(archive: Path, result: Path) -> str:
    return GUEST.format(
        kernels=shlex.quote(str(KERNELS)),
        archive=shlex.quote(str(archive)),
        folders=shlex.join(map(str, folders())),
        repository=shlex.quote(str(REPOSITORY)),
        python=shlex.quote(sys.executable),
        result=shlex.quote(str(result)),
    )


# What is shown


def table(columns: Sequence[Column]) -> Table:
    """A row for each check, a column for each kernel; the last one's order, since it has come farthest if any has."""
    shown = Table(box=SIMPLE)
    shown.add_column("check")
    for column in columns:
        shown.add_column(column.kernel)
    for name in dict.fromkeys(check.name for column in reversed(columns) for check in column.checks):
        shown.add_row(name, *(cell(column, name) for column in columns))
    return shown


def cell(column: Column, name: str) -> Text:
    check = next((check for check in column.checks if check.name == name), None)
    return Text(check.value, style="bold red" if check.failed else "") if check else Text("-")
