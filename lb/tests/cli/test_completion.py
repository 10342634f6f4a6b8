from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from lb.cli import completion
from lb.cli.main import cli
from lb.errors import StoreError
from lb.model.options import Options, parse_network
from lb.model.state import Backend, Service, State
from lb.model.vip import Vip

WEB = Service(Vip.parse("10.0.0.1:80"), backends=(Backend.parse("10.0.0.11:80"),))
DNS = Service(Vip.parse("[2001:db8::1]:53/udp"), backends=(Backend.parse("[2001:db8::11]:53"),))

NEAR = Service(Vip.parse("10.0.0.1:80@near"), options=Options(sources=(parse_network("10.7.0.0/16"),)))


@contextmanager
def stored(*, write: bool) -> Iterator[SimpleNamespace]:
    assert not write
    yield SimpleNamespace(state=State((WEB, NEAR, DNS)))


def unreadable(*, write: bool) -> AbstractContextManager[SimpleNamespace]:
    raise StoreError("store state.db: damaged")


def complete(line: str, opener: object = stored) -> list[str]:
    """What bash is told for a cursor at the end of `line`."""
    variables = {
        completion.VARIABLE: "bash_complete",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
    }
    result = CliRunner().invoke(cli, env=variables, prog_name="xdp-lb", complete_var=completion.VARIABLE, obj=opener)
    assert result.stderr == ""
    return [each.partition(",")[2] for each in result.stdout.split()]


def test_commands_complete() -> None:
    assert complete("xdp-lb backend d") == ["drain"]


@pytest.fixture
def two_interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eth0", "eth1"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(completion, "INTERFACES", tmp_path)


@pytest.mark.usefixtures("two_interfaces")
def test_interfaces_complete_once_each() -> None:
    assert complete("xdp-lb attach ") == ["eth0", "eth1"]
    assert complete("xdp-lb attach eth0 ") == ["eth1"]


def test_vips_complete() -> None:
    assert complete("xdp-lb vip remove ") == ["10.0.0.1:80/tcp", "10.0.0.1:80/tcp@near", "[2001:db8::1]:53/udp"]


def test_bash_gets_a_set_with_its_at_sign() -> None:
    assert complete("xdp-lb vip remove 10.0.0.1:80/tcp@") == ["@near"]
    assert complete("xdp-lb vip remove 10.0.0.1:80/tcp@n") == ["@near"]


def test_bash_gets_what_follows_the_last_colon_typed() -> None:
    assert complete("xdp-lb vip remove 10.0.0.1:") == ["80/tcp", "80/tcp@near"]
    assert complete("xdp-lb vip remove [2001:db8::1]:5") == ["53/udp"]


def test_backends_of_the_vip_complete() -> None:
    assert complete("xdp-lb backend drain 10.0.0.1:80 ") == ["10.0.0.11:80"]
    assert complete("xdp-lb backend drain [2001:db8::1]:53/udp [2001:db8::") == ["11]:53"]


def test_backends_of_a_vip_that_is_not_served_do_not_complete() -> None:
    assert complete("xdp-lb backend drain 10.0.0.9:80 ") == []


def test_completion_is_silent_about_half_a_vip_and_a_damaged_store() -> None:
    assert complete("xdp-lb backend drain 10.0 ") == []
    assert complete("xdp-lb vip remove ", unreadable) == []


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_has_a_script(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert completion.VARIABLE in result.stdout


def test_bash_takes_the_answers_as_they_are(tmp_path: Path) -> None:
    """The brackets of an IPv6 address are no pattern for file names, which would match `b` here."""
    (tmp_path / "b").touch()
    answers = "xdp-lb() { echo plain,[abc]; echo plain,10.0.0.1:80/tcp; }"
    ask = 'COMP_LINE="xdp-lb vip remove " COMP_POINT=18; _xdp_lb_completion xdp-lb'
    script = completion.script(cli, "bash")
    bash = subprocess.run(
        [
            "bash",
            "--norc",
            "-c",
            f"{answers}\n{script}\n{ask}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (bash.stdout.splitlines(), bash.stderr) == (["[abc]", "10.0.0.1:80/tcp"], "")
