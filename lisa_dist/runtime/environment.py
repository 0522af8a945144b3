"""What a launcher tells a rank in its environment; read without torch, so before it is imported."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

# torch 2.11 and 2.13 read each of them, once; the first is the newer name
# (https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf).
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
SIOCGIFADDR = 0x8915  # of ioctl(2): the address of a network interface


def expand_segments() -> None:
    """Have torch's allocator on a GPU let its segments grow, in this process and those that it starts.

    Memory that one period freed then serves the next, whose blocks have other sizes. To be called before torch is
    imported; whoever has chosen any setting of the allocator keeps theirs as it is.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def _number(name: str) -> int | None:
    """Return the number that a variable holds, None where it holds none: then no launcher has set it."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else None


def in_slurm_step() -> bool:
    """Whether srun started this process as one of several tasks."""
    return "SLURM_STEP_ID" in os.environ and (_number("SLURM_STEP_NUM_TASKS") or 1) > 1


def has_ranks() -> bool:
    """Whether a launcher (torchrun, our own, srun) already started this process as a rank."""
    return _number("RANK") is not None or in_slurm_step()


def of_mpi() -> str | None:
    """Return how many processes mpirun has started, this one among them, as it says so; None where it is alone."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of Open MPI; of MPICH and Intel MPI
    return next((f"{name}={os.environ[name]}" for name in names if (_number(name) or 1) > 1), None)


def environment_rank() -> int:
    """The rank that the launcher gave this process, 0 without a launcher."""
    if (rank := _number("RANK")) is not None:
        return rank
    return int(os.environ["SLURM_PROCID"]) if in_slurm_step() else 0


def restart_count() -> int:
    """How often torch's elastic agent has restarted this rank."""
    return _number("TORCHELASTIC_RESTART_COUNT") or 0


def interface_towards(host: str) -> str | None:
    """Return the network interface by which this machine reaches ``host``, None where that cannot be told.

    Nothing is sent. On ``host`` itself it is the interface that has its address, which other machines can reach.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # any port: of a datagram socket this only chooses the route
            ours = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == ours:
                return name
    return None
