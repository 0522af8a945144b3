"""What becomes of every causal architecture of transformers here: built or refused, and how it packs.

``python -m tests.support.every_architecture`` prints the table of docs/packing.md; model types as arguments print
those alone, with their reasons.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.models.architecture import build_meta_model, read_architecture
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.masking import find_separation, install_position_handling
from lisa_dist.models.tiny_copy import FIRST_PLAIN_TOKEN, VOCABULARY, NoTinyCopyError, tiny_copy
from lisa_dist.objectives.chunked_head import install_loss_head, plain_loss

SECONDS = 120  # for one architecture
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DECODER = {"is_decoder": True, "is_encoder_decoder": False}
# Fields without which the defaults make no model, or none with the layers that the architecture is known for.
FIELDS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8}},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 1408},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"], "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"], "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"], "num_hidden_layers": 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True, "attn_layers": ["local"] * 2},  # of lsh the hashes of all tokens choose who meets
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
}


@dataclass(frozen=True)
class Outcome:
    """What was found of one architecture."""

    name: str  # its model type
    kind: str  # positions, mask, refused, untried (no tiny copy, or it does not run), not built
    reason: str = ""
    causal: bool | None = None  # whether no token of a tiny copy sees a later one
    loss_error: float | None = None  # of the installed loss, relative to the plain loss of the model's own logits
    chunked: bool | None = None  # whether the loss needs no more than a chunk of logits at a time


def architectures() -> list[tuple[str, dict[str, Any]]]:
    """Return name and fields of what is tried: every model type, and decoders of the types that are mostly none."""
    tried = [(name, FIELDS.get(name, {})) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if name not in FIELDS and _is_no_decoder(name):
            tried.append((f"{name} (is_decoder)", _DECODER))
    return tried


def _is_no_decoder(name: str) -> bool:
    try:
        read_architecture(ModelConfig(architecture={"model_type": name}))
    except UserError as error:
        return "(decoders)" in str(error)
    return False


def examine(name: str, fields: dict[str, Any]) -> Outcome:
    """Build one architecture, install its loss, and find how it packs; whatever is no :class:`UserError` is raised."""
    config = ModelConfig(architecture={"model_type": name.split(" ")[0], **fields})
    with _time_limit(SECONDS):
        try:
            model = build_meta_model(config)
            layers = find_layers(model)
            chunked = install_loss_head(model, layers, 16) is not None
        except UserError as error:
            return Outcome(name, "not built", str(error))
        try:
            causal, loss_error = _try_out(tiny_copy(model, layers.blocks_path))
        except NoTinyCopyError:
            causal = loss_error = None
        try:
            return Outcome(name, find_separation(model, layers.blocks_path), "", causal, loss_error, chunked)
        except UserError as error:
            kind = "untried" if "can't be tried" in str(error) else "refused"
            return Outcome(name, kind, str(error), causal, loss_error, chunked)


def _try_out(model: Any) -> tuple[bool | None, float | None]:
    """Return whether a tiny copy is causal, and by how much its installed loss is off; None where it does not run."""
    tokens = torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, -1] = FIRST_PLAIN_TOKEN + (changed[:, -1] + 1) % (VOCABULARY - FIRST_PLAIN_TOKEN)
    try:
        with torch.no_grad():
            torch.manual_seed(0)  # Reformer hashes at random
            logits = model(input_ids=tokens, use_cache=False).logits
            torch.manual_seed(0)
            later = model(input_ids=changed, use_cache=False).logits
    except Exception:  # foreign code that wants other inputs: the check of packing says which
        return None, None
    causal = bool((logits[:, :-1] - later[:, :-1]).abs().max() < 2e-3 * logits.std())
    install_loss_head(model, find_layers(model), 16)
    install_position_handling(model, None)
    positions = torch.arange(24).expand(2, 24)
    try:
        loss = model(input_ids=tokens, labels=tokens, position_ids=positions)
        loss.backward()
    except AssertionError:  # Reformer's, which makes gradients in training mode alone
        return causal, None
    expected = plain_loss(logits, tokens)
    return causal, float((loss.detach() - expected).abs() / expected)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


HEADINGS = {
    "positions": "pack by positions",
    "mask": "pack with an explicit mask",
    "refused": "refused: a sample behind another gets other numbers, with a mask too",
    "untried": "refused: no tiny copy can be built, or it does not run on plain text",
}


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a Markdown table; architectures that are built nowhere are left out."""
    lines = ["| outcome | architectures |", "| --- | --- |"]
    for kind, heading in HEADINGS.items():
        names = [outcome.name for outcome in outcomes if outcome.kind == kind]
        lines.append(f"| {heading} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Print the table, or the outcomes of ``names``."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = []
    for name, fields in architectures():
        if names and name.split(" ")[0] not in names:
            continue
        try:
            outcome = examine(name, fields)
        except Exception as error:
            outcome = Outcome(name, "crashed", f"{type(error).__name__}: {error}")
        outcomes.append(outcome)
        print(outcome, file=sys.stdout if names else sys.stderr, flush=True)
    if not names:
        print(table(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
