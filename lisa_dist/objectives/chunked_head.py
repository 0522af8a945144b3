"""The LM head and its loss in chunks of tokens, so that the logits of a micro-batch never exist in full.

With vocabulary V and N tokens the plain loss holds several N x V tensors in float32; here only
``chunk_tokens`` x V. Gradients are computed in the forward pass, chunk by chunk, while the logits are at hand.
The head's forward and the root's are replaced on the instances: parameter names stay Hugging Face's, and the hooks
of FSDP2 on head and root fire as they do for any forward.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lisa_dist.config import UserError
from lisa_dist.data.encode import UNTRAINED
from lisa_dist.models.layer_map import LayerMap
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
        weight_gradient: Tensor | None = None
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


def shift_labels(labels: Tensor) -> Tensor:
    """Return the target of each position, [b, t]: the next token's label; -100 at the last position."""
    return F.pad(labels[:, 1:], (0, 1), value=UNTRAINED)


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the float32 sum of the cross-entropy of [b, t, V] logits over unshifted labels [b, t]."""
    targets = shift_labels(labels).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=UNTRAINED, reduction="sum")


def install_loss_head(
    model: nn.Module,
    layer_map: LayerMap,
    chunk_tokens: int,
    router_aux_loss: bool = False,
    in_place: bool = False,
) -> LogitTransform | None:
    """Make ``model(input_ids=..., labels=...)`` return the summed loss, computed in chunks of ``chunk_tokens`` tokens.

    Call it before ``fully_shard``, on any device, but outside ``FakeTensorMode``: it looks at a few values. Labels
    are unshifted [b, t], -100 where there is no loss; the result is a float32 scalar, the sum over label tokens. With
    ``labels=None`` the model answers as before. With ``router_aux_loss`` the router's loss times its coefficient is
    added for each label token. ``in_place``: logits and gradients share their memory, by a kernel that needs a GPU.

    Returns what the model does to the head's product; None where it does something else (or has a head of its own
    kind), in which case the model's own head and the plain float32 loss are used, and that is logged.

    Raises:
        UserError: ``router_aux_loss`` for a model without experts.
    """
    original = model.forward
    head = layer_map.head
    balance = _router_loss(model) if router_aux_loss else None
    decoder, transform = _find_decoder(model, head)
    if transform is None:
        logger.warning(
            "%s has a head of its own kind: the logits of a micro-batch are held in full", type(model).__name__
        )
    else:
        head.forward = _loss_head(head, transform, chunk_tokens, in_place)

    @functools.wraps(original)
    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        kwargs["use_cache"] = False
        if balance is not None:
            kwargs["output_router_logits"] = True
        if transform is None:
            outputs = original(*args, **kwargs)
            loss = plain_loss(outputs.logits, labels)
        else:
            outputs = decoder(*args, **kwargs)
            loss = head(outputs.last_hidden_state, labels=labels)
        if balance is not None:
            loss = loss + balance(outputs.router_logits) * (shift_labels(labels) != UNTRAINED).sum()
        return loss

    model.forward = forward  # type: ignore[method-assign]
    return transform


def _loss_head(head: nn.Module, transform: LogitTransform, chunk_tokens: int, in_place: bool) -> Callable[..., Tensor]:
    product = head.forward

    def forward(hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return product(hidden)
        inputs: Any = hidden.flatten(0, 1), head.weight, head.bias, shift_labels(labels).flatten(), transform
        return ChunkedCrossEntropy.apply(*inputs, chunk_tokens, in_place, torch.is_grad_enabled())

    return forward


def _router_loss(model: nn.Module) -> Callable[[Any], Tensor]:
    """Return the weighted load-balancing loss of a mixture-of-experts model as a function of its router logits."""
    config: Any = model.config
    balance = getattr(inspect.getmodule(type(model)), "load_balancing_loss_func", None)
    if balance is None or not hasattr(config, "router_aux_loss_coef"):
        raise UserError(f"model.router_aux_loss=true: {type(model).__name__} has no router loss; leave the key false")
    experts, chosen, coefficient = model.num_experts, config.num_experts_per_tok, config.router_aux_loss_coef
    return lambda router_logits: coefficient * balance(router_logits, experts, chosen)


def _find_decoder(model: Any, head: Any) -> tuple[Any, LogitTransform | None]:
    """Return the module whose hidden states the head is given, and what the model does to the head's product."""
    decoders = dict.fromkeys([model.base_model, model.get_decoder()])  # OPT's root calls a decoder inside its base
    for decoder in decoders:
        transform = _probe_transform(model, decoder, head)
        if transform is not None:
            return decoder, transform
    return model.base_model, None


def _probe_transform(model: Any, decoder: Any, head: Any) -> LogitTransform | None:
    """Find what the root's forward does between the decoder and the logits, by running it around replacements of both.

    The decoder's forward gives known hidden states and the head's known products, so no weight is touched (they
    may be on meta). None where the head is no plain linear layer, where the hidden states reach it changed, or where
    the logits that come out are neither a multiple of the products nor softly capped.
    """
    if type(head).forward is not nn.Linear.forward or decoder is model:
        return None
    hidden = torch.linspace(-1.0, 1.0, 2 * head.in_features).view(1, 2, -1)
    products = torch.linspace(-8.0, 8.0, 2 * head.out_features).view(1, 2, -1)
    seen: list[Tensor] = []

    def known_products(states: Tensor) -> Tensor:
        seen.append(states)
        return products.clone()

    try:
        with (
            _replaced_forward(decoder, lambda *args, **kwargs: _DecoderOutput(hidden)),
            _replaced_forward(head, known_products),
        ):
            logits = model.forward(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits
        # Where a part between the two works on meta, what comes out of it has no values to compare.
        unchanged = len(seen) == 1 and torch.equal(seen[0], hidden) and logits.shape == products.shape
        logits = logits.float().cpu()
    except Exception as error:  # whatever a foreign forward raises, its own head still works
        logger.debug("%s cannot be run around a replaced decoder and head: %s", type(model).__name__, error)
        return None
    if not unchanged:
        return None
    return _fit_transform(products, logits, getattr(model.config, "final_logit_softcapping", None))


class _DecoderOutput:
    """A decoder's answer of which only the hidden states are known; every other field is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


def _fit_transform(products: Tensor, logits: Tensor, cap: float | None) -> LogitTransform | None:
    scale = float(logits[0, -1, -1] / products[0, -1, -1])
    candidates = [LogitTransform(), LogitTransform(scale=scale)]
    if cap is not None:
        candidates.insert(0, LogitTransform(cap=float(cap)))
    return next((guess for guess in candidates if torch.allclose(guess(products), logits, rtol=1e-5, atol=1e-6)), None)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Any:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
