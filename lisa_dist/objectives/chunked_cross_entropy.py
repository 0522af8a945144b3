"""The cross-entropy of hidden states under a head's weight, in chunks of tokens, with its gradients.

With vocabulary V and N tokens the plain loss holds several N x V tensors in float32; here only
``chunk_tokens`` x V. Gradients are computed in the forward pass, chunk by chunk, while the logits are at hand.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lisa_dist.data.encode import UNTRAINED
from lisa_dist.runtime import distributed

logger = logging.getLogger(__name__)

WEIGHT_SLICES = 8  # of the vocabulary, in which products are added to the head's gradient where that takes a temporary


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's product: ``cap * tanh(scale * product / cap)``; no cap: ``scale * product``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def with_slope(self, logits: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the transformed logits, which take the place of these, and the derivative."""
        logits *= self.scale
        if self.cap is None:
            return logits, self.scale
        tangent = logits.div_(self.cap).tanh_()
        return tangent * self.cap, tangent.square_().neg_().add_(1.0).mul_(self.scale)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy over the label tokens; the gradients are computed in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
        in_place: bool,
        with_gradients: bool,
    ) -> Tensor:
        """Shapes: hidden [N, D], weight [V, D], bias [V], targets [N]. Returns a float32 scalar.

        ``in_place`` has a kernel of the GPU put gradients where the logits were. ``with_gradients`` must be
        ``torch.is_grad_enabled()`` of the caller: ``needs_input_grad`` is True under ``no_grad`` too, and inside this
        function gradients are always off.
        """
        ctx.in_place = in_place
        needs_hidden, needs_weight, needs_bias = (with_gradients and needed for needed in ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        # What micro-batches before this one gave is added to, where a store of a GPU hands it over: no second tensor of
        # the weight's size is needed for the sum.
        take = getattr(weight, "take_gradient", None) if needs_weight else None
        weight_gradient: Tensor | None = take() if take is not None else None
        ctx.adds = weight_gradient is not None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        needed = needs_hidden or needs_weight or needs_bias
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part, gradient, keep = _loss_of_chunk(
                hidden[rows], weight, bias, targets[rows], transform, in_place, needed
            )
            loss += part
            if gradient is not None:
                if hidden_gradient is not None:
                    torch.mm(gradient, weight, out=hidden_gradient[rows])
                    hidden_gradient[rows] *= keep
                if needs_weight:
                    weight_gradient = add_product(weight_gradient, gradient, hidden[rows] * keep)
                if bias_gradient is not None:
                    bias_gradient += (gradient * keep).sum(0, dtype=torch.float32)
            del gradient  # the next chunk's logits take its place
        ctx.gradients = (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(gradient_dtype(weight)),
            None if bias is None or bias_gradient is None else bias_gradient.to(gradient_dtype(bias)),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss gives its gradients once; run the forward pass again")
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.adds:  # what was there before must not be multiplied; the host does not wait to know
            torch._assert_async(incoming[0] == 1, "losses whose gradients are added up in place are not to be scaled")
        # The incoming scalar stays float32: cast to bfloat16 it would cost 0.2% of every gradient.
        for gradient in gradients:
            if gradient is not None:
                _multiply(gradient, incoming[0], ctx.in_place)
        return *gradients, *(None,) * 5


def _loss_of_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    in_place: bool,
    needed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | int]:
    """Return the summed loss of some rows, its gradient with respect to the head's product if ``needed``, [rows, V].

    The third is what the gradient is still to be multiplied by, [rows, 1]: 0 in untrained rows, applied to what is
    small and never to all logits. It is 1 where they are zero in the gradient already.
    """
    logits = F.linear(hidden, weight, bias)
    if in_place:
        return _put_gradient(logits, targets, transform, needed).sum(), logits if needed else None, 1
    keep, index = (targets != UNTRAINED)[:, None], targets.clamp_min(0)[:, None]
    log_probs, slope = _log_probabilities(logits, transform)
    own = log_probs.gather(1, index)
    gradient = _gradient(log_probs, own, index, slope, hidden.dtype) if needed else None
    return -(own * keep).sum(), gradient, keep


def _put_gradient(logits: Tensor, targets: Tensor, transform: LogitTransform, needed: bool) -> Tensor:
    """Return the float32 losses of some rows, 0 where untrained; their gradient, if needed, replaces the logits."""
    if distributed.is_simulated():  # as much is read and written
        return logits.exp_().new_empty(len(logits), dtype=torch.float32)
    from lisa_dist.objectives.loss_kernel import cross_entropy_in_place  # Triton is there where there is a GPU

    return cross_entropy_in_place(logits, targets, transform.scale, transform.cap, needed)


def _multiply(gradient: Tensor, factor: Tensor, in_place: bool) -> None:
    """Multiply a gradient by the incoming one; where that is 1, a kernel on the GPU sees it and ends."""
    if not in_place:
        gradient.mul_(factor)
    elif not distributed.is_simulated():
        from lisa_dist.objectives.loss_kernel import multiply_in_place

        multiply_in_place(gradient, factor)


def _log_probabilities(logits: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """Return the float32 logarithms of the probabilities of some rows, [rows, V], and the transformation's slope."""
    if transform == LogitTransform():
        return torch.log_softmax(logits, -1, dtype=torch.float32), 1.0
    values, slopes = transform.with_slope(logits.float())
    return torch.log_softmax(values, -1), slopes


def _gradient(log_probs: Tensor, own: Tensor, index: Tensor, slope: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the loss with respect to the head's product, [rows, V], in one pass where it can be.

    Args:
        log_probs: [rows, V], written over where that saves memory.
        own: those of the targets, [rows, 1]; the gradient there, p - 1, must not come from a rounded p.
        index: the targets, [rows, 1].
        slope: of what is done to the product.
        dtype: of the gradient.
    """
    plain = isinstance(slope, float) and slope == 1.0
    rounds = plain and dtype != log_probs.dtype
    into = torch.empty_like(log_probs, dtype=dtype) if rounds else log_probs
    gradient = torch.exp(log_probs, out=into).scatter_(1, index, own.expm1().to(into.dtype))
    return gradient if plain else gradient.mul_(slope).to(dtype)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that a weight takes its gradient in: a copy whose master is in float32 takes float32."""
    return (weight.grad_dtype if weight.is_leaf else None) or weight.dtype


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return ``total + left.T @ right`` in float32, added where ``total`` lies; without a temporary if possible.

    Shapes: total [V, D], None for zero; left [rows, V], right [rows, D].
    """
    if left.dtype == torch.float32:
        return left.T @ right if total is None else total.addmm_(left.T, right)
    if sums_in_place(left.device, left.dtype):
        if total is None:
            return torch.mm(left.T, right, out_dtype=torch.float32)
        return torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    if total is None:
        total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    for rows, part in zip(total.chunk(WEIGHT_SLICES), left.chunk(WEIGHT_SLICES, dim=1)):
        rows += part.T @ right
    return total


@functools.cache
def sums_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of two matrices in ``dtype`` can be added to one in float32 where that is: on GPUs only.

    Tried once, on a few numbers: the host waits for its device then.
    """
    if device.type != "cuda":
        return False
    left, right = (torch.full((16, 16), value, dtype=dtype, device=device) for value in (0.5, 1.0))
    total = torch.full((16, 16), 2.0**-10, device=device)  # which next to 8 is lost in the 8 bits of bfloat16
    try:
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        logger.info("products in %s can't be added to float32 in place: %s", dtype, error)
        return False
    return bool((total == 8.0 + 2.0**-10).all())
