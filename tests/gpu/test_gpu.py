"""What only a GPU can show: the same numbers, the memory law and the plan's peak by the GPU's own count."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lisa_dist.commands import self_test
from lisa_dist.commands.bench import command as bench
from lisa_dist.config import Config, DataConfig, ModelConfig, ParallelConfig
from lisa_dist.config.loading import load
from lisa_dist.method.module import (
    begin_period,
    build_train_module,
    count_persistent_bytes,
    load_initial_weights,
    separate_packed_samples,
)
from lisa_dist.method.optim.adamw import FusedAdamW, zero_state
from lisa_dist.method.optim.schedule import learning_rates
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.objectives.chunked_cross_entropy import ChunkedCrossEntropy, LogitTransform, add_product, sums_in_place
from lisa_dist.runtime import distributed
from lisa_dist.runtime.environment import ALLOCATOR_SETTINGS
from lisa_dist.training.step import accumulate_gradients, step_clipped, train_step
from tests.support.answers import answerer_of, greedy, prompts
from tests.support.families import tiny_config
from tests.support.left_out import leave_out
from tests.support.small_training import (
    PERIOD,
    STEPS,
    build_and_load,
    full_parameters,
    make_config,
    make_global_batches,
    reduction_dtypes,
    train_reference,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]

MIXED = {"frozen": "bfloat16", "compute": "bfloat16"}
MIDDLING = [
    "model=custom",
    "model.kernels=eager",
    "model.architecture={model_type:llama,vocab_size:32000,hidden_size:1024,intermediate_size:2816,"
    "num_hidden_layers:12,num_attention_heads:16,num_key_value_heads:16}",
    "model.init=random",
    "data=custom",
    "data.sequence_length=1024",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "parallel.nproc_per_node=1",
]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """This process as the only rank, on its GPU."""
    distributed.initialize(ParallelConfig())
    yield
    torch.distributed.destroy_process_group()


def train_here(config: Config) -> dict[str, Any]:
    """Three periods on the GPU: first and last parameters on the CPU, losses, draws, dtypes of the reductions."""
    train_module = build_and_load(config, distributed.device())
    initial = {name: tensor.cpu() for name, tensor in full_parameters(train_module).items()}
    losses, draws, dtypes = [], [], []
    for step, micro_batches in enumerate(make_global_batches()):
        if step % PERIOD == 0:
            begin_period(train_module, step // PERIOD)
            draws.append(list(train_module.active.blocks))
            dtypes.append(reduction_dtypes(train_module))
        losses.append(train_step(train_module, micro_batches, step, STEPS).loss)
    final = {name: tensor.cpu() for name, tensor in full_parameters(train_module).items()}
    return {"initial": initial, "final": final, "losses": losses, "draws": draws, "dtypes": dtypes}


def test_three_periods_equal_plain_pytorch() -> None:
    config = make_config()
    found = train_here(config)
    reference, losses = train_reference(config, found["initial"], found["draws"])
    assert found["losses"] == pytest.approx(losses, rel=1e-4)
    for name, parameter in found["final"].items():
        error = (parameter - reference[name]).norm() / reference[name].norm()
        assert error < 1e-4, f"{name}: relative error {error}"


def test_bf16_follows_fp32_and_reduces_in_fp32() -> None:
    plain = train_here(make_config())
    mixed = train_here(make_config(precision=MIXED))
    assert mixed["losses"] == pytest.approx(plain["losses"], rel=0.01)
    assert all(dtypes == {torch.float32} for dtypes in mixed["dtypes"])


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_blocks_that_come_from_host_memory_train_as_those_that_stay(prefetch: int) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # its gradients are the same each time
        stay, come = (
            train_here(make_config(precision=MIXED, parallel={"offload": offload, "prefetch": prefetch}))
            for offload in ("none", "frozen")
        )
    assert come["losses"] == stay["losses"]
    assert all(torch.equal(parameter, stay["final"][name]) for name, parameter in come["final"].items())


def test_persistent_bytes_obey_the_law_and_the_allocator_holds_little_more() -> None:
    before = torch.cuda.memory_allocated()
    train_module = build_and_load(load(MIDDLING), distributed.device())
    ids = torch.randint(0, 32000, (1, 64))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(64)[None]}
    for period in range(3):
        begin_period(train_module, period)
        accumulate_gradients(train_module, [batch])
        trained = sum(parameter.numel() for parameter in train_module.optimizer.parameters.values())
        frozen = sum(train_module.store.parameter(name).numel() for name in train_module.store.names) - trained
        counted = sum(count_persistent_bytes(train_module).values())
        assert counted == 2 * frozen + 18 * trained - 2 * 32000 * 1024  # embeddings have no copy
        held = torch.cuda.memory_allocated() - before
        assert held < 1.05 * counted, f"period {period}: {held} bytes are held, {counted} are accounted for"
        train_module.optimizer.drop_gradients()


def test_the_host_waits_for_the_gpu_nowhere_in_a_step() -> None:
    train_module = build_and_load(load(MIDDLING), distributed.device())
    begin_period(train_module, 0)
    ids = torch.randint(0, 32000, (2, 64))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(64).expand(2, 64).contiguous()}
    batches = [{name: tensor.pin_memory() for name, tensor in batch.items()}] * 2
    train_step(train_module, batches, 0, 2)  # a first one allocates, and tries what its kernels can do
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = train_step(train_module, batches, 1, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < result.loss < 20 and result.grad_norm > 0


def test_a_step_that_is_not_finite_changes_nothing_on_a_gpu() -> None:
    leave_out("resident", "optimizer=adamw")


def test_the_peak_is_the_planned_one() -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        bench.run(load([*MIDDLING, "bench.format=json", "bench.steps=2", "bench.rounds=1"]))
    measured = json.loads(output.getvalue())
    command = [sys.executable, "-m", "lisa_dist", "plan", *MIDDLING, "plan.format=json"]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert planned["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.05)
    assert measured["utilisation"] is None or 0 < measured["utilisation"] < 1


def test_segments_grow_and_a_run_that_fits_asks_for_nothing_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lisa_dist", "train", "train.max_steps=5", "sampler.period=2"]
    unset = {key: value for key, value in os.environ.items() if key not in ALLOCATOR_SETTINGS}
    subprocess.run([*command, "parallel.nproc_per_node=1", f"run.dir={tmp_path}/run"], env=unset, check=True)
    rows = [json.loads(line) for line in Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()]
    assert [row["allocator_retries"] for row in rows if "loss" in row] == [0] * 5
    assert json.loads(Path(tmp_path, "run", "summary.json").read_text())["allocator_retries"] == 0
    code = (
        "from lisa_dist.runtime.environment import expand_segments; expand_segments(); import torch; "
        "x = torch.ones(9, device='cuda'); print(torch.cuda.memory_snapshot()[0]['is_expandable'])"
    )
    found = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_a_checkpoint_holds_what_was_written(tmp_path: Path) -> None:
    self_test.check_reduction()
    self_test.check_training(load([f"run.dir={tmp_path}"]), tmp_path)


def first_gradients(kernels: str) -> tuple[float, torch.Tensor]:
    """Loss and gradient, in one vector, of the first global batch in bfloat16."""
    train_module = build_train_module(make_config(model={"kernels": kernels}, precision=MIXED))
    assert train_module.kernels == kernels
    load_initial_weights(train_module, distributed.device())
    begin_period(train_module, 0)
    loss, divisor = accumulate_gradients(train_module, make_global_batches(1)[0])
    gradients = [gradient.flatten().float() for gradient in train_module.optimizer.gradients().values()]
    return loss.item() / divisor, torch.cat(gradients)


@pytest.mark.parametrize("kernels", ["liger", "compile"])
def test_kernels_give_the_loss_and_gradient_of_eager_ones(kernels: str) -> None:
    if kernels == "liger":
        pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    expected, found = first_gradients("eager"), first_gradients(kernels)
    assert found[0] == pytest.approx(expected[0], rel=0.005)
    assert torch.nn.functional.cosine_similarity(found[1], expected[1], dim=0) > 0.999


@pytest.mark.parametrize(("casting", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_a_kernel_norms_a_residual_stream_as_torch_does(casting: str, offset: float) -> None:
    """In bfloat16 nearer to what float64 gives than twice as far as torch's own operators."""
    from lisa_dist.models.norm_kernel import AddNorm

    def plain(branch: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + branch
        wide = total.double() if total.dtype == torch.float64 else total.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        if casting == "llama":
            return total, (weight + offset) * unit.to(total.dtype)
        return total, ((weight.to(wide.dtype) + offset) * unit).to(total.dtype)

    torch.manual_seed(0)
    sizes = (3, 37, 1536), (3, 37, 1536), (1536,)
    values = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    incoming = [torch.randn(sizes[0], device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    results = []
    for dtype in (torch.float64, torch.bfloat16, None):
        inputs = [value.detach().clone().to(dtype or value.dtype).requires_grad_() for value in values]
        through = [inputs[0] * 1, inputs[1] * 1, inputs[2]]
        outputs = plain(*through) if dtype else AddNorm.apply(*through, 1e-6, offset, casting)
        torch.autograd.backward(outputs, [gradient.clone().to(outputs[0].dtype) for gradient in incoming])
        results.append([tensor.double() for tensor in (*outputs, *(one.grad for one in inputs))])
    for exact, rounded, found in zip(*results, strict=True):
        assert (found - exact).norm() <= 2 * (rounded - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_packed_samples_are_attended_to_by_their_borders(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel gives a tiny copy's packed samples the numbers that they get alone by sdpa."""
    model = build_meta_model(ModelConfig(), tiny_config(family, head_dim=16))
    config = Config(data=DataConfig(packing=True))
    caplog.set_level(logging.INFO, "lisa_dist")
    assert separate_packed_samples(config, model, find_layers(model)) == "borders", caplog.text
    assert model.config._attn_implementation == "varlen"


def test_products_are_added_to_the_gradient_of_a_head_in_float32_where_it_is() -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(1024, columns, device="cuda", dtype=torch.bfloat16) for columns in (4096, 512))
    assert sums_in_place(left.device, left.dtype)
    total = torch.zeros(4096, 512, device="cuda")
    add_product(total, left, right)  # a first one makes room for the library's own work
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_product(total, left, right)
    assert torch.cuda.max_memory_allocated() - before < total.nbytes // 4
    expected = 2 * (left.double().T @ right.double())
    assert (total.double() - expected).norm() < 1e-5 * expected.norm()


def test_adamw_steps_by_a_kernel_as_torchs_own() -> None:
    ended = []
    for kind in (torch.optim.AdamW, FusedAdamW):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(1000, 1001, device="cuda"))
        optimizer = kind([parameter], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        optimizer.state[parameter] = zero_state(optimizer, parameter)
        for step in range(4):
            parameter.grad = torch.randn_like(parameter)
            optimizer.grad_scale = torch.full((), 7.0, device="cuda")
            optimizer.found_inf = torch.full((), float(step == 2), device="cuda")
            optimizer.step()
        ended.append([parameter.detach(), *optimizer.state[parameter].values()])
    for plain, kernel in zip(*ended, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=2e-6)


def test_the_step_itself_writes_what_the_model_computes_with() -> None:
    train_module = build_and_load(make_config(precision=MIXED), distributed.device())
    begin_period(train_module, 0)
    store, optimizer = train_module.store, train_module.optimizer
    copied = {
        name: store.parameter(name) for name in optimizer.parameters if store.master(name) is not store.parameter(name)
    }
    before = {name: parameter.detach().clone() for name, parameter in copied.items()}
    left: list[str] = []
    optimizer.after_step = left.extend
    train_step(train_module, make_global_batches(1)[0], 0, STEPS)
    assert len(copied) > 10 and not set(left) & set(copied)
    for name, parameter in copied.items():
        assert torch.equal(parameter, store.master(name).to(parameter.dtype)) and not torch.equal(
            parameter, before[name]
        )


@pytest.mark.alone
def test_norm_and_step_of_1_5_billion_parameters_take_18_ms() -> None:
    if "H100" not in torch.cuda.get_device_name():
        pytest.skip("the time is one of an H100")
    config = load([*MIDDLING, "method=full", "optimizer.decay_norms_and_biases=true"])
    train_module = build_and_load(config, distributed.device())
    begin_period(train_module, 0)
    trained = sum(parameter.numel() for parameter in train_module.optimizer.parameters.values())
    zero, rates = torch.zeros((), device="cuda"), learning_rates(config.scheduler, config.optimizer, 0, 2)

    def step() -> None:
        for parameter in train_module.optimizer.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.ones_like(parameter)
        step_clipped(train_module, rates, zero, 1.0, {})

    step()
    gradients = [torch.ones_like(parameter) for parameter in train_module.optimizer.parameters.values()]
    made = milliseconds(step) - milliseconds(lambda: [torch.ones_like(gradient) for gradient in gradients])
    assert made * 1.5e9 / trained < 18


def milliseconds(function: Callable[[], object]) -> float:
    """The median of five calls, by the GPU's clock."""
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, cap=20.0)])
def test_a_kernel_gives_loss_and_gradients_of_the_head(transform: LogitTransform) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 5000, (300,), device="cuda")
    targets[::3] = -100
    found = []
    for in_place in (False, True):
        given = hidden.clone().requires_grad_()
        weight = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 5000 * 64, device="cuda").view(5000, 64).bfloat16())
        weight.grad_dtype = torch.float32
        loss = ChunkedCrossEntropy.apply(given, weight, None, targets, transform, 128, in_place, True)
        (loss * 0.5).backward()
        found.append((loss.detach(), given.grad, weight.grad))
    for plain, kernel in zip(*found, strict=True):
        assert (plain.double() - kernel.double()).norm() < 0.01 * plain.double().norm()
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-4)


