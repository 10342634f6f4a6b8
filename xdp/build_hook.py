"""Hatchling's build hook: the C sources go in, the wheel carries what is compiled from them, and the man pages.

The objects of ``xdp/bpf`` suit any machine, ``lb/hashing/native`` and ``filters/native`` one machine type: the wheel
is for that, and for any Python 3. An editable install is left alone: there what is compiled is the Makefile's business.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TOOLS = ("make", "clang", "llvm-strip")
SOURCES = ("xdp", "lb/hashing/native", "filters/native")
MAN_PAGES = "man"


class CompileHook(BuildHookInterface[BuilderConfig]):
    """Compiles the C sources and writes the man pages before hatchling collects the files of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """For a ``standard`` wheel: compile, or end the build with one line that says why not."""
        if version == "editable":
            return
        self._require_tools()
        for directory in SOURCES:
            self._compile(directory)
        self._make_man_pages()
        build_data["shared_data"][str(Path(self.root, MAN_PAGES))] = "share/man"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _require_tools(self) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            self.app.abort(
                f"xdp-lb: building the wheel: not found: {', '.join(missing)}"
                " (on Debian and Ubuntu: apt-get install make clang llvm libbpf-dev)"
            )

    def _compile(self, directory: str) -> None:
        built = subprocess.run(["make", "-C", str(Path(self.root, directory))], check=False)
        if built.returncode != 0:
            self.app.abort(f"xdp-lb: building the wheel: make -C {directory} failed, see the lines above")

    def _make_man_pages(self) -> None:
        script = Path(self.root, "docs/man/make_pages.py")
        made = subprocess.run([sys.executable, str(script), str(Path(self.root, MAN_PAGES))], check=False)
        if made.returncode != 0:
            self.app.abort("xdp-lb: building the wheel: the man pages were not made, see the lines above")
