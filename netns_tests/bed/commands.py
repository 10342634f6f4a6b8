"""The package's commands without a start of Python for each: a server that has imported their modules forks instead.

Enters: what `subprocess` would get: a console script with its words, the network namespace that it is to run in,
environment, working directory and standard streams. Leaves: a child of this process that runs the script's function as
`ip netns exec NAMESPACE SCRIPT WORD...` would, with a pid, an exit status, descriptors, locks and signals of its own.

The server does nothing but import, so that nothing comes to a command that a fresh interpreter would not have: it
calls no function of the package and has one thread, and no descriptors but its streams and a socket. What it forks are
children of the process that asks, its siblings.

What an interpreter finds only when it starts (PYTHONPATH, LD_PRELOAD, a locale) cannot be changed in a fork: a server
is for one such environment, and `Server.can_run` says of which commands it is no substitute.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import locale
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, distribution
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, TextIO, cast

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("xdp", "filters", "lb")
MODULES = ("netns_tests.bed.echo", "netns_tests.bed.load")  # which tests start with `python -m`; each has a main()
NAMESPACES = Path("/run/netns")
# Of the environment, what is read once: by the dynamic linker, by Python as it starts, for the encoding of streams.
READ_AT_START = ("LD_", "PYTHON", "LC_", "LANG")
OPTIONS = {"stdin", "stdout", "stderr", "env", "cwd", "text", "encoding"}

# include/uapi/linux: prctl.h, sched.h, mount.h
PR_SET_NAME = 15
CLONE_PARENT, CLONE_NEWNS, CLONE_NEWNET = 0x00008000, 0x00020000, 0x40000000
SYS_CLONE3 = 435  # on every architecture
MS_RDONLY, MS_REC, MS_SLAVE, MNT_DETACH = 0x1, 0x4000, 0x80000, 0x2

Main = Callable[[], Any]


def scripts() -> dict[str, EntryPoint]:
    """The console scripts of the package, by the paths where they are installed."""
    installed = distribution("xdp-lb").entry_points.select(group="console_scripts")
    return {str(Path(sys.executable).with_name(entry.name)): entry for entry in installed}


class Server:
    """Started with the first command that it is asked for, in this environment."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._programs = {*scripts(), *MODULES}
        self._environment = dict(environment)
        self._started_in = _read_at_start(environment)
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def can_run(self, argv: Sequence[str], options: Mapping[str, Any]) -> bool:
        """Whether a fork does all that is asked for."""
        environment = options.get("env") or os.environ
        return (
            _program(argv)[0] in self._programs
            and options.keys() <= OPTIONS
            and bool(options.get("text"))
            and _read_at_start(environment) == self._started_in
        )

    def start(self, request: Mapping[str, Any], streams: Sequence[int]) -> int:
        """The pid of a new child of this process. RuntimeError where the server has ended."""
        body = json.dumps(request).encode()
        with self._lock:
            connection = self._connection or self._connect()
            try:
                socket.send_fds(connection, [len(body).to_bytes(8, "big")], list(streams))
                connection.sendall(body)
                return int.from_bytes(_received(connection, 8), "big")
            except (EOFError, OSError) as error:
                raise RuntimeError("the server of commands has ended") from error

    def close(self) -> None:
        if self._connection and self._process:
            self._connection.close()
            self._process.wait(timeout=10)
        self._connection = self._process = None

    def _connect(self) -> socket.socket:
        self._connection, theirs = socket.socketpair()
        # The modules of the package are those that a script of this environment has, not the working directory's.
        code = f"import sys; del sys.path[0]; from {__name__} import end, serve; end(serve({theirs.fileno()}))"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=self._environment,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        return self._connection


_server: Server | None = None


@contextlib.contextmanager
def serving(server: Server | None) -> Iterator[None]:
    """What can be forked comes from this server meanwhile; from none: each script is started."""
    global _server
    before, _server = _server, server
    try:
        yield
    finally:
        _server = before


