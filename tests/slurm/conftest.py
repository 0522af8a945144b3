from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cluster import PROGRAMS, Cluster
from tests.support.tiny import missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm of two nodes; the environment leads Slurm's commands there."""
    absent = missing(*PROGRAMS)
    if absent:
        pytest.skip(f"Slurm is not installed (Debian: slurm-wlm and munge), missing: {', '.join(absent)}")
    cluster = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        try:
            cluster.start()
            patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
            yield cluster
        finally:
            cluster.stop()
