from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants

from lisa_dist.runtime.hub import stay_offline_where_unreachable


@pytest.mark.parametrize(
    ("reachable", "proxies", "offline"), [(True, {}, False), (False, {}, True), (False, {"https": "proxy:3128"}, False)]
)
def test_offline_only_without_an_address_and_a_proxy(monkeypatch, reachable, proxies, offline):
    def look_up(host, port):
        assert host == "huggingface.co"
        if not reachable:
            raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    stay_offline_where_unreachable()
    assert constants.HF_HUB_OFFLINE is offline