@pytest.mark.alone
@pytest.mark.parametrize("in_place", [False, True])
def test_loss_and_head_take_less_than_15_ms_beside_their_products(in_place: bool) -> None:
    if "H100" not in torch.cuda.get_device_name():
        pytest.skip("the time is one of an H100")
    tokens, words, chunk = 8192, 128_256, ModelConfig().chunk_tokens(in_place)
    hidden = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(0.02 * torch.randn(words, 4096, device="cuda", dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    targets = torch.randint(0, words, (tokens,), device="cuda")

    def whole() -> None:
        ChunkedCrossEntropy.apply(hidden, weight, None, targets, LogitTransform(), chunk, in_place, True).backward()
        hidden.grad = weight.grad = None

    total = torch.zeros(words, 4096, device="cuda")

    def products() -> None:
        for part in hidden.detach().split(chunk):
            logits = part @ weight.detach().T
            _ = logits @ weight.detach()
            add_product(total, logits, part)

    assert milliseconds(whole) - milliseconds(products) < 15


def test_random_weights_are_made_on_the_gpu_by_the_seed_alone() -> None:
    states = []
    for seed in (1, 1, 2):
        train_module = build_train_module(load([*MIDDLING, f"train.seed={seed}"]))
        torch.cuda.synchronize()
        before = torch.cuda.get_rng_state()
        started = time.perf_counter()
        load_initial_weights(train_module, distributed.device())
        torch.cuda.synchronize()
        assert time.perf_counter() - started < 5, "220 million weights: a CPU core takes longer"
        assert torch.equal(torch.cuda.get_rng_state(), before), "the global generator moved"
        states.append(full_parameters(train_module))
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    assert states[0][name].std().item() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("offload", ["none", "frozen"])
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gpt2"])
def test_answers_with_the_cache_are_those_of_the_whole_text_run_again(family: str, offload: str) -> None:
    answerer = answerer_of(family, parallel={"offload": offload})
    assert answerer.cache_use == "batched"
    cached = answerer.answers(prompts(), greedy())
    answerer.cache_use = "none"
    assert cached == answerer.answers(prompts(), greedy())
