"""Drivers, offloads and queues, read from interfaces of a network namespace of this test's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from xdp import ethtool
from xdp.features import XdpFeatures, xdp_features
from xdp.netlink import IPRoute
from xdp.tests.kernels import DRIVER_FEATURES
from xdp.tests.namespaces import namespace_with_veth


@pytest.fixture
def ipr() -> Iterator[IPRoute]:
    """The test runs in a namespace with one veth, near and far, both up."""
    with namespace_with_veth("xdp-ethtool") as made:
        yield made


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def features_of(ipr: IPRoute, name: str) -> XdpFeatures | None:
    return xdp_features(ipr.link_lookup(ifname=name)[0])


@pytest.mark.usefixtures("ipr")
def test_driver_is_named() -> None:
    assert ethtool.driver("near") == "veth"


@pytest.mark.usefixtures("ipr")
@pytest.mark.parametrize(("word", "feature"), [("gro", "rx-gro"), ("rxvlan", "rx-vlan-hw-parse")])
def test_offload_is_seen_on_and_off(word: str, feature: str) -> None:
    run("ethtool", "-K", "near", word, "on")
    assert feature in ethtool.offloads("near").on
    run("ethtool", "-K", "near", word, "off")
    assert feature not in ethtool.offloads("near").on


@pytest.mark.usefixtures("ipr")
def test_checksums_are_left_out_with_transmit_offload_alone() -> None:
    assert ethtool.offloads("near").leave_checksums_out
    run("ethtool", "-K", "near", "tx", "off")
    assert not ethtool.offloads("near").leave_checksums_out


@pytest.mark.usefixtures("ipr")
def test_vlan_tags_are_left_out_with_transmit_offload_alone() -> None:
    assert ethtool.offloads("near").leave_vlan_tags_out
    run("ethtool", "-K", "near", "txvlan", "off")
    assert not ethtool.offloads("near").leave_vlan_tags_out


@pytest.mark.usefixtures("ipr")
def test_what_the_driver_does_not_offer_is_fixed() -> None:
    assert {"rx-lro", "rx-gro-hw"} <= ethtool.offloads("near").fixed
    assert "rx-gro" not in ethtool.offloads("near").fixed


def test_queues_are_those_in_use_and_those_there_could_be(ipr: IPRoute) -> None:
    ipr.link("add", ifname="wide", kind="veth", peer={"ifname": "other"}, num_rx_queues=3, num_tx_queues=2)
    run("ethtool", "-L", "wide", "rx", "2", "tx", "1")
    assert ethtool.queues("wide") == ethtool.Queues(rx=2, tx=1, most_rx=3, combined=False)


def test_interface_without_ethtool_gives_the_empty_answer(ipr: IPRoute) -> None:
    assert ethtool.driver("gone") is None
    assert ethtool.offloads("gone") == ethtool.Offloads()
    assert ethtool.queues("gone") is None
    ipr.link("add", ifname="bridge0", kind="bridge")
    assert ethtool.queues("bridge0") is None


@DRIVER_FEATURES
def test_veth_transmits_for_xdp_once_its_peer_takes_it(ipr: IPRoute) -> None:
    assert features_of(ipr, "near") == XdpFeatures.BASIC | XdpFeatures.REDIRECT
    run("ethtool", "-K", "far", "gro", "on")
    assert features_of(ipr, "near") == XdpFeatures.BASIC | XdpFeatures.REDIRECT | XdpFeatures.NDO_XMIT
    assert features_of(ipr, "far") == XdpFeatures.BASIC | XdpFeatures.REDIRECT


@DRIVER_FEATURES
def test_driver_without_native_xdp_says_so(ipr: IPRoute) -> None:
    ipr.link("add", ifname="bridge0", kind="bridge")
    assert features_of(ipr, "bridge0") == XdpFeatures(0)


def test_interface_that_is_gone_has_no_answer() -> None:
    assert xdp_features(1 << 30) is None


def test_kernel_that_cannot_be_asked_has_no_answer(ipr: IPRoute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdp.features.NETDEV_FAMILY", "none-such")
    assert features_of(ipr, "near") is None
