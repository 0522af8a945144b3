"""lm-evaluation-harness on a sharded model. Imports the optional package ``lm_eval``, so it is imported when needed.

Every rank runs the harness over all samples in the same order, as if it were alone. Texts and prompts are split among
the ranks below, and each rank gets all their results.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor

from lisa_dist.commands.inference import OpenedModel
from lisa_dist.config import Config, EvaluateConfig, UserError
from lisa_dist.config.errors import as_written, in_one_line, nearest
from lisa_dist.config.paths import local_path
from lisa_dist.models.generation import positions_of
from lisa_dist.runtime import distributed
from lisa_dist.training.generation import OF_DRAWS, PICKY, Answerer, AnswerSettings

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts (None: a window of a longer one), context, rest

EVERYTHING = sys.maxsize  # texts or prompts that the harness hands over at once
BOOTSTRAPS = 100_000  # the harness' own number
NEUTRAL = PICKY | OF_DRAWS  # what a task may say beside ANSWER_SETTINGS, with the values that change nothing
ANSWER_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature"}


def evaluate_tasks(opened: OpenedModel, config: Config, stop_ids: set[int]) -> dict[str, Any]:
    """Run the tasks of lm-evaluation-harness that ``config.evaluate`` names. Collective: every rank.

    Args:
        opened: the model.
        config: its ``evaluate``; texts have at most ``data.sequence_length`` tokens, longer ones lose their beginning;
            a forward pass of a rank is of ``train.micro_batch_size`` texts; ``train.seed`` is that of draws.
        stop_ids: tokens that end an answer.

    Returns:
        ``tasks``, on rank 0 the harness' results by task, and ``requests_cut``, how many lost their beginning.

    Raises:
        UserError: a task is unknown, can't be loaded or asks for what is not done here.
    """
    manager, names = _find_tasks(config.evaluate)
    # It warns of each text that it cuts, and that it is given a model: what is cut is counted and said once instead.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    model = ShardedModel(opened, config, stop_ids)
    iterations = BOOTSTRAPS if distributed.is_main() else 0  # of rank 0's results alone
    limit = config.evaluate.limit
    found = simple_evaluate(model, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=iterations)
    if model.cut and distributed.is_main():
        logger.warning(
            "%d of %d requests of the tasks are longer than %d tokens (%s): they lost their beginnings",
            *(model.cut, model.asked, model.max_length, model.limited_by),
        )
    return {"tasks": found["results"] if found is not None else {}, "requests_cut": model.cut}


class ShardedModel(HFLM):
    """The harness' own model, with forward passes and answers by all ranks.

    It is the harness' that tokenizes, adds special tokens, cuts, makes windows and reads likelihoods off the logits.
    Every method that asks the model is collective: every rank, with equal arguments.
    """

    def __init__(self, opened: OpenedModel, config: Config, stop_ids: set[int]) -> None:
        """See :func:`evaluate_tasks`."""
        self.opened = opened
        self.module: Any = opened.train_module.store.module.eval()
        self.dims = opened.train_module.dims
        self.key = f"evaluate.tasks={as_written(config.evaluate.tasks)}"
        positions, longest = positions_of(self.module.config), config.data.sequence_length
        self.limited_by = f"data.sequence_length={longest}"
        if positions is not None and positions < longest:
            self.limited_by, longest = "the model's positions", positions
        super().__init__(
            # No module: the harness would tie its weights, which are tied before they are sharded.
            SimpleNamespace(config=self.module.config, device=distributed.device()),
            backend="causal",
            tokenizer=opened.tokenizer,
            max_length=longest,
            batch_size=EVERYTHING,
            softmax_dtype="float32",
        )
        self.texts_at_once = config.train.micro_batch_size
        self.answerer = Answerer(opened.train_module)
        self.answer_settings = AnswerSettings(
            frozenset(stop_ids), self.max_gen_toks, config.evaluate.batch_size, seed=config.train.seed
        )
        self.asked = self.cut = 0  # requests

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._check_and_count(requests)
        # Those that differ in their last token alone have one row of a forward pass: the harness' rule. Ranks make
        # as many passes each, since they gather weights together.
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            rows.setdefault((*context, *continuation[:-1]), []).append(index)
        order = sorted(rows, key=len, reverse=True)
        ranks, rank = self.dims.data_ranks, self.dims.data_rank
        own = order[rank::ranks]
        if len(own) < math.ceil(len(order) / ranks):
            own.append(order[-1])  # of another rank: the shortest
        indices = [index for row in own for index in rows[row]]
        self.batch_size_per_gpu = self.texts_at_once
        try:
            silent = disable_tqdm or not distributed.is_main()
            found = super()._loglikelihood_tokens([requests[index] for index in indices], silent)
        finally:
            self.batch_size_per_gpu = EVERYTHING
        everything: dict[int, tuple[float, bool]] = {}
        for part in distributed.gather_objects(dict(zip(indices, found))):
            everything |= part
        return [everything[index] for index in range(len(requests))]

    def _check_and_count(self, requests: list[Request]) -> None:
        for _, context, continuation in requests:
            self.opened.check_tokens([*context, *continuation], f"{self.key}: a text")
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"{self.key}: a text whose likelihood is asked for has {longest} tokens, but {self.limited_by} "
                f"allows {self.max_length}"
            )
        whole = [len(context) + len(continuation) for texts, context, continuation in requests if texts is not None]
        self.asked += len(whole)
        self.cut += sum(length > self.max_length + 1 for length in whole)  # the last token is not read

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits, [b, s, V], of texts padded at their ends, [b, s] int64."""
        positions = torch.arange(inps.shape[1], device=inps.device).expand(inps.shape)
        with torch.no_grad():
            return self.module(input_ids=inps, position_ids=positions).logits

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or not distributed.is_main())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm or not distributed.is_main())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            self._check_generation(request.args[1])
        self.asked += len(requests)
        return super().generate_until(requests, disable_tqdm or not distributed.is_main())

    def _check_generation(self, settings: dict[str, Any]) -> None:
        asked = normalize_gen_kwargs(settings, self.max_gen_toks)
        longest = asked["max_gen_toks"]
        if longest >= self.max_length:
            raise UserError(
                f"{self.key}: answers may have {longest} tokens, which leaves none for prompts, since "
                f"{self.limited_by} allows {self.max_length} together; max_gen_toks in a task's generation_kwargs "
                "makes answers shorter"
            )
        for name, value in asked.items():
            harmless = name in OF_DRAWS and not asked["do_sample"]
            if name not in ANSWER_SETTINGS and not harmless and (name not in NEUTRAL or value != NEUTRAL[name]):
                raise UserError(
                    f"{self.key}: generation with {name}={value} is not done here; known are "
                    f"{', '.join(sorted(ANSWER_SETTINGS))}"
                )

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, **kwargs)
        if left_truncate_len is None:
            return ids, mask
        self.cut += int((mask.sum(dim=1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """Return prompts, [b, s] int64 and padded at the left, with their answers after them."""

        def ended(ids: list[int]) -> bool:
            text = str(self.tokenizer.decode(ids))
            return any(term in text for term in stop if term)

        assert attention_mask is not None, "the harness gives it"
        rows, mask = context.tolist(), attention_mask.tolist()
        prompts = [[token for token, seen in zip(*row) if seen] or [self.prefix_token_id] for row in zip(rows, mask)]
        for prompt in prompts:
            self.opened.check_tokens(prompt, f"{self.key}: a text")
        chosen = replace(
            self.answer_settings,
            max_new_tokens=max_length - context.shape[1],
            temperature=float(settings["temperature"]) if settings["do_sample"] else 0.0,
            ended=ended,
        )
        answers = self.answerer.answers(prompts, chosen)
        width = max(map(len, answers))
        return torch.tensor(
            [row + answer + [self.eot_token_id] * (width - len(answer)) for row, answer in zip(rows, answers)]
        )


class _Tasks(TaskManager):
    """The harness' tasks; what can't be loaded or run is a mistake of who names them."""

    def load(self, task_list: Any) -> Any:
        key = f"evaluate.tasks={as_written(task_list)}"
        try:
            loaded = super().load(task_list)
        except Exception as error:  # of files, of data sets and of hubs: many kinds
            raise UserError(f"{key}: lm-evaluation-harness can't load them ({in_one_line(error)})") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"{key}: {name} runs what the model writes as a program, which evaluate does not do")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"{key}: {name} shows pictures or sounds, evaluate asks in text alone")
        return loaded


def _find_tasks(config: EvaluateConfig) -> tuple[TaskManager, list[str]]:
    """Return where tasks are loaded from, and the names of those that ``config`` means, which may have wildcards."""
    folder = str(local_path(config.task_dir)) if config.task_dir else None
    if folder is not None:
        # The harness reads thousands of files to know its own tasks, on each rank: not where none is asked for.
        manager = _Tasks(include_path=folder, include_defaults=False)
        if set(config.tasks) <= set(manager.all_subtasks):
            return manager, list(config.tasks)
    manager = _Tasks(include_path=folder)
    names: dict[str, None] = {}  # each once
    for task in config.tasks:
        found = manager.match_tasks([task])
        if not found:
            hint = nearest(task, manager.all_tasks)
            raise UserError(f"evaluate.tasks={as_written(config.tasks)}: the harness knows no task {task}{hint}")
        names |= dict.fromkeys(found)
    return manager, list(names)
