"""Where BCC and its headers are looked for; what it makes of C is seen in netns_tests/host/test_stage.py."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import pytest

from lb.stages import compile
from lb.stages.compile import NotInstalled, check_installed, headers, load_bcc

ARCHITECTURE = {"x86_64": "x86", "aarch64": "arm64"}[platform.machine()]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No headers, not even those of a BCC_KERNEL_SOURCE of who runs the tests."""
    monkeypatch.setattr(compile, "MODULES", tmp_path / "modules")
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    return tmp_path / "modules"


@pytest.fixture
def bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that is there."""
    package = tmp_path / "bcc"
    package.mkdir()
    (package / "__init__.py").write_text("from . import part\nfound = part.found\n")
    (package / "part.py").write_text("found = True\n")
    monkeypatch.setattr(compile, "BCC", package)
    for name in ("bcc", "bcc.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return package


def install(modules: Path, version: str, *, split: bool) -> None:
    """Headers as Debian splits them in two, or in one tree."""
    own, common = modules / version / "build", modules / version / ("source" if split else "build")
    for folder in ("include", f"arch/{ARCHITECTURE}/include"):
        (own / folder / "generated").mkdir(parents=True)
        (common / folder / "uapi").mkdir(parents=True)
    (common / "include" / "uapi" / "version").write_text(version)


@pytest.mark.parametrize("split", [True, False])
def test_headers_are_the_newest_and_in_one_tree(modules: Path, split: bool) -> None:
    for version in ("6.1.0-9-amd64", "6.1.0-56-amd64", "5.10.0-99-amd64"):
        install(modules, version, split=split)
    with headers() as notes:
        tree = Path(os.environ["BCC_KERNEL_SOURCE"])
        assert (tree / "include" / "uapi" / "version").read_text() == "6.1.0-56-amd64"
        for folder in ("include", f"arch/{ARCHITECTURE}/include"):
            assert sorted(path.name for path in (tree / folder).iterdir()) == ["generated", "uapi"]
    assert "6.1.0-56-amd64" in notes[0]
    assert not tree.exists()
    assert "BCC_KERNEL_SOURCE" not in os.environ


def test_headers_that_bcc_finds_by_itself_are_left_to_it(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(modules, platform.release(), split=True)
    with headers() as notes:
        assert notes == []
        assert "BCC_KERNEL_SOURCE" not in os.environ


def test_what_is_missing_is_named_by_the_names_of_the_distribution(
    modules: Path, bcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "os-release"
    monkeypatch.setattr(compile, "OS_RELEASE", release)
    with pytest.raises(NotInstalled, match=r"apt install linux-headers-(amd64|arm64)$"):
        check_installed()
    release.write_text('NAME="Ubuntu"\nID=ubuntu\n')
    (bcc / "__init__.py").unlink()
    with pytest.raises(NotInstalled, match=r"apt install python3-bpfcc linux-headers-generic$"):
        check_installed()


def test_bcc_is_loaded_without_its_folder_in_the_path(bcc: Path) -> None:
    before = list(sys.path)
    assert load_bcc().found
    assert sys.path == before


def test_a_bcc_that_does_not_load_says_why(bcc: Path) -> None:
    (bcc / "part.py").write_text("raise OSError('libbcc.so.0: cannot open shared object file')\n")
    with pytest.raises(NotInstalled, match=re.escape("libbcc.so.0: cannot open shared object file")):
        load_bcc()


def test_of_a_long_log_the_end_is_shown() -> None:
    log = "\n".join([f"{n}: (b7) r0 = {n}" for n in range(40)] + ["R1 invalid mem access", "processed 41 insns"])
    shown = compile._last_lines(log).splitlines()
    assert shown[-1] == "  R1 invalid mem access"
    assert shown[1] == "  (29 log lines omitted)"
