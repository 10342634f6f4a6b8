"""Who can change what a path leads to, on a real file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lb.host.trusted_file import fault_of_program

NOBODY = 65534


@pytest.fixture
def program(root_directory: Path) -> Path:
    path = root_directory / "bin" / "check"
    path.parent.mkdir(mode=0o755)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_what_root_alone_can_change_is_trusted(program: Path) -> None:
    assert fault_of_program(str(program)) == ""
    assert fault_of_program("/bin/sh") == ""  # through links of the distribution
    assert fault_of_program(f"{program.parent}/../bin/check") == ""


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_each_directory_and_the_file_count(program: Path, mode: int) -> None:
    for place in (program, program.parent, program.parents[1]):
        place.chmod(mode)
        assert fault_of_program(str(program)) == f"{place}: writable by others than root: run chmod go-w {place}"
        place.chmod(0o755)
        os.chown(place, NOBODY, 0)
        assert fault_of_program(str(program)) == f"{place}: not owned by root: run chown root {place}"
        os.chown(place, 0, 0)


def test_links_are_followed_step_by_step(program: Path) -> None:
    """A trusted link to a link that others can replace, which leads to a trusted file."""
    anybodys = program.parents[1] / "anybodys"
    anybodys.mkdir()
    anybodys.chmod(0o1777)
    (anybodys / "middle").symlink_to(program)
    link = program.with_name("link")
    link.symlink_to(anybodys / "middle")
    assert fault_of_program(str(link)) == f"{anybodys}: writable by others than root: run chmod go-w {anybodys}"
    own = program.with_name("own")
    own.symlink_to("check")
    assert fault_of_program(str(own)) == ""
    os.chown(own, NOBODY, 0, follow_symlinks=False)
    assert fault_of_program(str(own)) == f"{own}: not owned by root: run chown root {own}"


def test_what_cannot_be_run_is_said(program: Path) -> None:
    assert fault_of_program(f"{program}2") == f"{program}2: not found"
    assert fault_of_program(f"{program}/x") == f"{program}/x: not a directory"
    assert fault_of_program(str(program.parent)) == f"{program.parent}: not a file"
    loop = program.with_name("loop")
    loop.symlink_to("loop")
    assert fault_of_program(str(loop)) == f"{loop}: too many levels of symbolic links"
    program.chmod(0o644)
    assert fault_of_program(str(program)) == f"{program}: not executable: run chmod +x {program}"
