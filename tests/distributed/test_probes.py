"""Every probe on 1 and 2 ranks against plain computation on one process with the whole model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lisa_dist.config import Config, UserError
from lisa_dist.config.sampling import PROBE_KINDS, SAMPLER_CONFIGS, ProbeRequest
from lisa_dist.config.updates import UPDATE_CONFIGS
from lisa_dist.method import probes
from lisa_dist.method.module import TrainModule, begin_period
from lisa_dist.runtime import distributed
from tests.support.families import tiny_config
from tests.support.plain_methods import mean_loss, plain_model
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, full_parameters, make_config, make_global_batches

BLOCKS, BATCHES, THRESHOLD, FACTOR = 3, 2, 2.0, 0.25
SETS = [[0, 2], [1]]


def make_probed(update: str, replicate: int = 1, family: str | None = None) -> Config:
    config = make_config(parallel={"replicate": replicate})
    config.model.architecture["num_hidden_layers"] = BLOCKS
    if family is not None:
        config.model.architecture = tiny_config(family, initializer_range=0.3).to_dict()
    config.update = UPDATE_CONFIGS[update]()
    return config


def learner_between_periods(config: Config) -> TrainModule:
    """A module with block 1 active, and adapters that do something."""
    train_module = build_and_load(config)
    begin_period_with(train_module, [1])
    for name in train_module.store.names:
        if ".lora_B." in name:
            train_module.store.parameter(name).detach().fill_(0.1)
    return train_module


def begin_period_with(train_module: TrainModule, blocks: list[int]) -> None:
    with mock.patch.object(train_module.sampler, "draw", return_value=blocks):
        begin_period(train_module, 0)


def global_batches() -> list[list[dict[str, torch.Tensor]]]:
    """As many probe batches of two micro-batches, the second padded; some inputs of the last one carry no loss."""
    batches = [step[:2] for step in make_global_batches(BATCHES)]
    for _, padded in batches:
        padding = torch.full((1, 3), 5)
        padded["input_ids"] = torch.cat([padded["input_ids"], padding], 1)
        padded["labels"] = torch.cat([padded["labels"], torch.full((1, 3), -100)], 1)
        padded["position_ids"] = torch.arange(padded["input_ids"].shape[1])[None]
    return batches


def probe_on_rank(config: Config) -> dict[str, Any]:
    """All probes, and what they leave behind. Runs on every rank."""
    train_module = learner_between_periods(config)
    store, objective, update = train_module.store, train_module.objective, train_module.update
    before = full_parameters(train_module)
    rank, ranks = distributed.rank(), distributed.world_size()
    # One probe batch is one micro-batch of each rank: on one rank, the two are put side by side beforehand.
    mine = [batch[rank] if ranks == 2 else joined(batch) for batch in global_batches()]
    most_gradients = 0

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most_gradients
        held = [name for name in store.names if store.parameter(name).grad is not None]
        most_gradients = max(most_gradients, sum(".layers." in name for name in held))
        return distributed.local_shard(tensor)

    def measure(request: ProbeRequest) -> list[float]:
        return probes.measure(request, store, objective, update, train_module.dims, mine)

    with mock.patch.object(probes, "local_shard", counting):
        gradients = measure(ProbeRequest("gradient_norms"))
    trained = {name for name in store.names if store.parameter(name).requires_grad}
    found = {
        "gradient_norms": gradients,
        "weight_norms": measure(ProbeRequest("weight_norms")),
        "outliers": measure(ProbeRequest("outlier_shares", settings={"threshold": THRESHOLD})),
        "suppression": measure(ProbeRequest("suppressed_losses", settings={"sets": SETS, "factor": FACTOR})),
        "loss": probes.mean_loss(store.module, objective, train_module.dims, mine),
    }
    after = full_parameters(train_module)
    assert trained == set(train_module.optimizer.parameters)
    assert all(store.parameter(name).grad is None for name in store.names)
    assert all(torch.equal(before[name], after[name]) for name in before)
    of_a_block = len(store.block_parameters(0))
    return {"found": found, "parameters": before, "most_gradients": most_gradients, "of_a_block": of_a_block}


def joined(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Two micro-batches as the rows of one, padded at the right."""
    width = max(micro["input_ids"].shape[1] for micro in batch)
    rows = {"input_ids": 5, "labels": -100, "position_ids": 0}
    return {
        key: torch.cat(
            [nn.functional.pad(micro[key], (0, width - micro[key].shape[1]), value=value) for micro in batch]
        )
        for key, value in rows.items()
    }


