"""Expressions compile to what tcpdump prints, and are refused with its words."""

from __future__ import annotations

import subprocess

import pytest

from filters.compiler import cbpf
from filters.compiler.expr import compile_expression
from filters.errors import ExpressionError
from filters.tests.corpus import EXPRESSIONS, REFUSED

RAW_IP = 12  # DLT_RAW


def tcpdump(*arguments: str) -> subprocess.CompletedProcess[str]:
    *options, expression = arguments
    command = ["tcpdump", "-y", "EN10MB", *options, "--", expression]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_instructions_are_printed_as_tcpdump_prints_them(expression: str) -> None:
    instructions = compile_expression(expression)
    assert cbpf.disassemble(instructions) + "\n" == tcpdump("-d", expression).stdout


@pytest.mark.parametrize("expression", EXPRESSIONS[::10])
def test_instructions_as_c_and_as_numbers_are_those_of_tcpdump(expression: str) -> None:
    instructions = compile_expression(expression)
    assert cbpf.c_array(instructions) == tcpdump("-dd", expression).stdout.rstrip("\n")
    assert cbpf.decimal(instructions) == tcpdump("-ddd", expression).stdout.rstrip("\n")


@pytest.mark.parametrize("expression", [e for e in REFUSED if e != "ip broadcast"])
def test_what_tcpdump_refuses_is_refused_with_its_words(expression: str) -> None:
    with pytest.raises(ExpressionError) as refusal:
        compile_expression(expression)
    assert tcpdump("-d", expression).stderr == f"tcpdump: {refusal.value}\n"


def test_broadcast_address_needs_a_netmask() -> None:
    with pytest.raises(ExpressionError, match=r"^netmask not known, so 'ip broadcast' not supported$"):
        compile_expression("ip broadcast")
    with_netmask = compile_expression("ip broadcast", netmask=0)
    assert cbpf.disassemble(with_netmask) + "\n" == tcpdump("-d", "ip broadcast").stdout


def test_empty_expression_accepts_as_much_as_asked_for() -> None:
    assert compile_expression("", snaplen=96) == (cbpf.Instruction(cbpf.RET | cbpf.K, k=96),)


def test_without_the_optimiser_there_are_more_instructions() -> None:
    plain = compile_expression("tcp port 80", optimise=False)
    assert cbpf.disassemble(plain) + "\n" == tcpdump("-O", "-d", "tcp port 80").stdout
    assert len(plain) > len(compile_expression("tcp port 80"))


def test_other_link_types_have_other_offsets() -> None:
    assert compile_expression("ip", link_type=RAW_IP)[0].k == 0


def test_expression_with_a_nul_is_no_expression() -> None:
    with pytest.raises(ExpressionError, match=r"^can't parse filter expression: syntax error$"):
        compile_expression("tcp\0 or udp")
