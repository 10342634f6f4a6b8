"""Sets of IPv4 and IPv6 prefixes: from a file to longest-prefix-match tries of the kernel, and what is in those.

Enters: a file with a prefix, an address or a range of addresses a line, `#` or `;` before comments. Leaves: Prefixes,
in Tries that a program looks addresses up in. A million lines take a second or two: prefixes are numbers here, in the
form of the tries' keys, and cross into the kernel in batches.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
    summarize_address_range,
)
from pathlib import Path
from typing import Self

from filters.errors import InvalidSet
from filters.programs.program import refused
from xdp import libbpf
from xdp.errors import MapError
from xdp.maps import Map

_MAP_TYPE_LPM_TRIE, _F_NO_PREALLOC = 11, 1
_MAX_PREFIXES = 1 << 24  # takes no memory: nodes are made as they are needed
_BATCH = 1 << 16

# A key of a trie: the length in the host's byte order, the address in the network's. Read as a little-endian number.
_KEY4, _KEY6 = 8, 20


def _masks(bits: int) -> dict[str, tuple[int, int]]:
    """Text from the slash on -> the length, and the bits of an address (read as a little-endian number) that count."""
    full = (1 << bits) - 1
    found = {
        f"/{n}": (n, int.from_bytes((full << bits - n & full).to_bytes(bits // 8, "big"), "little"))
        for n in range(bits + 1)
    }
    return found | {"": found[f"/{bits}"]}


_MASKS4, _MASKS6 = _masks(32), _masks(128)


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Keys of the tries, as little-endian numbers. `warnings`: of the text that they were read from."""

    ipv4: set[int] = field(default_factory=set)
    ipv6: set[int] = field(default_factory=set)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.ipv4) + len(self.ipv6)

    def without(self, other: Prefixes) -> Prefixes:
        return Prefixes(self.ipv4 - other.ipv4, self.ipv6 - other.ipv6)

    def covering(self, addresses: Iterable[IPv4Address | IPv6Address]) -> Prefixes:
        """Those of these prefixes that any of the addresses is in."""
        found = Prefixes()
        for address in addresses:
            number = int.from_bytes(address.packed, "little")
            ours, masks, to = (
                (self.ipv4, _MASKS4, found.ipv4) if address.version == 4 else (self.ipv6, _MASKS6, found.ipv6)
            )
            to |= ours & {(number & mask) << 32 | length for length, mask in masks.values()}
        return found

    def packed(self) -> tuple[bytes, bytes]:
        """IPv4 and IPv6 keys, one after the other."""
        return array("Q", self.ipv4).tobytes(), b"".join(key.to_bytes(_KEY6, "little") for key in self.ipv6)

    @classmethod
    def unpacked(cls, ipv4: bytes, ipv6: bytes) -> Self:
        keys = array("Q")
        keys.frombytes(ipv4)
        return cls(set(keys), {int.from_bytes(ipv6[at : at + _KEY6], "little") for at in range(0, len(ipv6), _KEY6)})


def read_prefixes(path: Path) -> Prefixes:
    """Raises InvalidSet, for a bad line with its number."""
    try:
        text = path.read_bytes().decode("latin-1")
    except OSError as error:
        raise InvalidSet(f"set {path}: {error.strerror}") from error
    return parse_prefixes(text, str(path))


def parse_prefixes(text: str, name: str) -> Prefixes:
    """Of the text of such a file. Raises InvalidSet, for a bad line with its number behind the name."""
    found, cleared = Prefixes(), list[str]()
    for number, line in _unusual_lines(text, found):
        for network, has_host_bits in _unusual(line, f"{name}:{number}"):
            value = int.from_bytes(network.network_address.packed, "little")
            (found.ipv4 if network.version == 4 else found.ipv6).add(value << 32 | network.prefixlen)
            if has_host_bits:
                cleared.append(f"line {number} is read as {network}")
    return replace(found, warnings=(_host_bits_words(name, cleared),)) if cleared else found


def _host_bits_words(name: str, cleared: Sequence[str]) -> str:
    plural = "prefix has" if len(cleared) == 1 else "prefixes have"
    return f"set {name}: {len(cleared)} {plural} host bits set: {cleared[0]}{'' if len(cleared) == 1 else ', ...'}"


