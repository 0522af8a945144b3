"""Answers to prompts by all ranks together, while a model trains or afterwards."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lisa_dist.checkpoint.description import GENERATION_FILE, source_file
from lisa_dist.data.stops import stop_ids
from lisa_dist.method.module import TrainModule
from lisa_dist.models.architecture import original_class
from lisa_dist.models.generation import (
    Ended,
    answering,
    find_cache_use,
    generate_rows,
    kernel_for_answers,
    positions_of,
)
from lisa_dist.models.masking import rotary_limits
from lisa_dist.runtime import distributed

logger = logging.getLogger(__name__)

# What a model's files may ask of generation and is not done here, with the value, beside none, that changes nothing.
PICKY: dict[str, Any] = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "guidance_scale": 1,
    "exponential_decay_length_penalty": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "stop_strings": None,
}
OF_DRAWS: dict[str, Any] = {"top_p": 1, "top_k": 0, "min_p": 0, "typical_p": 1}

Asked = tuple[int, list[int], int]  # where the prompt stands among all, its tokens, the key of its draws


@dataclass(frozen=True)
class AnswerSettings:
    """How prompts are answered."""

    stop_ids: frozenset[int]  # tokens that end an answer
    max_new_tokens: int  # the longest answer
    batch_size: int = 8  # prompts that a rank answers together
    temperature: float = 0.0  # 0: the most likely token each time; above, draws from softmax(logits / temperature)
    seed: int = 0  # of the draws
    ended: Ended | None = None  # whether an answer so far is to be the whole one


class Answerer:
    """Answers prompts by a model, however it is sharded, with transformers' cache where the architecture's is right."""

    def __init__(self, train_module: TrainModule) -> None:
        """Find how the cache may be used, and say where that is not in full. Collective: every rank; rank 0 tries."""
        self.module: Any = train_module.store.module
        self.dims = train_module.dims
        self.positions = positions_of(self.module.config)
        self.alone_above = min(rotary_limits(self.module.config).values(), default=math.inf)  # tokens, answer included
        blocks_path = train_module.store.layers.blocks_path
        self.kernel, (self.cache_use, reason) = distributed.on_rank_zero(
            lambda: (kernel := kernel_for_answers(self.module), find_cache_use(self.module, blocks_path, kernel))
        )
        if self.cache_use != "batched" and distributed.is_main():
            how = "one prompt at a time" + (
                "" if self.cache_use == "single" else " and without its cache, which is slow"
            )
            logger.warning("%s is asked %s: %s", original_class(self.module).__name__, how, reason)

    def answers(
        self, prompts: list[list[int]], settings: AnswerSettings, keys: list[int] | None = None
    ) -> list[list[int]]:
        """Return the tokens of each answer, without the stopping one. Collective: every rank, with equal arguments.

        An answer ends where the model's positions do; a prompt that leaves none has an empty one. What is drawn depends
        on the seed, the prompt, and how often it came before, and on no other prompt. ``keys`` are those of
        :func:`draw_keys` where the prompts are a part of more.
        """
        limits = [self.room(prompt, settings.max_new_tokens) for prompt in prompts]
        keys = draw_keys(prompts, settings.seed) if keys is None else keys
        answers: dict[int, list[int]] = {}
        # Ranks that generate together have equal limits, and rows of a batch are about equally long.
        order = sorted(range(len(prompts)), key=lambda index: (-limits[index], -len(prompts[index])))
        with answering(self.module, self.kernel):
            for limit, group in groupby(order, key=limits.__getitem__):
                indices = list(group)
                if limit == 0:
                    answers |= {index: [] for index in indices}
                    continue
                allowed = replace(settings, max_new_tokens=limit)
                asked = [(index, prompts[index], keys[index]) for index in indices]
                answers |= self._uncached(asked, allowed) if self.cache_use == "none" else self._cached(asked, allowed)
        return [answers[index] for index in range(len(prompts))]

    def room(self, prompt: list[int], max_new_tokens: int) -> int:
        """Return how many tokens an answer to a prompt may have at most."""
        left = math.inf if self.positions is None else self.positions - len(prompt)
        return int(max(0, min(max_new_tokens, left)))

    def stream(self, prompt: list[int], settings: AnswerSettings, streamer: BaseStreamer | None) -> list[int]:
        """Answer one prompt on every rank, its tokens given to ``streamer`` as they come. Collective: every rank."""
        limit = self.room(prompt, settings.max_new_tokens)
        if limit == 0:
            return []
        allowed = replace(settings, max_new_tokens=limit)
        asked = [(0, prompt, draw_keys([prompt], settings.seed)[0])]
        with answering(self.module, self.kernel):
            if self.cache_use == "none":
                return self._uncached(asked, allowed, streamer)[0]
            return self._generate(asked, allowed, streamer)[0]

    def _cached(self, asked: list[Asked], settings: AnswerSettings) -> dict[int, list[int]]:
        size = settings.batch_size if self.cache_use == "batched" else 1
        long = sum(len(prompt) + settings.max_new_tokens > self.alone_above for _, prompt, _ in asked)  # the first ones
        batches = [[one] for one in asked[:long]]
        batches += [asked[start : start + size] for start in range(long, len(asked), size)]
        ranks, rank = self.dims.data_ranks, self.dims.data_rank
        own: dict[int, list[int]] = {}
        for turn in range(math.ceil(len(batches) / ranks)):
            place = turn * ranks + rank
            # A rank without a batch repeats one, the shortest to read, so that ranks keep step.
            own |= self._generate(batches[min(place, len(batches) - 1)], settings)
        return {index: answer for part in distributed.gather_objects(own) for index, answer in part.items()}

    def _generate(
        self, batch: list[Asked], settings: AnswerSettings, streamer: BaseStreamer | None = None
    ) -> dict[int, list[int]]:
        draws = KeyedDraws([key for _, _, key in batch], settings.temperature) if settings.temperature > 0 else None
        found = generate_rows(
            self.module,
            [prompt for _, prompt, _ in batch],
            set(settings.stop_ids),
            settings.max_new_tokens,
            choose=draws,
            ended=settings.ended,
            synced=distributed.world_size() > 1,
            streamer=streamer,
        )
        return {index: answer for (index, _, _), answer in zip(batch, found)}

    def _uncached(
        self, asked: list[Asked], settings: AnswerSettings, streamer: BaseStreamer | None = None
    ) -> dict[int, list[int]]:
        """Answer on every rank, running the whole text through the model for each token."""
        device = distributed.device()
        answers = {}
        for index, prompt, key in asked:
            draws = KeyedDraws([key], settings.temperature) if settings.temperature > 0 else None
            ids = list(prompt)
            if streamer is not None:
                streamer.put(torch.tensor([ids]))
            while len(ids) - len(prompt) < settings.max_new_tokens:
                positions = torch.arange(len(ids), device=device)[None]
                inputs = torch.tensor([ids], device=device)
                logits = self.module(input_ids=inputs, position_ids=positions).logits[:, -1].float()
                chosen = int(logits.argmax(-1) if draws is None else draws(logits))
                if streamer is not None:
                    streamer.put(torch.tensor([chosen]))
                if chosen in settings.stop_ids:
                    break
                ids.append(chosen)
                if settings.ended is not None and settings.ended(ids[len(prompt) :]):
                    break
            if streamer is not None:
                streamer.end()
            answers[index] = ids[len(prompt) :]
        return answers


def ends_of(tokenizer: PreTrainedTokenizerBase, train_module: TrainModule, source: str) -> set[int]:
    """Return the tokens that end an answer: those of the tokenizer, and those that a model's files name.

    Collective: every rank.

    Args:
        tokenizer: of the model.
        train_module: the model, whose config.json counts where there is no generation_config.json.
        source: the directory or the hub id of its files.
    """

    def own() -> int | list[int] | None:
        settings = own_settings(train_module, source)
        return None if settings is None else settings.eos_token_id

    return stop_ids(tokenizer, distributed.on_rank_zero(own))


def own_settings(train_module: TrainModule, source: str) -> GenerationConfig | None:
    """Return how a model's files want it to be asked, see :func:`ends_of`; None where they do not say."""
    file = source_file(source, GENERATION_FILE)
    if file is not None:
        return GenerationConfig.from_pretrained(file.parent)
    found: GenerationConfig | None = train_module.store.module.generation_config  # as transformers finds it
    return found