def plain_probes(config: Config, parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same numbers from a plain model with the same weights (adapters merged), by the formulas."""
    model: Any = plain_model(config).eval()
    base = {name: value for name, value in parameters.items() if ".lora_" not in name}
    model.load_state_dict({name.replace(".base_layer", ""): value for name, value in base.items()}, strict=False)
    blocks = list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)
    batches = global_batches()
    layers = [[m for m in block.modules() if isinstance(m, nn.Linear | Conv1D)] for block in blocks]

    norms = []
    for batch in batches:
        loss = mean_loss(model, batch)
        gradients = [torch.autograd.grad(loss, list(block.parameters()), retain_graph=True) for block in blocks]
        norms.append(
            [math.sqrt(sum(float(g.square().sum()) for g in gs) / sum(g.numel() for g in gs)) for gs in gradients]
        )

    inputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for block in layers for layer in block}
    hooks = [layer.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0].detach()[0])) for layer in inputs]
    routed: dict[nn.Module, list[Any]] = {m: [] for m in model.modules() if type(m).__name__.endswith("Experts")}
    hooks += [m.register_forward_pre_hook(lambda m, args: routed[m].append(args[:2])) for m in routed]
    routers: dict[nn.Module, list[torch.Tensor]] = {m: [] for m in model.modules() if "Router" in type(m).__name__}
    hooks += [m.register_forward_pre_hook(lambda m, args: routers[m].append(args[0].detach())) for m in routers]
    for micro in (micro for batch in batches for micro in batch):
        last = int((micro["labels"][0] != -100).nonzero().max()) + 1
        model(input_ids=micro["input_ids"][:, :last], position_ids=micro["position_ids"][:, :last])
    for hook in hooks:
        hook.remove()
    shares = []
    for block, whole in zip(layers, blocks):
        entries = [entry for module in whole.modules() if module in routed for entry in experts(module, routed[module])]
        for router in (module for module in whole.modules() if module in routers):
            given = torch.cat(routers[router]).flatten(0, -2)
            entries.append((router.weight.detach().abs() * given.norm(dim=0)).flatten())
        for layer in block:
            scale = torch.cat(inputs[layer]).norm(dim=0)
            weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T
            entries.append((weight.abs() * scale).flatten())
        entry = torch.cat(entries)
        shares.append(float((entry > THRESHOLD * entry.mean()).float().mean()))
    return {
        "gradient_norms": [sum(column) / len(batches) for column in zip(*norms)],
        "weight_norms": [
            math.sqrt(sum(float(p.detach().square().sum()) for p in block.parameters())) for block in blocks
        ],
        "outliers": shares,
        "loss": float(mean_loss(model, [micro for batch in batches for micro in batch]).detach()),
        "suppression": [suppressed(model, blocks, chosen, batches) for chosen in SETS],
    }


def experts(module: Any, seen: list[Any]) -> list[torch.Tensor]:
    """||X_j|| |W_ij| of all matrices of fused experts, one token at a time."""
    weights = {name: getattr(module, name).detach() for name in ("gate_up_proj", "down_proj")}
    if module.is_transposed:  # [experts, inputs, outputs]
        weights = {name: weight.mT for name, weight in weights.items()}
    squares = {name: torch.zeros(weight.shape[0], weight.shape[2]) for name, weight in weights.items()}
    for hidden, index in seen:
        for token, chosen in zip(hidden.detach(), index.tolist()):
            for expert in chosen:
                both = weights["gate_up_proj"][expert] @ token
                if module.has_bias:
                    both = both + module.gate_up_proj_bias[expert].detach()
                squares["gate_up_proj"][expert] += token**2
                squares["down_proj"][expert] += module._apply_gate(both) ** 2
    return [(weights[name].abs() * squares[name].sqrt()[:, None]).flatten() for name in squares]


def suppressed(model: nn.Module, blocks: list[nn.Module], chosen: list[int], batches: Any) -> float:
    """The loss where the chosen blocks add only a quarter of what they add."""

    def quarter(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return args[0] + FACTOR * (output - args[0])

    hooks = [blocks[index].register_forward_hook(quarter) for index in chosen]
    loss = float(mean_loss(model, [micro for batch in batches for micro in batch]).detach())
    for hook in hooks:
        hook.remove()
    return loss


@pytest.mark.parametrize(
    ("world_size", "replicate", "family"),
    [(1, 1, None), (2, 1, None), (2, 2, None), (2, 1, "gpt2"), (2, 1, "mixtral"), (2, 2, "gpt_oss")],
)
def test_probes_equal_plain_computation(world_size: int, replicate: int, family: str | None) -> None:
    config = make_probed("full_rank", replicate, family)
    results = run_on_ranks(world_size, probe_on_rank, config)
    expected = plain_probes(config, results[0]["parameters"])
    for result in results:
        for probe, values in expected.items():
            assert result["found"][probe] == pytest.approx(values, rel=2e-4), probe
        assert result["found"] == results[0]["found"], "every rank must have the same numbers"
        # Replicas sum in one order, whatever the order of arrival: a block's gradients may wait for each other.
        assert result["most_gradients"] <= (result["of_a_block"] if replicate > 1 else 1), "outlived its norm"
    assert len(set(expected["outliers"])) == BLOCKS and min(expected["outliers"]) > 0


def test_with_adapters_gradients_and_suppression_are_those_of_the_adapters() -> None:
    config = make_probed("lora")
    results = run_on_ranks(2, probe_on_rank, config)
    parameters, found = results[0]["parameters"], results[0]["found"]
    scaling = config.update.alpha / config.update.preset_rank

    def merged(factors: list[float]) -> dict[str, torch.Tensor]:
        """The weights where the adapters of block i count by the i-th factor."""
        weights = {
            name: value for name, value in parameters.items() if ".base_layer." not in name and ".lora_" not in name
        }
        for name in (name for name in parameters if ".base_layer.weight" in name):
            a, b = (parameters[name.replace("base_layer", f"lora_{kind}.default")] for kind in "AB")
            factor = factors[int(name.split(".")[2])]
            weights[name.replace(".base_layer", "")] = parameters[name] + factor * scaling * b @ a
        return weights

    factors = [[FACTOR if block in chosen else 1.0 for block in range(BLOCKS)] for chosen in SETS]
    assert found["loss"] == pytest.approx(plain_loss(config, merged([1.0] * BLOCKS)), rel=1e-4)
    assert found["suppression"] == pytest.approx([plain_loss(config, merged(one)) for one in factors], rel=1e-4)
    assert len({*found["suppression"], found["loss"]}) == 3
    assert all(norm > 0 for norm in found["gradient_norms"])


def plain_loss(config: Config, weights: dict[str, torch.Tensor]) -> float:
    model: Any = plain_model(config).eval()
    model.load_state_dict(weights, strict=False)
    return float(mean_loss(model, [micro for batch in global_batches() for micro in batch]).detach())


def draw_with_data(config: Config) -> tuple[list[float] | None, list[int], str]:
    """A first draw with calibration data, and the complaint without any. Runs on every rank."""
    train_module = build_and_load(config)
    complaint = ""
    period = 0 if config.sampler.name != "importance" else 1
    try:
        begin_period(train_module, period)
    except UserError as error:
        complaint = str(error)
    begin_period(train_module, period, lambda count: [step[distributed.rank()] for step in make_global_batches(count)])
    return train_module.sampler.scores(), train_module.active.blocks, complaint


def test_every_kind_of_request_has_its_probe() -> None:
    assert probes.PROBES.keys() == PROBE_KINDS.keys()
    asked = {config().probe.kind for config in SAMPLER_CONFIGS.values() if config().probe is not None}
    assert asked | {"weight_norms"} == PROBE_KINDS.keys()


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [("gradient", {}), ("outlier", {"threshold": THRESHOLD}), ("importance", {"suppressed_sets": 2})],
)
def test_samplers_get_what_they_need_or_say_so(sampler: str, settings: dict[str, Any]) -> None:
    config = make_probed("full_rank")
    config.sampler = dataclasses.replace(SAMPLER_CONFIGS[sampler](), active_layers=1, period=2, **settings)
    first, second = run_on_ranks(2, draw_with_data, config)
    scores, blocks, complaint = first
    assert scores is not None and len(set(scores)) > 1, "the probe told the sampler nothing"
    assert second[1] == blocks and len(blocks) == 1
    assert complaint == f"sampler={sampler}: needs calibration data, and there is none"
