"""The process group, and the few collectives that the program makes outside FSDP2.

Ranks come from RANK and WORLD_SIZE (torchrun, our own launcher), else from Slurm's step variables, else
there is one rank. A function that issues a collective says so in its docstring.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lisa_dist.config import ParallelConfig, UserError
from lisa_dist.config.paths import refusal
from lisa_dist.runtime.environment import has_ranks, in_slurm_step, interface_towards
from lisa_dist.runtime.rendezvous import meet

T = TypeVar("T")

LONGER_TIMEOUT = datetime.timedelta(hours=1)  # for a collective that waits for a disk, or for a first step
ASK_EVERY = 0.25  # seconds: well below any time-out


def rank() -> int:
    """This process' rank, 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process' rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def local_world_size() -> int:
    """Number of ranks on this machine."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # "4" or "4(x2)"
    return int(tasks.split("(")[0].split(",")[0]) if tasks and in_slurm_step() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes records."""
    return rank() == 0


def is_simulated() -> bool:
    """Whether the other ranks are only imagined, as in a plan: nobody is there to talk to."""
    return dist.is_initialized() and dist.get_backend() == "fake"


def is_alone() -> bool:
    """Whether no other process takes part: a world of one rank, or a simulated one."""
    return world_size() == 1 or is_simulated()


def device() -> torch.device:
    """The device of this rank: its GPU; the CPU where there is none and in a simulated world."""
    has_gpu = torch.cuda.is_available() and not is_simulated()
    return torch.device("cuda", local_rank()) if has_gpu else torch.device("cpu")


