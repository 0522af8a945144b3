"""Every family through loading, the wrapping policy and the chunked loss on 2 ranks equals one plain process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lisa_dist.config import ModelConfig, ParallelConfig, PrecisionConfig
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.loading import load_pretrained, restore_buffers
from lisa_dist.objectives.chunked_head import install_loss_head
from lisa_dist.runtime import distributed
from lisa_dist.sharding import build_store
from lisa_dist.sharding.dimensions import ParallelDims
from tests.support.families import FAMILIES, tiny_config
from tests.support.ranks import run_on_ranks

ROWS_A_RANK = 2


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """4 rows; those of rank 1 have fewer label tokens."""
    input_ids = torch.randint(3, 128, (2 * ROWS_A_RANK, 12), generator=torch.Generator().manual_seed(5))
    labels = input_ids.clone()
    labels[:, :3] = -100
    labels[2:, 5:] = -100
    return input_ids, labels


def differences(root: str, family: str) -> dict[str, float]:
    """Return the relative differences of the loss and of each parameter's gradient from one plain process."""
    directory = f"{root}/{family}"
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    input_ids, labels = batch()
    expected = plain(input_ids=input_ids, labels=labels).loss * (labels[:, 1:] != -100).sum()
    expected.backward()

    model = build_meta_model(ModelConfig(path=directory))
    layers = find_layers(model)
    assert install_loss_head(model, layers, chunk_tokens=7) is not None
    parallel = ParallelConfig()
    precision = PrecisionConfig(frozen="float32", compute="float32")
    store = build_store(model, layers, ParallelDims.of(parallel).mesh, parallel, precision, lambda name: False)
    store.allocate(list(store.names), torch.device("cpu"))
    restore_buffers(model)
    load_pretrained(model, directory)
    mine = slice(ROWS_A_RANK * dist.get_rank(), ROWS_A_RANK * (dist.get_rank() + 1))
    loss = model(input_ids=input_ids[mine], labels=labels[mine])
    loss.backward()
    total = distributed.all_reduce_sum([loss.item()])[0]
    found = {"loss": abs(total / expected.item() - 1)}
    for name, parameter in model.named_parameters():
        theirs = plain.get_parameter(name).grad
        theirs = torch.zeros(parameter.shape) if theirs is None else theirs  # an expert that no token chose
        difference = (parameter.grad.full_tensor() - theirs).abs().max()
        found[name] = (difference / (theirs.abs().max() + 1e-6)).item()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_one_plain_process(family: str, tmp_path: Path) -> None:
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).save_pretrained(tmp_path / family)
    for found in run_on_ranks(2, differences, str(tmp_path), family):
        assert max(found.values()) < 1e-5, max(found, key=lambda name: found[name])
