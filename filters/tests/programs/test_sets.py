"""Sets of prefixes: what a file means, which lines are refused, and what the kernel's tries hold then."""

from __future__ import annotations

import random
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import pytest

from filters.errors import InvalidSet
from filters.programs.sets import Prefixes, Tries, read_prefixes

MIXED = """\
# networks that we do not want
192.0.2.0/24
198.51.100.7          # a single host
  10.0.0.0/8\t
0.0.0.0/0

2001:db8::/32
2001:DB8:9::9
::ffff:1.2.3.4
::/0
192.0.2.0/24
"""
NETWORKS = [
    *("192.0.2.0/24", "198.51.100.7/32", "10.0.0.0/8", "0.0.0.0/0"),
    *("2001:db8::/32", "2001:db8:9::9/128", "::ffff:1.2.3.4/128", "::/0"),
]


def networks(prefixes: Prefixes) -> set[IPv4Network | IPv6Network]:
    """By the keys' own words: 4 bytes of length in the host's order, then the address."""
    keys4, keys6 = prefixes.packed()
    cut = [keys4[at : at + 8] for at in range(0, len(keys4), 8)] + [
        keys6[at : at + 20] for at in range(0, len(keys6), 20)
    ]
    return {ip_network((key[4:], int.from_bytes(key[:4], "little"))) for key in cut}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "set.txt"
    path.write_bytes(text.encode("latin-1"))
    return path


@pytest.fixture
def tries() -> Iterator[Tries]:
    made = Tries.create()
    yield made
    made.close()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_file_of_both_families_with_comments_is_read(tmp_path: Path, newline: str) -> None:
    found = read_prefixes(written(tmp_path, MIXED.replace("\n", newline)))
    assert networks(found) == {ip_network(text) for text in NETWORKS}
    assert len(found) == 8


def test_lists_of_other_programs_are_read(tmp_path: Path) -> None:
    lines = ["; Spamhaus", "1.10.16.0/20 ; SBL256894", "192.0.2.1-192.0.2.6", "198.51.100.0 - 198.51.100.255 # all"]
    found = read_prefixes(written(tmp_path, "\n".join([*lines, "2001:db8::-2001:db8::3"])))
    wanted = [
        "1.10.16.0/20",
        "192.0.2.1/32",
        "192.0.2.2/31",
        "192.0.2.4/31",
        "192.0.2.6/32",
        "198.51.100.0/24",
        "2001:db8::/126",
    ]
    assert networks(found) == {ip_network(text) for text in wanted}
    assert found.warnings == ()


def test_host_bits_are_cleared_and_the_first_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "10.0.0.0/8\n192.0.2.1/24\n")
    assert networks(read_prefixes(path)) == {ip_network("10.0.0.0/8"), ip_network("192.0.2.0/24")}
    assert read_prefixes(path).warnings == (f"set {path}: 1 prefix has host bits set: line 2 is read as 192.0.2.0/24",)
    path.write_text("2001:db8::1/64\n192.0.2.1/24\n")
    assert read_prefixes(path).warnings == (
        f"set {path}: 2 prefixes have host bits set: line 1 is read as 2001:db8::/64, ...",
    )


def test_a_file_without_prefixes_is_an_empty_set(tmp_path: Path) -> None:
    assert len(read_prefixes(written(tmp_path, "# nothing yet\n"))) == 0


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("192.0.2.0/33", "not an IPv4 or IPv6 prefix or range"),
        ("192.0.2.0/", "not an IPv4 or IPv6 prefix or range"),
        ("192.0.2/24", "not an IPv4 or IPv6 prefix or range"),
        ("192.0.2.0/-1", "not an IPv4 or IPv6 prefix or range"),
        ("2001:db8::/129", "not an IPv4 or IPv6 prefix or range"),
        ("example.com", "not an IPv4 or IPv6 prefix or range"),
        ("192.0.2.0 192.0.3.0", "not an IPv4 or IPv6 prefix or range"),
        ("1.2.3.4\0", "not an IPv4 or IPv6 prefix or range"),
        ("\xff\xfe", "not an IPv4 or IPv6 prefix or range"),
        ("192.0.2.9-192.0.2.1", "not an IPv4 or IPv6 prefix or range"),
        ("192.0.2.9-2001:db8::1", "not an IPv4 or IPv6 prefix or range"),
        ("192.0.2.9-", "not an IPv4 or IPv6 prefix or range"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = written(tmp_path, f"10.0.0.0/8\n# so far so good\n{line}\n10.0.0.0/7\n")
    with pytest.raises(InvalidSet) as refusal:
        read_prefixes(path)
    assert str(refusal.value) == f"{path}:3: {line!r}: {fault}"


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSet, match=rf"^set {tmp_path}/none: No such file or directory$"):
        read_prefixes(tmp_path / "none")
    with pytest.raises(InvalidSet, match=rf"^set {tmp_path}: Is a directory$"):
        read_prefixes(tmp_path)


def test_packed_prefixes_are_unpacked_again(tmp_path: Path) -> None:
    found = read_prefixes(written(tmp_path, MIXED))
    assert Prefixes.unpacked(*found.packed()) == found


def test_prefixes_that_cover_addresses_are_found(tmp_path: Path) -> None:
    found = read_prefixes(written(tmp_path, MIXED)).covering([ip_address("10.7.7.7"), ip_address("2001:db8:9::9")])
    covering = ("10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32", "2001:db8:9::9/128", "::/0")
    assert networks(found) == {ip_network(text) for text in covering}


def test_tries_hold_what_was_added_without_what_was_removed(tries: Tries) -> None:
    chance = random.Random(7)
    addresses = [ip_address(chance.getrandbits(32)).packed for _ in range(70_000)]
    keys = {int.from_bytes(packed, "little") << 32 | 32 for packed in addresses}
    wanted, gone = Prefixes(keys), Prefixes(set(sorted(keys)[:67_000]))
    tries.add(wanted)
    assert tries.held() == wanted
    tries.remove(gone)
    assert tries.held() == wanted.without(gone)


def test_removing_what_is_not_there_is_no_error(tmp_path: Path, tries: Tries) -> None:
    there = read_prefixes(written(tmp_path, MIXED))
    other = read_prefixes(written(tmp_path, "10.0.0.0/9\n10.0.0.0/8\n11.0.0.0/8\n2001:db8::/33\n2001:db8::/32\n"))
    tries.add(there)
    tries.remove(other)
    assert tries.held() == there.without(other)
    assert len(there.without(other)) == 6
