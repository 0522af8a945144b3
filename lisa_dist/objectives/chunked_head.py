"""The LM head and its loss in chunks of tokens, so that the logits of a micro-batch never exist in full.

The head's forward and the root's are replaced on the instances: parameter names stay Hugging Face's, and the hooks
of FSDP2 on head and root fire as they do for any forward.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lisa_dist.config import UserError
from lisa_dist.data.batches import up_to_last_label
from lisa_dist.data.encode import UNTRAINED
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.objectives.chunked_cross_entropy import ChunkedCrossEntropy, LogitTransform

logger = logging.getLogger(__name__)


def shift_labels(labels: Tensor) -> Tensor:
    """Return the target of each position, [b, t]: the next token's label; -100 at the last position."""
    return F.pad(labels[:, 1:], (0, 1), value=UNTRAINED)


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the float32 sum of the cross-entropy of [b, t, V] logits over unshifted labels [b, t]."""
    targets = shift_labels(labels).flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=UNTRAINED, reduction="sum")


def install_loss_head(
    model: nn.Module, layer_map: LayerMap, chunk_tokens: int, router_aux_loss: bool = False, in_place: bool = False
) -> LogitTransform | None:
    """Make ``model(input_ids=..., labels=...)`` return the summed loss, computed in chunks of ``chunk_tokens`` tokens.

    Call it before ``fully_shard``, on any device, but outside ``FakeTensorMode``: it looks at a few values. Labels
    are unshifted [b, t], -100 where there is no loss; the result is a float32 scalar, the sum over label tokens. With
    ``labels=None`` the model answers as before. With ``router_aux_loss`` the router's loss times its coefficient is
    added for each label token, in training. ``in_place``: logits and gradients share their memory, by a kernel that
    needs a GPU.

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
        router_loss = balance if model.training else None  # a held-out loss is the cross-entropy alone
        if router_loss is not None:
            kwargs["output_router_logits"] = True
        if transform is None:
            outputs = original(*args, **kwargs)
            loss = plain_loss(outputs.logits, labels)
        else:
            outputs = decoder(*args, **kwargs)
            loss = head(outputs.last_hidden_state, labels=labels)
        if router_loss is not None:
            loss = loss + router_loss(outputs.router_logits, labels) * (shift_labels(labels) != UNTRAINED).sum()
        return loss

    model.forward = forward  # type: ignore[method-assign]
    return transform


def _loss_head(head: nn.Module, transform: LogitTransform, chunk_tokens: int, in_place: bool) -> Callable[..., Tensor]:
    product = head.forward

    def forward(hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return product(hidden)
        weight: Any = head.weight
        hidden = hidden.flatten(0, 1).to(weight.dtype)  # Mamba's are float32, which its own forward casts so too
        inputs: Any = hidden, weight, head.bias, shift_labels(labels).flatten(), transform
        return ChunkedCrossEntropy.apply(*inputs, chunk_tokens, in_place, torch.is_grad_enabled())

    return forward


def _router_loss(model: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    """Return the weighted load-balancing loss of a mixture-of-experts model as a function of router logits and labels.

    Tokens after a row's last label don't count: padding would be taken for load of the experts that it goes to.
    """
    config: Any = model.config
    balance = getattr(inspect.getmodule(type(model)), "load_balancing_loss_func", None)
    takes = [] if balance is None else list(inspect.signature(balance).parameters)  # Doge's counts keys, too
    if balance is None or takes[2:] != ["top_k", "attention_mask"] or not hasattr(config, "router_aux_loss_coef"):
        raise UserError(
            f"model.router_aux_loss=true: {type(model).__name__} has no router loss that is known here; "
            "leave the key false"
        )
    experts, chosen, coefficient = model.num_experts, config.num_experts_per_tok, config.router_aux_loss_coef

    def weighted(router_logits: Any, labels: Tensor) -> Tensor:
        counted = up_to_last_label(labels).bool()  # repeated below for every layer and expert, a byte each
        counted |= ~counted.any()  # a micro-batch without labels: a mean over no tokens is no number
        return coefficient * balance(router_logits, experts, chosen, counted)

    return weighted


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
