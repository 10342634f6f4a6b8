"""Hatchling's build hook: the C sources under ``xdp/bpf`` go in, the wheel carries their objects.

An editable install is left alone: there the objects are the Makefile's business.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TOOLS = ("make", "clang", "llvm-strip")


class BpfBuildHook(BuildHookInterface[BuilderConfig]):
    """Compiles the BPF objects before hatchling collects the files of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """For a ``standard`` wheel: compile, or end the build with one line that says why not."""
        if version == "editable":
            return
        self._require_tools()
        self._compile()

    def _require_tools(self) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            self.app.abort(
                f"xdp-lb: building the wheel: not found: {', '.join(missing)}"
                " (on Debian and Ubuntu: apt-get install make clang llvm libbpf-dev)"
            )

    def _compile(self) -> None:
        built = subprocess.run(["make", "-C", str(Path(self.root, "xdp"))], check=False)
        if built.returncode != 0:
            self.app.abort("xdp-lb: building the wheel: make -C xdp failed, see the lines above")
