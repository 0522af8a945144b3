"""Seeds of random numbers that are keyed, so that no generator's state is carried along."""

from __future__ import annotations

import hashlib


def keyed_seed(*key: object) -> int:
    """Return a seed that depends on each part of ``key`` and on nothing else, the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