def initialize(config: ParallelConfig) -> None:
    """Join the process group and set this rank's device and thread count. Collective: every rank.

    With no launcher's variables in the environment the world is one rank, through the same code.
    """
    if in_slurm_step() and not os.environ.get("RANK"):
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    set_threads(config)
    timeout = datetime.timedelta(seconds=config.timeout)
    if dist.is_initialized():
        return
    if has_ranks():
        _check_launcher()
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    if has_ranks():
        _choose_interface()
        store, rank, world_size = meet(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def _check_launcher() -> None:
    """Raise :class:`UserError` where only a part is there of what a launcher tells its ranks."""
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{missing[0]}: must be set for a rank (RANK={os.environ['RANK']}); torchrun does so, and the script of "
            "lisa-dist launch slurm: start by one of them, or unset RANK"
        )
    gpus = torch.cuda.device_count()
    if gpus > 1 and not {"LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys():
        raise UserError(
            f"LOCAL_RANK: must be set for a rank (RANK={os.environ['RANK']}) that sees {gpus} GPUs, else each takes "
            "the first; torchrun on each machine does so, or show each rank its own by CUDA_VISIBLE_DEVICES"
        )


def _choose_interface() -> None:
    """Have gloo and NCCL talk over the interface that leads to rank 0's machine, unless the user has chosen one.

    By itself gloo takes the address of the machine's own name, which is often 127.0.0.1
    (https://docs.pytorch.org/docs/stable/distributed.html#choosing-the-network-interface-to-use).
    """
    if int(os.environ["WORLD_SIZE"]) <= local_world_size():
        return
    name = interface_towards(os.environ.get("MASTER_ADDR", ""))
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # = takes the name as it is, not as a prefix


def set_threads(config: ParallelConfig) -> None:
    """Set the CPU threads of this rank, whoever launched it: results are bitwise only at equal counts."""
    threads = config.cpu_threads
    count = max(1, (os.cpu_count() or 1) // local_world_size()) if threads == "auto" else int(threads)
    torch.set_num_threads(count)


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter, gradient or moment, without copying."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_region(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Return which part of the whole tensor this rank holds, one slice a dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets))


def fill(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of ``full`` into a sharded tensor of the same shape."""
    local = local_shard(tensor.detach())
    if local.numel():
        part = full.detach()[local_region(tensor)]
        # A copy to host memory in another dtype would be converted there, after it came whole in the first one.
        local.copy_(part if part.device == local.device else part.to(local.dtype))


def as_sharded(local: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of ``shape`` whose rows on this rank are ``local``, placed as ``like`` is.

    It is where ``local`` is, in host memory too: ``DTensor.from_local`` would take it to the mesh's device. FSDP2 makes
    its sharded tensors in the same way (private: the constructor and its specification).
    """
    if not isinstance(like, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(torch.Size(shape), stride, local.dtype)
    return DTensor(local.detach(), DTensorSpec(like.device_mesh, like.placements, meta), requires_grad=False)


def computed_on(tensor: torch.Tensor) -> torch.device:
    """Return the device that computes with a tensor, even where its shard lies in host memory."""
    return torch.device(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor.device


def broadcast_object(value: T) -> T:
    """Return the ``value`` of rank 0 on every rank. Collective: every rank."""
    if is_alone():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Call ``action`` on rank 0 alone; every rank gets its result, or its exception. Collective: every rank."""
    result: T | None = None
    failure: Exception | None = None
    if is_main():
        try:
            result = action()
        except Exception as error:
            failure = error
    result, failure = broadcast_object((result, failure))
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's ``value``, in rank order, on every rank. Collective: every rank.

    Args:
        group: a group of all ranks, where this must not meet other collectives (see :func:`thread_group`).
    """
    if is_alone():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def thread_group(timeout: float) -> dist.ProcessGroup | None:
    """Make a group of all ranks that a thread can use while training goes on, None for one rank.

    A collective in it may take ``timeout`` seconds. Collective: every rank.
    """
    return None if world_size() == 1 else dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))


def gather_outcomes(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do ``action`` on every rank and return what each returned, in rank order. Collective: every rank.

    The ranks ask each other again and again who is done, so that one that waits for its disk may take as long as it
    needs, while one that is lost is noticed within the time-out of the group.

    Args:
        action: must not use the group. Where it raises, its rank raises as soon as the others are done.
        group: as in :func:`gather_objects`.
    """
    if is_alone():
        return [action()]
    done = threading.Event()
    outcome: list[T] = []

    def ask() -> list[T]:
        while True:
            done.wait(ASK_EVERY)
            answers = gather_objects((done.is_set(), outcome), group)
            if all(is_done for is_done, _ in answers):
                return [found for _, of_rank in answers for found in of_rank]

    with ThreadPoolExecutor(1, "asks who is done") as thread:
        asking = thread.submit(ask)
        try:
            outcome.append(action())
        finally:
            done.set()
        return asking.result()


@contextmanager
def longer_timeout(usual: int, mesh: DeviceMesh | None = None) -> Iterator[None]:
    """Give collectives the time that disks and compilers may take, and ``usual`` seconds afterwards. No communication.

    Args:
        usual: ``parallel.timeout``.
        mesh: whose groups are meant too. By itself torch gives those of a mesh with several axes a time-out of its own.
    """
    groups = [] if world_size() == 1 else [None, *([] if mesh is None else mesh.get_all_groups())]

    def allow(timeout: datetime.timedelta) -> None:
        for group in groups:
            # Private, and the only way to change it (https://github.com/pytorch/pytorch/pull/115141).
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    allow(max(datetime.timedelta(seconds=usual), LONGER_TIMEOUT))
    try:
        yield
    finally:
        allow(datetime.timedelta(seconds=usual))


def now() -> float:
    """Return a time in seconds, once this rank's GPU has done what it was given."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())
    return time.perf_counter()


def all_reduce_sum(values: list[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Return the element-wise sum over the ranks of ``group`` (None: all), in float64. Collective: every rank of it."""
    if is_alone():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU: the gloo half of the process group
    dist.all_reduce(tensor, group=group)
    return tensor.tolist()


def barrier() -> None:
    """Wait for every rank. Collective: every rank."""
    if not is_alone():
        all_reduce_sum([0.0])  # through gloo, which needs no device


def on_local_rank_zero(action: Callable[[], T]) -> list[T]:
    """Call ``action`` on the first rank of each machine; every rank gets what each returned. Collective: every rank.

    It may take as long as it needs (see :func:`gather_outcomes`). Where it raises on one, every rank raises.
    """
    failure: BaseException | None = None

    def attempt() -> tuple[list[T], str | None]:
        nonlocal failure
        try:
            return [action()] if local_rank() == 0 else [], None
        except BaseException as error:
            failure = error
            return [], refusal(error) or f"{error}"

    outcomes = gather_outcomes(attempt)
    if failure is not None:
        raise failure
    for _, text in outcomes:
        if text is not None:
            raise UserError(text)
    return [result for results, _ in outcomes for result in results]
