"""Words for the shell's Tab key: VIPs and backends of the store, interfaces of the host.

In comes what has been typed so far; out go candidates. A completion reads and never writes, and
says nothing when it cannot: an error message in the middle of a command line helps nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from lb.model.state import State
from lb.model.vip import Vip

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "xdp-lb"
VARIABLE = "_XDP_LB_COMPLETE"
INTERFACES = Path("/sys/class/net")

BASH_SCRIPT = """\
%(complete_func)s() {
    local IFS=$'\\n' kind value
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            plain) COMPREPLY+=("$value") ;;
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
        esac
    done < <(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class BashWithColons(BashComplete):
    """Bash breaks words behind colons, and every VIP has some, and before the @ of a set: read the line itself, and
    answer with the part from the last break on, which is all that bash replaces."""

    source_template = BASH_SCRIPT

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode()
        words = split_arg_string(line)[1:]
        self.incomplete = words.pop() if words and not line[-1].isspace() else ""
        return words, self.incomplete

    def format_completion(self, item: CompletionItem) -> str:
        kept = max(self.incomplete.rfind(":") + 1, self.incomplete.rfind("@"))
        typed = self.incomplete[:kept]
        return f"{item.type},{item.value.removeprefix(typed)}"


add_completion_class(BashWithColons)


def script(cli: click.Command, shell: str) -> str:
    """What `shell` has to source so that Tab completes xdp-lb's words."""
    completion = get_completion_class(shell)
    assert completion is not None, shell
    return completion(cli, {}, PROGRAM, VARIABLE).source()


def interfaces(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = sorted(path.name for path in INTERFACES.iterdir()) if INTERFACES.is_dir() else []
    taken = ctx.params.get(param.name or "") or ()
    return _matching((name for name in names if name not in taken), incomplete)


def vips(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _matching((str(service) for service in _state(ctx).services), incomplete)


def backends(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The backends of the VIP that stands before."""
    vip = ctx.params.get("vip")
    services = [s for s in _state(ctx).services if isinstance(vip, Vip) and s.vip == vip]
    return _matching((str(b) for service in services for b in service.backends), incomplete)


def _matching(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _state(ctx: click.Context) -> State:
    try:
        with ctx.find_root().obj(write=False) as balancer:
            state: State = balancer.state
            return state
    except Exception:  # whatever it is, the command itself will tell
        return State()
