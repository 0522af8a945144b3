"""What a launcher tells a rank in its environment; read without torch, so before it is imported."""

from __future__ import annotations

import os


def in_slurm_step() -> bool:
    """Whether srun started this process as one of several tasks."""
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def has_ranks() -> bool:
    """Whether a launcher (torchrun, our own, srun) already started this process as a rank."""
    return "RANK" in os.environ or in_slurm_step()


def environment_rank() -> int:
    """The rank that the launcher gave this process, 0 without a launcher."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if in_slurm_step() else 0


def restart_count() -> int:
    """How often torch's elastic agent has restarted this rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
