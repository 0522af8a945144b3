"""lm-evaluation-harness on a sharded model. Imports the optional package ``lm_eval``, so it is imported when needed.

Every rank runs the harness over the same samples in the same order. Likelihoods and
answers are split among the ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lisa_dist.commands.inference import OpenedModel
from lisa_dist.config import EvaluateConfig, UserError
from lisa_dist.config.errors import nearest
from lisa_dist.runtime import distributed
from lisa_dist.training.generation import Answerer, AnswerSettings

LONGEST_ANSWER = 256  # tokens, where a task does not say

Request = tuple[Any, list[int], list[int]]  # texts, context, continuation


def evaluate_tasks(
    opened: OpenedModel, config: EvaluateConfig, batch_size: int, longest: int
) -> dict[str, dict[str, Any]]:
    """Run the tasks of lm-evaluation-harness that ``config`` names; rank 0 gets its results. Collective: every rank.

    Raises:
        UserError: a task is unknown.
    """
    manager = TaskManager(include_path=config.task_dir)
    for task in config.tasks:
        if not manager.match_tasks([task]):
            hint = nearest(task, manager.all_tasks)
            raise UserError(f"evaluate.tasks={config.tasks}: the harness knows no task {task}{hint}")
    model = ShardedModelOfHarness(opened, batch_size, longest, config.batch_size)
    found = simple_evaluate(model, tasks=list(config.tasks), limit=config.limit, task_manager=manager)
    return found["results"] if found is not None else {}  # the harness gives them to rank 0 alone


class ShardedModelOfHarness(TemplateLM):
    """What the harness asks of a model. Every method is collective: every rank, with equal arguments."""

    def __init__(self, opened: OpenedModel, batch_size: int, longest: int, answers_at_once: int) -> None:
        """Args:
        opened: the model.
        batch_size: texts of a forward pass of a rank.
        longest: tokens of a text; longer ones lose their beginning.
        answers_at_once: prompts that a rank answers together.
        """
        super().__init__()
        self.module = opened.train_module.store.module.eval()
        self.dims = opened.train_module.dims
        self.tokenizer = opened.tokenizer
        self.batch_size = batch_size
        self.longest = longest
        self.answers_at_once = answers_at_once
        self.answers = Answerer(opened.train_module).answers

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, as the harness has it for transformers' models."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens)).input_ids

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        chunks = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        ranks, rank = self.dims.data_ranks, self.dims.data_rank
        own: dict[int, tuple[float, bool]] = {}
        for turn in range(math.ceil(len(chunks) / ranks)):
            place = turn * ranks + rank
            chunk = chunks[place if place < len(chunks) else 0]  # a rank without one repeats one: ranks keep step
            own |= dict(zip(chunk, self._score([requests[index][1:] for index in chunk])))
        everything: dict[int, tuple[float, bool]] = {}
        for part in distributed.gather_objects(own):
            everything |= part
        return [everything[index] for index in range(len(requests))]

    @torch.no_grad()
    def _score(self, pairs: list[Any]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the continuation's log-likelihood, and whether it is greedy."""
        texts = [(context + continuation)[-(self.longest + 1) :] for context, continuation in pairs]
        length = max(len(text) for text in texts) - 1
        inputs = torch.full((len(texts), length), self.eot_token_id)
        for row, text in enumerate(texts):
            inputs[row, : len(text) - 1] = torch.tensor(text[:-1])
        device = distributed.device()
        positions = torch.arange(length, device=device).expand(len(texts), length)
        logits = self.module(input_ids=inputs.to(device), position_ids=positions).logits
        scores = []
        for row, (text, (_, continuation)) in enumerate(zip(texts, pairs)):
            last = len(text) - 1
            rows = logits[row, last - len(continuation) : last].float().log_softmax(-1)
            target = torch.tensor(text[-len(continuation) :], device=device)
            likelihood = rows.gather(1, target[:, None]).sum()
            scores.append((float(likelihood), bool((rows.argmax(-1) == target).all())))
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.longest, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        # Those that are to be answered alike are answered together.
        alike: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[1]
            stops, limit = _stops(settings), int(settings.get("max_gen_toks", LONGEST_ANSWER))
            temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
            alike.setdefault((tuple(stops), limit, temperature), []).append(index)
        for (stops, limit, temperature), indices in alike.items():
            found = self._generate([requests[index].args[0] for index in indices], stops, limit, temperature)
            for index, text in zip(indices, found):
                answers[index] = text
        return answers

    def _generate(self, contexts: list[str], stops: tuple[str, ...], limit: int, temperature: float) -> list[str]:
        def ended(ids: list[int]) -> bool:
            text = str(self.tokenizer.decode(ids))
            return any(stop in text for stop in stops)

        prompts = [self.tok_encode(context)[-max(1, self.longest - limit) :] for context in contexts]
        settings = AnswerSettings(
            frozenset({self.eot_token_id}), limit, self.answers_at_once, temperature, ended=ended if stops else None
        )
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in self.answers(prompts, settings)]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def _stops(settings: dict[str, Any]) -> list[str]:
    """Return the texts that end an answer to a task."""
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]
