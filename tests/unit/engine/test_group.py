"""By which network ranks on several hosts reach each other."""

from __future__ import annotations

import psutil

from engine.group import LOOPBACK, interface_of

FOREIGN = "192.0.2.254"
"""Of the addresses that are for documentation, and nobody's (RFC 5737)."""


def test_an_address_of_this_machine_is_at_its_interface():
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == interface_of("localhost") == LOOPBACK
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family.name == "AF_INET":
                assert interface_of(each.address) == name


def test_who_is_not_this_machine_leaves_the_choice_to_torch():
    assert interface_of(FOREIGN) == interface_of("no.such.host.invalid") == ""
