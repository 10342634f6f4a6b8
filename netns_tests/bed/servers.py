"""Servers on the hosts of a bed: nginx for HTTP, a small echo for UDP.

What enters is a host; when a start function returns, the server answers on all of the host's
addresses, IPv4 and IPv6, and says in each answer which host it runs on. It ends with the host.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netns_tests.bed.topology import PREFIX, Bed, Host, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
BIG_FILE_SIZE = 100_000_000

NGINX_CONF = """\
user root;
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  default_type text/plain;
  keepalive_requests 100000000;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  add_header X-Backend {label} always;
  server {{
{listens}
    location = / {{ return 200 "{label}\\n"; }}
    location = /client {{ return 200 "$remote_addr\\n"; }}
    location = /big {{ alias {big_file}; }}
    location /uploaded/ {{ root {directory}; client_max_body_size 0; dav_methods PUT; create_full_put_path on; }}
  }}
}}
"""


@dataclass(frozen=True)
class BigFile:
    path: Path
    sha256: str


@functools.cache
def big_file() -> BigFile:
    """The 100 MB behind every `/big`: written once per process, no two blocks of it the same."""
    directory = tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-servers-")
    atexit.register(shutil.rmtree, directory)
    path = Path(directory, "big")
    blocks = random.Random(1)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(BIG_FILE_SIZE // 1_000_000):
            block = blocks.randbytes(1_000_000)
            file.write(block)
            digest.update(block)
    return BigFile(path, digest.hexdigest())


def start_http(bed: Bed, host: Host, ports: Sequence[int] = (80,)) -> subprocess.Popen[str]:
    """nginx: `/` answers the host's label, in the body and in X-Backend; `/client` the client's address.

    `/big` is `big_file()`; what is PUT to `/uploaded/NAME` becomes the file `uploaded(bed, label, NAME)`.
    """
    directory = _directory(bed, host.label)
    directory.mkdir()
    configuration = directory / "nginx.conf"
    listens = "\n".join(f"    listen {port} backlog=4096; listen [::]:{port} backlog=4096;" for port in ports)
    configuration.write_text(
        NGINX_CONF.format(directory=directory, label=host.label, listens=listens, big_file=big_file().path)
    )
    # -e: nginx otherwise opens the distribution's log before it reads the configuration.
    log = directory / "error.log"
    server = host.popen(["nginx", "-p", str(directory), "-c", str(configuration), "-e", str(log)])
    wait_until(
        lambda: server.poll() is not None or all(_accepts(host, port) for port in ports),
        f"{host.label}: nginx accepting",
    )
    if server.poll() is not None:
        raise RuntimeError(f"{host.label}: nginx ended: {log.read_text()}")
    return server


def uploaded(bed: Bed, label: str, name: str) -> Path:
    return _directory(bed, label) / "uploaded" / name


def _directory(bed: Bed, label: str) -> Path:
    return bed.directory / f"nginx-{label}"


def start_udp_echo(host: Host, port: int) -> subprocess.Popen[str]:
    """Answers each datagram with the host's label, a space, and what the datagram held."""
    server = host.popen(
        [sys.executable, "-m", "netns_tests.bed.echo", host.label, str(port)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
    )
    if server.stdout is None or server.stdout.readline() != "ready\n":
        raise RuntimeError(f"{host.label}: UDP echo on port {port} did not start")
    return server


def _accepts(host: Host, port: int) -> bool:
    return all(_connects(host, address, port) for address in ("127.0.0.1", "::1"))


def _connects(host: Host, address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        connection = socket.socket(family, socket.SOCK_STREAM)
    with connection:
        return connection.connect_ex((address, port)) == 0
