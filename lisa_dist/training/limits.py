"""What a model has a place for (tokens of its tokenizer, of rows and prompts, positions), and how it may be trained."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lisa_dist.config import Config, ModelConfig, UserError
from lisa_dist.config.placement import is_block_major, stream_frozen
from lisa_dist.data.prepare import highest_token
from lisa_dist.data.sequences import Sequences
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import build_meta_model, read_architecture
from lisa_dist.models.generation import positions_of
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.masking import has_table_of_positions
from lisa_dist.runtime import distributed
from lisa_dist.sharding.recomputed import check_recomputed


def open_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model.

    Raises:
        UserError: there is none, or it has more tokens than the model knows. Special ones may be more, as a place for
            images in a language model's: :func:`check_tokens` looks whether any is used.
    """
    source = config.tokenizer or config.path
    if source is None:
        raise UserError("model.path=null: name a Hugging Face directory, a hub id or builtin:demo, or choose a preset")
    known = read_architecture(config).vocab_size
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    special -= {tokenizer.pad_token, tokenizer.eos_token}  # which batches hold, whatever the rows do
    beyond = [number for token, number in tokenizer.get_vocab().items() if number >= known and token not in special]
    if beyond:
        raise UserError(
            f"model.tokenizer={source}: has {max(beyond) + 1} tokens but the model knows {known}; "
            "choose the model's own tokenizer"
        )
    return tokenizer


def check_tokens(sequences: Sequences, tokenizer: PreTrainedTokenizerBase, known: int, key: str = "data.path") -> None:
    """Raise :class:`UserError` where a row holds a token that the model, which knows so many, has no embedding of.

    Collective: every rank.
    """
    if max(tokenizer.get_vocab().values(), default=0) < known:
        return
    highest = distributed.on_rank_zero(lambda: highest_token(sequences.rows))
    check_token(highest, tokenizer, known, f"{key}: a row")


def check_token(highest: int, tokenizer: PreTrainedTokenizerBase, known: int, where: str) -> None:
    """Raise :class:`UserError` where the highest token of ``where`` is none of those that the model knows, so many."""
    if highest >= known:
        raise UserError(
            f"{where} holds the token {tokenizer.convert_ids_to_tokens(highest)} (number {highest}), and the model "
            f"knows {known} tokens; take it out, or out of the chat template that writes it"
        )


def check_positions(config: ModelConfig, architecture: PretrainedConfig, tokens: int) -> None:
    """Raise :class:`UserError` where the model can't be trained on rows of so many tokens, for want of positions."""
    if architecture.model_type == "reformer":
        raise UserError(
            f"{config.named}: model_type=reformer can't be trained here, since its own backward pass takes rows of "
            "whole chunks alone, and no shards; choose another model"
        )
    positions = positions_of(architecture)
    if positions is None or tokens <= positions:
        return
    model = build_meta_model(config, architecture)
    if has_table_of_positions(model, find_layers(model, config.blocks).blocks_path):
        raise UserError(
            f"data.sequence_length: rows are {tokens} tokens long (padding counts), and the positions of this model "
            f"are a table of {positions}; use data.sequence_length={positions} or less"
        )


def check_streaming(config: Config, architecture: PretrainedConfig, ranks: int) -> None:
    """Raise :class:`UserError` where frozen blocks come from host memory, and the model's gradients would be others."""
    parallel = config.parallel
    streams = stream_frozen(parallel, config.precision, parallel.ranks_of_replica(ranks))
    trains_all = config.sampler.trains_all_blocks and config.update.trains_whole_blocks
    if streams and not trains_all and not is_block_major(parallel, config.train):  # which is tried by itself
        model = build_meta_model(config.model, architecture)
        check_recomputed(model, find_layers(model, config.model.blocks).blocks_path)
