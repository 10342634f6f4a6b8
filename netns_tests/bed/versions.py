"""Other versions of xdp-lb, as an upgrade finds them: the same Python code over programs whose sources were patched.

Enters: what to replace in the files of xdp/bpf/lb, and a version number. Leaves: a folder as of an installation, really
compiled, whose `xdp-lb` runs on the balancer of a bed; also so that a signal reaches it at given calls.
`python netns_tests/bed/versions.py SIGNAL FUNCTION:N,... WORD...` is that: `xdp-lb WORD...`, which has this signal, by
its number, as it calls a function of this name for the N-th time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from types import FrameType

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache"
XDP_LB = Path(sys.executable).with_name("xdp-lb")

# File of xdp/bpf/lb -> what it says -> what it shall say.
Patches = Mapping[str, Mapping[str, str]]

# Constants only: all maps stay of the shape that they have.
ALIKE: Patches = {"config.h": {".recorded_syns_per_s = 10000,": ".recorded_syns_per_s = 9999,"}}

# What programs count and what they know of flows has another layout, reasons have other numbers; there is one map more.
GROWN: Patches = {
    "counter_maps.h": {
        "struct counter {\n": "struct counter {\n\t__u64 unheard_of;\n",
        "\tDROP_FRAGMENT,\n": "\tDROP_UNHEARD_OF,\n\tDROP_FRAGMENT,\n",
    },
    "flow_types.h": {"struct flow {\n\t__u64 seen_ns;": "struct flow {\n\t__u64 first_ns;\n\t__u64 seen_ns;"},
    "nat_maps.h": {
        "struct nat_flow {\n\t__u64 seen_ns;\n\t__u32 uid;\n\t__u16 member;": (
            "struct nat_flow {\n\t__u64 first_ns;\n\t__u64 seen_ns;\n\t__u32 uid;\n\t__u16 zeros[3];\n\t__u16 member;"
        ),
        "struct nat_reply {\n\t__u64 seen_ns;": "struct nat_reply {\n\t__u64 first_ns;\n\t__u64 seen_ns;",
    },
    "config.h": {"\t__u64 whole_ns;": "\t__u64 unheard_of;\n\t__u64 whole_ns;"},
    "service_maps.h": {
        "#define KNOWN_BITS 8\n": (
            "#define KNOWN_BITS 8\n\nstruct {\n\t__uint(type, BPF_MAP_TYPE_ARRAY);\n\t__uint(max_entries, 4);\n"
            '\t__type(key, __u32);\n\t__type(value, __u64);\n} one_more SEC(".maps");\n'
        ),
    },
}

REFUSED: Patches = {
    "lb.bpf.c": {
        "char LICENSE[]": (
            'SEC("xdp")\nint xdp_beyond(struct xdp_md *ctx)\n{\n\treturn *(int *)(long)ctx->data;\n}\n\nchar LICENSE[]'
        )
    }
}


@dataclass(frozen=True)
class Version:
    """One installation."""

    folder: Path

    @classmethod
    def install(cls, folder: Path, number: str, patches: Patches) -> Version:
        folder.mkdir()
        for package in ("xdp", "lb", "filters"):
            shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("tests"))
        about = folder / f"xdp_lb-{number}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: xdp-lb\nVersion: {number}\n")
        (about / "entry_points.txt").write_text(distribution("xdp-lb").read_text("entry_points.txt") or "")
        for name, replacements in patches.items():
            _patch(folder / "xdp" / "bpf" / "lb" / name, replacements)
        _compile(folder / "xdp", "bpf/lb/lb.bpf.o")
        return cls(folder)

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder)}

    def command(self, *words: str) -> list[str]:
        return [str(XDP_LB), *words]

    def signalled(self, number: signal.Signals, at: Collection[tuple[str, int]], *words: str) -> list[str]:
        """The command; `at`: functions, and which of their calls."""
        calls = ",".join(f"{function}:{nth}" for function, nth in at)
        return [sys.executable, str(Path(__file__)), str(number.value), calls, *words]


def _compile(folder: Path, name: str) -> None:
    """By the Makefile; what came of the same sources and the same compiler before is taken again."""
    kept = CACHE / f"{_digest(folder)}.bpf.o"
    if not kept.exists():
        subprocess.run(["make", "-s", "-C", str(folder), name], check=True)
        CACHE.mkdir(exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        shutil.copy(folder / name, new)
        new.replace(kept)  # whole, whoever else compiles it at this moment
    shutil.copy(kept, folder / name)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256(subprocess.run(["clang", "--version"], check=True, capture_output=True).stdout)
    for path in sorted((folder / "Makefile", *folder.rglob("*.[ch]"))):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _patch(path: Path, replacements: Mapping[str, str]) -> None:
    text = path.read_text()
    for old, new in replacements.items():
        if text.count(old) != 1:
            raise ValueError(f"{path.name}: {old!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    path.write_text(text)


def signal_at(number: int, at: Collection[str]) -> None:
    """Have this process get the signal as it makes these calls in the modules that load and replace programs."""
    calls = Counter[str]()

    def count(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.endswith(WRITERS):
            calls[code.co_name] += 1
            if f"{code.co_name}:{calls[code.co_name]}" in at:
                os.kill(os.getpid(), number)

    sys.setprofile(count)


WRITERS = (
    "dataplane/dataplane.py",
    "dataplane/programs.py",
    "xdp/object.py",
    "xdp/pins.py",
    "xdp/stages.py",
    "xdp/migrate.py",
)


if __name__ == "__main__":
    from lb.cli.main import main  # before all calls are watched, which takes time

    signal_at(int(sys.argv[1]), sys.argv[2].split(","))
    del sys.argv[1:3]
    main()
