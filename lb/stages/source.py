"""The C around a user's stage: what BCC compiles is a prelude, the user's file, and a program that calls its function.

Enters: the user's file, and the place that the stage will have. Leaves: one text for BCC. The contract of the function,
`int stage(struct xdp_md *ctx)`: XDP_DROP drops the packet, every other value lets it go on. The program around it looks
after the rest: packets of other interfaces go on untouched, and going on is to tail-call all places behind its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lb.errors import InvalidInput

PROGRAM = "xdp_lb_stage"
STAGES, VERDICTS = "xdp_lb_stages", "xdp_lb_verdicts"
OWN_TABLES = {STAGES, VERDICTS}
DEFAULT_FUNCTION = "stage"
EXAMPLES = Path(__file__).with_name("examples")

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# struct verdict of xdp/bpf/lb/stage_maps.h, under a name that no user's file has
_VERDICT = "struct xdp_lb_verdict { u32 action; u32 reason; u32 egress; u32 bytes; };"
_OWN_VERDICT = """\
static __always_inline struct xdp_lb_verdict *xdp_lb_verdict(void)
{
	u32 first = 0;

	return xdp_lb_verdicts.lookup(&first);
}
"""

_END = "\treturn XDP_PASS;\n"
_END_BEHIND = """\
	struct xdp_lb_verdict *verdict = xdp_lb_verdict();

	return verdict ? verdict->action : XDP_ABORTED;
"""


@dataclass(frozen=True, slots=True)
class Source:
    """A user's file: its text, the function in it, and macros (NAME or NAME=VALUE). Raises InvalidInput, OSError."""

    path: Path
    text: str
    function: str
    defines: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, function: str = DEFAULT_FUNCTION, defines: Sequence[str] = ()) -> Source:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            raise InvalidInput(f"{path}: not a text file") from None
        for define in defines:
            if not _IDENTIFIER.fullmatch(define.partition("=")[0]):
                raise InvalidInput(f"-D {define}: not NAME or NAME=VALUE")
        if not _IDENTIFIER.fullmatch(function) or not re.search(rf"\b{function}\s*\(", text):
            raise InvalidInput(f"{path}: no function {function}(struct xdp_md *ctx): use --function to name another")
        return cls(path, text, function, tuple(defines))

    @property
    def traces(self) -> bool:
        return "bpf_trace_printk" in self.text

    def histogram_kind(self, table: str) -> str | None:
        """How BPF_HISTOGRAM's `table` is shown: by powers of two where the file takes logarithms; None: it is none.

        To the kernel a histogram is an array or a hash like any other."""
        declared = rf'\bBPF_(HISTOGRAM\s*\(|TABLE\s*\(\s*"histogram"[^)]*,)\s*{table}\b'
        if not re.search(declared, self.text):
            return None
        return "log2_histogram" if re.search(r"\bbpf_log2l?\s*\(", self.text) else "histogram"


@dataclass(frozen=True, slots=True)
class Chain:
    """The places behind the stage's own, and where the map of them is pinned; `verdicts`: the same of the balancer's
    verdicts, for a stage behind it, and `reasons` their enum reason."""

    stages: Path
    places: int
    following: tuple[int, ...]
    verdicts: Path | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)


def wrapped(source: Source, ifindex: int, chain: Chain | None, mark: str) -> str:
    """The text for BCC; without a chain the stage stands alone on its interface. Lines of bpf_trace_printk() begin with
    `mark`: the kernel has but one trace for all programs."""
    name = json.dumps(str(source.path))
    return "\n".join(
        (_prelude(source, chain, mark), f"#line 1 {name}", source.text, '#line 1 "xdp-lb"', "")
    ) + _program(source.function, ifindex, chain)


def _prelude(source: Source, chain: Chain | None, mark: str) -> str:
    """The function becomes part of the program, whether its author calls it static or not: C takes the linkage of the
    first declaration."""
    lines = ['#line 1 "xdp-lb"']
    if source.traces:
        lines.append(
            f"#define bpf_trace_printk(format, args...) ({{ char _format[] = {json.dumps(mark)} format;"
            " bpf_trace_printk_(_format, sizeof(_format), ##args); })"
        )
    if chain:
        lines.append(_pinned_table("prog", "u32", STAGES, chain.places, chain.stages))
    if chain and chain.verdicts:
        table = _pinned_table("percpu_array", "struct xdp_lb_verdict", VERDICTS, 1, chain.verdicts)
        lines += [_reason_enum(chain.reasons), _VERDICT, table, _OWN_VERDICT]
    lines.append(f"static __attribute__((always_inline)) int {source.function}(struct xdp_md *ctx);")
    return "\n".join(lines)


def _reason_enum(reasons: Mapping[str, int]) -> str:
    return f"enum xdp_lb_reason {{ {', '.join(f'XDP_LB_{name} = {number}' for name, number in reasons.items())} }};"


def _pinned_table(kind: str, value: str, name: str, entries: int, path: Path) -> str:
    return f'BPF_TABLE_PINNED("{kind}", u32, {value}, {name}, {entries}, {json.dumps(str(path))});'


def _program(function: str, ifindex: int, chain: Chain | None) -> str:
    calls = "".join(f"\t{STAGES}.call(ctx, {place});\n" for place in chain.following) if chain else ""
    return f"""\
int {PROGRAM}(struct xdp_md *ctx)
{{
	if (ctx->ingress_ifindex == {ifindex} && {function}(ctx) == XDP_DROP)
		return XDP_DROP;
{calls}{_END_BEHIND if chain and chain.verdicts else _END}}}
"""


# What comes along


def examples() -> list[tuple[Path, str]]:
    """Path and first sentence of each."""
    found = sorted(EXAMPLES.glob("*.c"))
    return [(path, path.read_text().splitlines()[1].strip("/* ")) for path in found]
