"""`xdp-lb stage run` on a host of a bed, and what it prints as JSON."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netns_tests.bed.topology import XDP_LB, Bed, Host, wait_until

STARTED_S = 60  # a compile, beside others

Documents = list[dict[str, Any]]


def environment(bed: Bed) -> dict[str, str]:
    places = {
        "XDP_LB_STATE_DIR": str(bed.directory / "state"),
        "XDP_LB_RUN_DIR": str(bed.directory / "run"),
    }
    return os.environ | places


class Running:
    """`xdp-lb stage run --json` on an interface of a host, as a process."""

    def __init__(self, bed: Bed, host: Host, path: Path, *words: str, interface: str = "eth0") -> None:
        self._bed, self._host = bed, host
        self.output = Path(bed.directory, f"{host.label}-{path.stem}.json")
        with self.output.open("w") as output, self._errors.open("w") as errors:
            command = [str(XDP_LB), "stage", "run", interface, str(path), "--json", "--interval", "200ms", *words]
            self.process = host.popen(command, stdout=output, stderr=errors, env=environment(bed))

    @property
    def _errors(self) -> Path:
        return self.output.with_suffix(".stderr")

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait_for_start(self) -> None:
        wait_until(self._has_started, f"{self.output.stem} runs", STARTED_S)

    def _has_started(self) -> bool:
        assert self.process.poll() is None, self.errors
        return "Ctrl-C stops it" in self.errors

    @property
    def documents(self) -> Documents:
        lines = self.output.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """The last of each table."""
        return {document["table"]: document for document in self.documents if "table" in document}

    def end(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)
        assert self.process.wait(timeout=20) == 0, self.errors


@contextmanager
def running(bed: Bed, host: Host, path: Path, *words: str, interface: str = "eth0") -> Iterator[Running]:
    stage = Running(bed, host, path, *words, interface=interface)
    try:
        stage.wait_for_start()
        yield stage
    finally:
        if stage.process.poll() is None:
            stage.end()


def stages(bed: Bed, host: Host) -> Documents:
    found: Documents = json.loads(bed.xdp_lb("stage", "list", "--json", on=host).stdout)
    return found


def attached(host: Host) -> list[str]:
    """Interfaces that run an XDP program."""
    return [link["ifname"] for link in json.loads(host.run(["ip", "-j", "-d", "link"]).stdout) if "xdp" in link]


def written(bed: Bed, name: str, text: str) -> Path:
    path = bed.directory / name
    path.write_text(text)
    return path
