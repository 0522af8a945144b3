"""Attention of packed rows without a mask: every sample by itself, between borders that the host has made.

On a GPU it is torch's own flash kernel for sequences of various lengths; on a CPU one sample after the other. Rows
without borders are one sample each.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

VARLEN = "varlen"  # its name among transformers' kernels
HEAD_MULTIPLE, WIDEST_HEAD = 8, 256  # of flash kernels; torch's own attention pads heads for them, this does not
_KNOWS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.13


def fits_flash(head_size: int) -> bool:
    """Whether flash kernels have heads of so many numbers."""
    return head_size % HEAD_MULTIPLE == 0 and head_size <= WIDEST_HEAD


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it: query [b, h, t, d], key and value [b, k, t, d] -> [b, t, h, d].

    ``cu_seq_lens_q``, int32, [samples + 1]: where the samples begin in all rows behind one another, and where they
    end; samples may be empty. The host does not wait for a GPU to know it.

    Raises:
        NotImplementedError: the model wants what the kernel can't do: masks, soft caps, sinks; on a GPU also dropout,
            and values of another width than queries.
    """
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("attention of packed rows without a mask has no masks, soft caps or sinks")
    rows, heads, tokens = query.shape[:3]
    if cu_seq_lens_q is None:
        return _causal(query, key, value, scaling, dropout, sliding_window).transpose(1, 2).contiguous(), None
    if query.is_cuda:
        if dropout or value.shape[-1] != query.shape[-1]:
            raise NotImplementedError("on a GPU it has no dropout, and values are as wide as queries")
        flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # [b * t, heads, d]
        groups: dict[str, Any] = {}
        if flat[1].shape[1] != heads:
            if _KNOWS_GROUPS:
                groups = {"enable_gqa": True}
            else:
                flat[1:] = [states.repeat_interleave(heads // states.shape[1], dim=1) for states in flat[1:]]
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        q, k, v = flat
        borders = cu_seq_lens_q
        out: Any = varlen_attn(q, k, v, borders, borders, tokens, tokens, scale=scaling, window_size=window, **groups)
        return out.unflatten(0, (rows, tokens)), None
    q, k, v = (states.transpose(0, 1).flatten(1, 2)[None] for states in (query, key, value))  # [1, heads, b * t, d]
    samples = [
        _causal(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], scaling, dropout, sliding_window)
        for start, end in pairwise(cu_seq_lens_q.tolist())
        if end > start
    ]
    return torch.cat(samples, dim=2)[0].unflatten(1, (rows, tokens)).permute(1, 2, 0, 3).contiguous(), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """Return attention of whole rows, [b, h, t, d], each token to those before it, at most ``window`` with itself."""
    tokens, mask = query.shape[2], None
    if window is not None and window < tokens:
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
        mask = ones.tril() & ones.triu(1 - window)
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


AttentionInterface.register(VARLEN, packed_attention)  # without a mask function: transformers then builds no mask
