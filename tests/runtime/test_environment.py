"""What a rank can tell of its place before torch is imported."""

from __future__ import annotations

from lisa_dist.runtime.environment import interface_towards


def test_interface_by_which_a_host_is_reached() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None
