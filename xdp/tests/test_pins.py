"""Generations of pins in a bpffs of our own, also from inside `ip netns exec`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import netns

from xdp.errors import NotPermitted
from xdp.object import LB_OBJECT, BpfObject
from xdp.pins import Pins

ROOT = Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Whatever a test leaves mounted there goes with it."""
    yield tmp_path / "run"
    for mount in mounts_below(tmp_path):
        subprocess.run(["umount", str(mount)], check=True)


@pytest.fixture
def pins(run_dir: Path) -> Pins:
    return Pins(run_dir, "blue")


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"xdp-pins-{os.getpid()}"
    netns.create(name)
    yield name
    netns.remove(name)


def mounts_below(path: Path) -> list[Path]:
    mounts = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    paths = (Path(mount.replace("\\040", " ")) for mount in mounts)
    return [mount for mount in paths if mount.is_relative_to(path)]


def pin(pins: Pins) -> Path:
    generation = pins.prepare()
    with BpfObject.open(LB_OBJECT) as obj:
        obj.load()
        obj.pin(str(generation))
    return generation


def test_asking_mounts_nothing(pins: Pins, run_dir: Path) -> None:
    assert pins.current() is None
    assert pins.others() == []
    pins.remove()
    assert not run_dir.exists()


def test_generation_is_in_force_once_it_is_put_there(pins: Pins) -> None:
    first = pin(pins)
    assert pins.current() is None
    assert pins.others() == [first]
    pins.put_in_force(first)
    assert (pins.current(), pins.others()) == (first, [])


def test_next_generation_takes_the_place_of_the_one_in_force(pins: Pins) -> None:
    first, second = pin(pins), pin(pins)
    assert first != second
    pins.put_in_force(first)
    pins.put_in_force(second)
    assert (pins.current(), pins.others()) == (second, [first])
    pins.discard(first)
    assert (pins.current(), pins.others(), first.exists()) == (second, [], False)


def test_number_of_a_generation_is_not_used_while_a_leftover_has_it(pins: Pins) -> None:
    leftover = pins.prepare()
    assert pins.prepare().name == str(int(leftover.name) + 1)


def test_link_that_a_killed_process_left_half_way_is_no_obstacle(pins: Pins) -> None:
    first, second = pin(pins), pin(pins)
    pins.put_in_force(first)
    (first.parent / "next").symlink_to("99")
    pins.put_in_force(second)
    assert pins.current() == second


def test_only_root_may_look_inside(pins: Pins) -> None:
    pin(pins)
    assert pins.mount_point.stat().st_mode & 0o777 == 0o700


def test_last_generation_to_go_takes_the_mount_along(pins: Pins, run_dir: Path) -> None:
    other = Pins(run_dir, "red")
    for each in (pins, other):
        each.put_in_force(pin(each))
    pins.remove()
    assert pins.current() is None
    assert other.current() is not None
    other.remove()
    assert mounts_below(run_dir) == []
    other.remove()


@pytest.mark.parametrize("name", ["a.b.c", ".", "..", "100%", "a%2Eb", "current", "1", "with space"])
def test_namespace_of_any_name_has_its_own_folder(run_dir: Path, name: str) -> None:
    one, other = Pins(run_dir, name), Pins(run_dir, "a%2Eb.c")
    for each in (one, other):
        each.put_in_force(pin(each))
    assert one.current() != other.current()
    one.remove()
    assert (one.current(), other.current() is not None) == (None, True)


@pytest.mark.parametrize("name", ["with space", "with.dot"])
def test_run_directory_may_have_any_name(tmp_path: Path, run_dir: Path, name: str) -> None:
    pins = Pins(tmp_path / name, "blue")
    pins.put_in_force(pin(pins))
    assert pins.current() is not None
    assert len(mounts_below(tmp_path)) == 1
    pins.remove()
    assert mounts_below(tmp_path) == []


def test_run_directory_may_lie_behind_a_symbolic_link(tmp_path: Path, run_dir: Path) -> None:
    run_dir.mkdir()
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    Pins(link, "blue").put_in_force(pin(Pins(link, "blue")))
    assert Pins(run_dir, "blue").current() == Pins(link, "blue").current() is not None
    Pins(link, "blue").remove()
    assert mounts_below(run_dir) == []


def test_pins_made_in_ip_netns_exec_outlive_it(pins: Pins, run_dir: Path, namespace: str) -> None:
    script = (
        "from pathlib import Path\n"
        "from xdp.object import LB_OBJECT, BpfObject\n"
        "from xdp.pins import Pins\n"
        f"pins = Pins(Path({str(run_dir)!r}), 'blue')\n"
        "assert pins.current() is None\n"
        "generation = pins.prepare()\n"
        "obj = BpfObject.open(LB_OBJECT)\n"
        "obj.load()\n"
        "obj.pin(str(generation))\n"
        "pins.put_in_force(generation)\n"
        "assert pins.current() == generation\n"
    )
    run_inside(namespace, script)
    current = pins.current()
    assert current is not None
    with BpfObject.open(LB_OBJECT) as obj:
        obj.adopt(str(current))
    script = f"from pathlib import Path\nfrom xdp.pins import Pins\nPins(Path({str(run_dir)!r}), 'blue')"
    run_inside(namespace, f"{script}.remove()\n")
    assert pins.current() is None
    assert mounts_below(run_dir) == []


def run_inside(namespace: str, script: str) -> None:
    subprocess.run(["ip", "netns", "exec", namespace, sys.executable, "-c", script], cwd=ROOT, check=True)


def test_mounting_without_capabilities_says_what_is_needed(run_dir: Path) -> None:
    run_dir.mkdir()
    os.chmod(run_dir, 0o777)
    script = (
        "import os\nfrom pathlib import Path\nfrom xdp.errors import NotPermitted\nfrom xdp.pins import Pins\n"
        f"pins = Pins(Path({str(run_dir)!r}), 'blue')\n"
        "try:\n    pins.prepare()\nexcept NotPermitted as error:\n    print(error)\n"
    )
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.endswith("run as root (CAP_SYS_ADMIN)\n")
    assert done.stdout.count("\n") == 1
    assert NotPermitted.__name__ not in done.stdout
