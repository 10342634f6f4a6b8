"""The hash of a flow: known values, so that no version of the program or the model can drift unseen."""

from __future__ import annotations

from lb.hashing.flow_hash import flow_hash, mix, slot_of


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    """The first outputs of the generator seeded with 0, as its authors publish them."""
    golden_gamma = 0x9E3779B97F4A7C15
    assert mix(golden_gamma) == 0xE220A8397B1DCDAF
    assert mix(2 * golden_gamma & (1 << 64) - 1) == 0x6E789E6AA1B965F4


def test_every_field_of_a_flow_changes_its_hash() -> None:
    flows = [
        (1, 6, 80, (1, 2, 3, 4)),
        (2, 6, 80, (1, 2, 3, 4)),
        (1, 17, 80, (1, 2, 3, 4)),
        (1, 6, 81, (1, 2, 3, 4)),
        *((1, 6, 80, tuple(9 if i == j else j + 1 for j in range(4))) for i in range(4)),
        (1, 6, 80, (1,)),
    ]
    assert len({flow_hash(*flow) for flow in flows}) == len(flows)


def test_slots_reach_both_ends_of_the_ring() -> None:
    assert slot_of(0, 251) == 0
    assert slot_of((1 << 64) - 1, 251) == 250
