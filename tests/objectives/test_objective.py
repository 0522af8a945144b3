"""The loss and its divisor are the objective's: steps, validation and probes ask it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_dist.config import Config, UserError
from lisa_dist.data.batches import MicroBatch
from lisa_dist.method.module import begin_period
from lisa_dist.method.probes import gradient_norms, mean_loss
from lisa_dist.objectives.supervised import supervised
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 18,
    "intermediate_size": 27,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}
LENGTHS = [9, 4, 7, 12]  # of the sequences of a step, one a micro-batch, two a rank
TOKENS = sum(LENGTHS) - len(LENGTHS)  # that are predicted


def doubled_per_sequence(model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, int]:
    """Twice the loss of each sequence, in the mean over sequences: another loss with another divisor."""
    loss, _ = supervised(model, micro_batch)
    return 2 * loss, len(micro_batch["input_ids"])


def ask(objective: Any, in_backward: bool) -> dict[str, Any]:
    """What a probe, a validation and a step find by ``objective``. Runs on every rank."""
    config = Config()
    config.model.architecture, config.model.init = dict(ARCHITECTURE), "random"
    config.precision.frozen = config.precision.compute = "float32"
    config.optimizer.grad_clip, config.optimizer.in_backward = 0.0, in_backward
    train_module = build_and_load(config)
    begin_period(train_module, 0)
    train_module.objective = objective
    generator = torch.Generator().manual_seed(3)
    all_ids = [torch.randint(0, 61, (1, length), generator=generator) for length in LENGTHS]
    batches = [
        {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.shape[1])[None]}
        for ids in all_ids[distributed.rank() :: distributed.world_size()]
    ]
    store = train_module.store
    result = train_step(train_module, batches[:1] if in_backward else batches, 0, 1)
    return {
        "step": (result.loss, result.grad_norm),
        "label_tokens": result.label_tokens,
        "validation": mean_loss(store.module, objective, train_module.dims, batches),
        "probe": gradient_norms(store, objective, train_module.update, train_module.dims, batches[:1]),
    }


@pytest.mark.parametrize("in_backward", [False, True])
def test_steps_validation_and_probes_take_loss_and_divisor_from_the_objective(in_backward: bool) -> None:
    plain = run_on_ranks(2, ask, supervised, in_backward)[0]
    other = run_on_ranks(2, ask, doubled_per_sequence, in_backward)[0]
    of_first = sum(LENGTHS[:2]) - 2  # label tokens of each rank's first micro-batch
    tokens, sequences = (of_first, 2) if in_backward else (TOKENS, len(LENGTHS))
    assert plain["label_tokens"] == other["label_tokens"] == tokens, "tokens are counted whatever the loss is"
    factor = 2 * tokens / sequences
    assert other["step"] == pytest.approx([factor * value for value in plain["step"]], rel=1e-5)
    assert other["probe"] == pytest.approx([of_first * value for value in plain["probe"]], rel=1e-2)
    if not in_backward:
        assert other["validation"] == pytest.approx(2 * TOKENS / len(LENGTHS) * plain["validation"], rel=1e-2)


class Product(nn.Linear):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.linear(input_ids.float(), self.weight)  # as in MiniMax a buffer, which stays float32


class Norm(nn.LayerNorm):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.layer_norm(input_ids, (4,), self.weight)  # as of XGLM's positions, in float32


@pytest.mark.parametrize("model", [Product(4, 4, dtype=torch.bfloat16), Norm(4, dtype=torch.bfloat16)])
def test_a_model_that_mixes_float32_into_bfloat16_is_refused_by_name(model: nn.Module) -> None:
    batch = {"input_ids": torch.ones(1, 4), "labels": torch.ones(1, 4)}
    with pytest.raises(
        UserError, match=r"precision\.compute=bfloat16: the code of (Product|Norm) mixes .* set precision"
    ):
        supervised(model, batch)
