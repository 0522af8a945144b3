"""The model hub: whether it can be asked at all."""

from __future__ import annotations

import logging
import socket
import urllib.request
from urllib.parse import urlparse

from huggingface_hub import constants

logger = logging.getLogger(__name__)


def stay_offline_where_unreachable() -> None:
    """Make the hub's client use its local cache alone where the hub's host has no address.

    On a machine without a way out the client would try again for half a minute before a misspelt path is
    reported. A proxy may know the host where this machine does not, so nothing is changed behind one.
    """
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, None)
    except OSError:
        logger.info("%s can't be reached: only its local cache is used", constants.ENDPOINT)
        constants.HF_HUB_OFFLINE = True
