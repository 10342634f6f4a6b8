from __future__ import annotations

import pytest

from lb.host.capabilities import missing

NET_ADMIN, SYS_ADMIN, PERFMON, BPF = (1 << bit for bit in (12, 21, 38, 39))  # include/uapi/linux/capability.h


@pytest.mark.parametrize(
    ("held", "lacks"),
    [
        (NET_ADMIN | PERFMON | BPF, ()),
        (NET_ADMIN | SYS_ADMIN, ()),
        (SYS_ADMIN, ("CAP_NET_ADMIN",)),
        (NET_ADMIN | BPF, ("CAP_PERFMON",)),
        (NET_ADMIN | PERFMON, ("CAP_BPF",)),
        (0, ("CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF")),
    ],
)
def test_three_capabilities_are_needed_and_sys_admin_contains_two_of_them(held: int, lacks: tuple[str, ...]) -> None:
    assert missing(f"Name:\txdp-lb\nCapPrm:\t000001ffffffffff\nCapEff:\t{held:016x}\nSeccomp:\t0\n") == lacks
