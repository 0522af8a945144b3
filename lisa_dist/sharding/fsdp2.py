"""The storage of sharded parameters: every private API of FSDP2 that the project needs, one function each.

A test of this file fails when torch changes one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from lisa_dist.runtime.distributed import as_sharded


def fsdp_groups(module: FSDPModule) -> list[Any]:
    """Return the FSDP2 parameter groups of one wrapped module (private; one up to torch 2.12)."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def fsdp_parameters(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Map each parameter name of a resharded model to its (FSDPParam, FSDPParamGroup)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in fsdp_groups(module):
                for fsdp_param in group.fsdp_params:
                    found[names[id(fsdp_param.sharded_param)]] = (fsdp_param, group)
    return found


def reshard_all(model: nn.Module) -> None:
    """Put the sharded parameters back on every module.

    FSDP2 leaves the root's group, and after an evaluation others, unsharded; what is set on such a
    parameter is lost at the next reshard.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def replace_shard(fsdp_param: Any, shard: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    """Make ``shard`` the storage of a sharded parameter and return the new parameter.

    Args:
        fsdp_param: the FSDPParam whose storage is replaced; it must be in the sharded state.
        shard: this rank's rows, unpadded, in the wanted dtype and on the wanted device.
        requires_grad: whether the parameter trains.

    The module's ``_apply`` does the same for a whole module; this serves single parameters, on ``meta`` too.
    """
    old = fsdp_param.sharded_param
    tensor = as_sharded(shard, old, tuple(old.shape))
    fsdp_param._setattr_on_modules(nn.Parameter(tensor, requires_grad=requires_grad))
    fsdp_param.reset_sharded_param()
    return fsdp_param.sharded_param


def place_on_host(fsdp_param: Any, on_host: bool, pin_memory: bool) -> None:
    """Say where a parameter's next shard will lie: on its device, or in host memory, whence FSDP2 copies it for use.

    To be called before :func:`replace_shard`: a shard is pinned as it is put in place
    (private: ``offload_to_cpu`` and ``pin_memory``, which FSDP2 sets once for a whole group).
    """
    fsdp_param.offload_to_cpu = on_host
    fsdp_param.pin_memory = on_host and pin_memory


def is_on_host(fsdp_param: Any) -> bool:
    """Whether a parameter's shard lies in host memory (private: ``offload_to_cpu``)."""
    return bool(fsdp_param.offload_to_cpu)


def have_hooks_wait(fsdp_param: Any) -> RemovableHandle:
    """Let the hooks that a parameter is given after this find its gradient in host memory, if that is where it goes.

    Up to torch 2.12 they are called while it is still on its way there (private: ``grad_offload_event``).
    """

    def wait(_: torch.Tensor) -> None:
        if fsdp_param.grad_offload_event is not None:
            fsdp_param.grad_offload_event.synchronize()

    return fsdp_param.sharded_param.register_post_accumulate_grad_hook(wait)


def refresh_group(group: Any, gradient_dtype: torch.dtype | None = None) -> None:
    """Make a group read its parameters' dtypes and trainability again.

    FSDP2 reads them once, at the first forward; a block frozen then would later reduce its gradients in the
    wrong dtype or fail (https://github.com/pytorch/pytorch/issues/186998).

    Args:
        group: with parameters in the sharded state.
        gradient_dtype: of the reduced gradients; None: that of the parameters. FSDP2 has one for both, which the
            first forward reads anew, so :func:`finish_initialization` comes before (private: ``_orig_dtype``).
    """
    group._init_mp_dtypes()
    if gradient_dtype is not None:
        group._orig_dtype = gradient_dtype


def finish_initialization(model: nn.Module) -> None:
    """Do now what FSDP2 leaves to the first forward of the root, once for all (private: ``_lazy_init``)."""
    state: Any = model._get_fsdp_state()  # type: ignore[operator]
    state._lazy_init()


def reduce_dtype(group: Any) -> torch.dtype | None:
    """Return the dtype in which a group with trainable parameters reduces its gradients, None without any."""
    trainable = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
    if not trainable:
        return None
    return group._reduce_dtype or trainable[0].param_dtype or group._orig_dtype


def free_allreduce_buffer(group: Any) -> None:
    """Free the buffer in which a group summed its gradients over the replicas, when it has been read.

    FSDP2 keeps it until the backward pass ends, because it belongs to the stream of the reduce-scatters and other
    streams use it (https://github.com/pytorch/pytorch/pull/140044); so that stream is made to wait for them
    (private: ``_all_reduce_state``, ``_post_reduce_event``, ``comm_ctx``).
    """
    if group._all_reduce_state is not None and group._post_reduce_event is not None:
        group.comm_ctx.reduce_scatter_stream.wait_event(group._post_reduce_event)
    group._all_reduce_state = None


def gather_in_background(module: FSDPModule) -> None:
    """Have every gather begun without waiting for it (private: ``_set_unshard_async_op``).

    On a GPU a stream of its own does it. Gloo's gathers have none: whoever begins one waits until it is done.
    """
    module._set_unshard_async_op(True)