def popen(namespace: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """As `subprocess.Popen`, in a network namespace."""
    if _server and _server.can_run(argv, options):
        return Command(_server, namespace, list(argv), **options)
    return subprocess.Popen(["ip", "netns", "exec", namespace, *argv], **options)


def run(
    namespace: str,
    argv: Sequence[str],
    *,
    check: bool = False,
    capture_output: bool = False,
    timeout: float | None = None,
    input: str | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, in a network namespace."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with popen(namespace, argv, **options) as process:
        try:
            out, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


class Command(subprocess.Popen[str]):
    """A process that the server has forked. What is used of `Popen` is here; its own start is not."""

    def __init__(
        self,
        server: Server,
        namespace: str,
        argv: list[str],
        *,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        text: bool = True,
        encoding: str | None = None,
    ) -> None:
        self.args = argv
        self.encoding = encoding or locale.getencoding()
        self.returncode: int | None = None  # as it is until the end
        program, words = _program(argv)
        request = {
            "namespace": namespace,
            "name": Path(argv[0]).name,
            "program": program,
            "argv": words,
            "environment": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "cpus": list(os.sched_getaffinity(0)),
        }
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            stream = partial(_stream, ours, theirs, self.encoding)
            self.stdin, near = stream(stdin, 0)
            self.stdout, out = stream(stdout, 1)
            self.stderr, errors = (None, out) if stderr == subprocess.STDOUT else stream(stderr, 2)
            self.pid = server.start(request, [near, out, errors])
            ours.pop_all()
        self._waiting = threading.Lock()

    def poll(self) -> int | None:
        with self._waiting:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                self._wait_for(pidfd, timeout)
            finally:
                os.close(pidfd)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _wait_for(self, pidfd: int, timeout: float | None) -> None:
        with selectors.DefaultSelector() as ended:
            ended.register(pidfd, selectors.EVENT_READ)
            ended.select(timeout)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> Any:
        """All that it still prints on its pipes. After TimeoutExpired, what was read until then is lost."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin and not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(input or "")
        printed = _read_all(self.stdout, self.stderr, deadline=deadline)
        if printed is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(_left(deadline))
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        return tuple(data if data is None else _text(data, self.encoding) for data in printed)

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _read_all(*pipes: IO[str] | None, deadline: float | None) -> tuple[bytes | None, ...] | None:
    """To the end of each; None if that has not come in time."""
    read = {number: b"" for number, pipe in enumerate(pipes) if pipe}
    with selectors.DefaultSelector() as readable:
        for number, pipe in enumerate(pipes):
            if pipe and not pipe.closed:
                readable.register(pipe, selectors.EVENT_READ, number)
        while readable.get_map():
            events = readable.select(_left(deadline))
            if not events:
                return None
            for key, _ in events:
                data = os.read(key.fd, 1 << 16)
                read[key.data] += data
                if not data:
                    readable.unregister(key.fileobj)
    return tuple(read.get(number) for number in range(len(pipes)))


def _text(data: bytes, encoding: str) -> str:
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0, deadline - time.monotonic())


def _stream(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack, encoding: str, wanted: Any, number: int
) -> tuple[TextIO | None, int]:
    """This end of a pipe, if one is wanted, and the command's descriptor; what to close of either is left behind."""
    if wanted is None:
        return None, number
    if wanted == subprocess.DEVNULL:
        null = os.open(os.devnull, os.O_RDWR)
        theirs.callback(os.close, null)
        return None, null
    if wanted != subprocess.PIPE:
        return None, wanted if isinstance(wanted, int) else wanted.fileno()
    reader, writer = os.pipe()
    near, far, mode = (writer, reader, "w") if number == 0 else (reader, writer, "r")
    theirs.callback(os.close, far)
    return cast(TextIO, ours.enter_context(open(near, mode, encoding=encoding))), far


def _program(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """What is started, a script or a module, and what it finds in `sys.argv`."""
    if argv[:2] == [sys.executable, "-m"]:
        return argv[2], argv[2:]
    return argv[0], argv


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


def _received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


# The server


def serve(descriptor: int) -> Main:
    """Answers until the other end is closed. In a child: what it is to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for those who ask
    mains = import_all()
    gc.collect()
    gc.freeze()  # else a collection in a child would copy every page
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    while (request := _request(connection)) is not None:
        words, streams = request
        pid = _fork_sibling()
        if pid == 0:
            connection.detach()
            return become(words, streams, mains)
        for stream in streams:
            os.close(stream)
        connection.sendall(pid.to_bytes(8, "big"))
    return lambda: 0


def import_all() -> dict[str, Main]:
    """Every module of the package, whose functions import from each other as late as they can; what scripts call."""
    for name in modules():
        importlib.import_module(name)
    mains = {name: importlib.import_module(name).main for name in MODULES}
    return mains | {path: entry.load() for path, entry in scripts().items()}


def modules() -> Iterator[str]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if not {"tests", "build_hook", "__main__"} & set(parts):
                yield ".".join(parts).removesuffix(".__init__")


def _request(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    if not header:
        return None
    body = _received(connection, int.from_bytes(header, "big"))
    return json.loads(body), streams


class _CloneArgs(ctypes.Structure):
    """struct clone_args, <linux/sched.h>"""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls")
    )


def _fork_sibling() -> int:
    """As os.fork(), but a child of this process's parent."""
    arguments = _CloneArgs(flags=CLONE_PARENT)
    python = ctypes.pythonapi  # nothing else of Python runs between these calls
    python.PyOS_BeforeFork()
    pid: int = ctypes.PyDLL(None).syscall(SYS_CLONE3, ctypes.byref(arguments), ctypes.sizeof(arguments))
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError("clone3: no child")
    return pid


# A command


def become(request: Mapping[str, Any], streams: Sequence[int], mains: Mapping[str, Main]) -> Main:
    """Make of this process what a start of the script would be, up to its call."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=os.isatty(1))
    enter(request["namespace"])
    os.chdir(request["cwd"])
    os.sched_setaffinity(0, request["cpus"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = request["argv"]
    sys.path.insert(0, request["cwd"] if request["program"] in MODULES else str(Path(sys.argv[0]).parent))
    ctypes.CDLL(None).prctl(PR_SET_NAME, request["name"].encode())
    return mains[request["program"]]


def end(main: Main) -> None:
    """The call, and the end of the process as of a script that says `sys.exit(main())`.

    Where that is no more than to flush, it is done at once: to take 1,000 modules apart takes longer than a command.
    """
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    if not isinstance(code, int | None) or threading.active_count() > 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(code)
    os._exit((code or 0) & 0xFF)


def enter(namespace: str) -> None:
    """As `ip netns exec` does: with mounts of its own, whose /sys shows the devices of the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / namespace).open("rb") as file:
        _succeed(libc.setns(file.fileno(), CLONE_NEWNET))
    _succeed(libc.unshare(CLONE_NEWNS))
    _succeed(libc.mount(b"", b"/", None, MS_SLAVE | MS_REC, None))
    flags = MS_RDONLY if os.statvfs("/sys").f_flag & os.ST_RDONLY else 0
    _succeed(libc.umount2(b"/sys", MNT_DETACH))
    _succeed(libc.mount(namespace.encode(), b"/sys", b"sysfs", flags, None))


def _succeed(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
