"""The C around a user's stage, and what of the user's file is read before any compiler sees it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lb.errors import InvalidInput
from lb.stages.source import EXAMPLES, Chain, Source, examples, wrapped

MARK = "xdp-lb stage 1: "
PLAIN = "int stage(struct xdp_md *ctx)\n{\n\treturn XDP_PASS;\n}\n"
IN_FRONT = Chain(Path("/run/map_stages"), 10, (3, 4, 5))
BEHIND = Chain(Path("/run/map_stages"), 10, (8, 9), Path("/run/map_verdicts"), {"GO_ON": 0, "FORWARDED": 1})


def source(text: str, function: str = "stage") -> Source:
    return Source(Path("a.c"), text, function, ())


def program(chain: Chain | None, function: str = "stage") -> list[str]:
    text = wrapped(source(PLAIN, function), 7, chain, MARK)
    return [line.strip() for line in text[text.index("int xdp_lb_stage(") :].splitlines()]


def test_a_stage_alone_passes_what_it_does_not_drop() -> None:
    assert program(None) == [
        "int xdp_lb_stage(struct xdp_md *ctx)",
        "{",
        "if (ctx->ingress_ifindex == 7 && stage(ctx) == XDP_DROP)",
        "return XDP_DROP;",
        "return XDP_PASS;",
        "}",
    ]


def test_a_stage_in_front_goes_on_through_all_places_behind_its_own() -> None:
    calls = [f"xdp_lb_stages.call(ctx, {place});" for place in (3, 4, 5)]
    assert program(IN_FRONT, "mine")[2:-1] == [
        "if (ctx->ingress_ifindex == 7 && mine(ctx) == XDP_DROP)",
        "return XDP_DROP;",
        *calls,
        "return XDP_PASS;",
    ]


def test_a_stage_behind_ends_with_the_verdict() -> None:
    calls = [f"xdp_lb_stages.call(ctx, {place});" for place in (8, 9)]
    lines = program(BEHIND)
    assert [line for line in lines if ".call(" in line] == calls
    assert lines[-2:] == ["return verdict ? verdict->action : XDP_ABORTED;", "}"]
    assert "enum xdp_lb_reason { XDP_LB_GO_ON = 0, XDP_LB_FORWARDED = 1 };" in wrapped(source(PLAIN), 7, BEHIND, MARK)


def test_lines_are_counted_from_the_first_of_the_users_file() -> None:
    lines = wrapped(source(PLAIN), 7, IN_FRONT, MARK).splitlines()
    assert lines[lines.index('#line 1 "a.c"') + 1] == PLAIN.splitlines()[0]


def test_paths_are_quoted_for_c() -> None:
    chain = Chain(Path('/run/a "b"\\c'), 10, (2,))
    assert '"/run/a \\"b\\"\\\\c"' in wrapped(source(PLAIN), 7, chain, MARK)


def test_traced_lines_are_marked_only_where_there_are_any() -> None:
    traced = source(PLAIN.replace("return", 'bpf_trace_printk("x\\n");\n\treturn'))
    assert f'"{MARK}" format' in wrapped(traced, 7, None, MARK)
    assert MARK not in wrapped(source(PLAIN), 7, None, MARK)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("BPF_HISTOGRAM(sizes);", "histogram"),
        ("BPF_HISTOGRAM(sizes);  bpf_log2l(bytes)", "log2_histogram"),
        ("BPF_HISTOGRAM( sizes , struct key_t, 100); bpf_log2 (bytes)", "log2_histogram"),
        ('BPF_TABLE("histogram", int, u64, sizes, 64);', "histogram"),
        ("BPF_HISTOGRAM(sizes_of_all);", None),
        ("BPF_HASH(sizes);", None),
        ('BPF_TABLE("hash", int, u64, sizes, 64); bpf_log2l(bytes)', None),
    ],
)
def test_histograms_are_told_by_their_declaration(text: str, kind: str | None) -> None:
    assert source(text).histogram_kind("sizes") == kind


@pytest.mark.parametrize(
    ("text", "function", "defines", "said"),
    [
        (PLAIN, "other", (), "no function other(struct xdp_md *ctx): use --function to name another"),
        ("int stages(void);", "stage", (), "no function stage"),
        (PLAIN, "stage(", (), "no function stage("),
        (PLAIN, "stage", ("1X=3",), "-D 1X=3: not NAME or NAME=VALUE"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_once(
    tmp_path: Path, text: str, function: str, defines: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "a.c"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=re.escape(said)):
        Source.read(path, function, defines)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.o"
    path.write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(InvalidInput, match="not a text file"):
        Source.read(path)


def test_examples_have_a_sentence_each() -> None:
    assert {path for path, _ in examples()} == set(EXAMPLES.glob("*.c"))
    assert all(re.fullmatch(r"[A-Z].*\.", summary) for _, summary in examples())