def not_followed(settings: GenerationConfig | None, temperature: float) -> dict[str, Any]:
    """Return those of ``settings`` that change answers of transformers' ``generate`` and none here, with their values.

    ``temperature`` is that of the answers here, 0 for the most likely tokens.
    """
    set_ones = {} if settings is None else settings.to_diff_dict()
    names = PICKY | (OF_DRAWS if temperature > 0 else {})
    return {name: set_ones[name] for name in names if set_ones.get(name) and set_ones[name] != names[name]}


def draw_keys(prompts: list[list[int]], seed: int) -> list[int]:
    """Return what keys the draws of each prompt: the seed, the prompt, and how often it came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in map(tuple, prompts):
        keys.append(hash((seed, seen[prompt], *prompt)) % 2**63)
        seen[prompt] += 1
    return keys


class KeyedDraws:
    """Draws the next token of each row from numbers of the row's own key, so that no row changes another's."""

    def __init__(self, keys: list[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(key) for key in keys]
        self.temperature = temperature

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the drawn tokens, [b], of logits [b, V]."""
        numbers = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self.generators])
        summed = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        # Scaled by what rounding has made of the sum, so that a number never lies past the last token.
        places = numbers.to(logits.device)[:, None] * summed[:, -1:]
        return torch.searchsorted(summed, places, right=True).clamp_max(logits.shape[-1] - 1)[:, 0]