def _unusual_lines(text: str, found: Prefixes) -> Iterator[tuple[int, str]]:
    """Adds the plain prefixes; yields the other lines, numbered. One loop: it sees each of a million lines."""
    add4, add6, to_number, parse = found.ipv4.add, found.ipv6.add, int.from_bytes, socket.inet_pton
    ipv4, ipv6 = socket.AF_INET, socket.AF_INET6
    for number, line in enumerate(text.split("\n"), 1):
        address, slash, length = line.partition("/")
        is_ipv6 = ":" in address
        try:
            bits, mask = (_MASKS6 if is_ipv6 else _MASKS4)[slash + length]
            value = to_number(parse(ipv6 if is_ipv6 else ipv4, address), "little")
        except (KeyError, OSError, ValueError):
            yield number, line
            continue
        if value & ~mask:
            yield number, line
        elif is_ipv6:
            add6(value << 32 | bits)
        else:
            add4(value << 32 | bits)


def _unusual(line: str, where: str) -> Iterator[tuple[IPv4Network | IPv6Network, bool]]:
    """The networks of a line, and whether host bits had to be cleared."""
    word = re.split("[#;]", line, maxsplit=1)[0].strip()
    if not word:
        return
    try:
        first, dash, last = (part.strip() for part in word.partition("-"))
        if dash:
            yield from ((network, False) for network in _range(first, last))
        else:
            network = ip_network(word, strict=False)
            yield network, int(ip_address(word.partition("/")[0])) != int(network.network_address)
    except (ValueError, TypeError):
        raise InvalidSet(f"{where}: {word!r}: not an IPv4 or IPv6 prefix or range") from None


def _range(first: str, last: str) -> Iterator[IPv4Network | IPv6Network]:
    """Raises TypeError for ends of two families, ValueError where the first is behind the last."""
    ends = ip_address(first), ip_address(last)
    return summarize_address_range(*ends)


@dataclass(frozen=True, slots=True)
class Tries:
    """The kernel's side of a set: one trie for each family. Methods raise MapError."""

    ipv4: Map
    ipv6: Map

    @classmethod
    def create(cls) -> Self:
        """Empty ones. Raises NotPermitted, LoadError."""
        return cls(_new_trie("filter_set4", _KEY4), _new_trie("filter_set6", _KEY6))

    @classmethod
    def of(cls, ipv4_fd: int, ipv6_fd: int) -> Self:
        return cls(_trie("filter_set4", ipv4_fd, _KEY4), _trie("filter_set6", ipv6_fd, _KEY6))

    def close(self) -> None:
        os.close(self.ipv4.fd)
        os.close(self.ipv6.fd)

    def add(self, prefixes: Prefixes) -> None:
        for trie, keys in zip((self.ipv4, self.ipv6), prefixes.packed(), strict=True):
            _add(trie, keys)

    def remove(self, prefixes: Prefixes) -> None:
        for trie, keys in zip((self.ipv4, self.ipv6), prefixes.packed(), strict=True):
            _remove(trie, keys)

    def held(self) -> Prefixes:
        return Prefixes.unpacked(*(b"".join(bytes(keys) for keys, _ in t.batches()) for t in (self.ipv4, self.ipv6)))


def _trie(name: str, fd: int, key_size: int) -> Map:
    return Map(name, fd, ctypes.c_uint8 * key_size, ctypes.c_uint8)


def _new_trie(name: str, key_size: int) -> Map:
    opts = libbpf.MapCreateOpts(sz=ctypes.sizeof(libbpf.MapCreateOpts), map_flags=_F_NO_PREALLOC)
    try:
        fd = libbpf.map_create(_MAP_TYPE_LPM_TRIE, name.encode(), key_size, 1, _MAX_PREFIXES, ctypes.byref(opts))
    except OSError as error:
        raise refused(name, error, []) from error
    return _trie(name, fd, key_size)


def _add(trie: Map, keys: bytes) -> None:
    size = ctypes.sizeof(trie.key_type)
    values = bytes([1]) * _BATCH
    for start in range(0, len(keys), _BATCH * size):
        batch = keys[start : start + _BATCH * size]
        try:
            libbpf.update_batch(trie.fd, batch, values, ctypes.byref(ctypes.c_uint32(len(batch) // size)), None)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise MapError(f"map {trie.name}: full: holds {_MAX_PREFIXES} prefixes") from error
            raise MapError(f"map {trie.name}: cannot write: {error.strerror}") from error


def _remove(trie: Map, keys: bytes) -> None:
    """Missing prefixes are ignored."""
    size, start = ctypes.sizeof(trie.key_type), 0
    while start < len(keys):
        batch = keys[start : start + _BATCH * size]
        count = ctypes.c_uint32(len(batch) // size)
        try:
            libbpf.delete_batch(trie.fd, batch, ctypes.byref(count), None)
            start += len(batch)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise MapError(f"map {trie.name}: cannot delete: {error.strerror}") from error
            start += (count.value + 1) * size
