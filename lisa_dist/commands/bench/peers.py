"""What a user would take instead, measured beside the trainer: transformers' ``Trainer``, bare, with PEFT, with LISA.

A peer has the same model, weights to start from, micro-batches, kernel of attention, clipping and learning rate, and
computes in the same dtype (the Trainer's ``bf16=True``). It runs its own loop, ``Trainer.train``, and is measured from
one ``on_step_end`` to the next. Where Liger's package is installed and there is a GPU, it has Liger's kernels.
On several ranks the Trainer keeps the whole model on each (DDP).
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from lisa_dist.commands.bench.steps import HORIZON, StepClock
from lisa_dist.commands.bench.targets import fill_weights, uncounted
from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_package
from lisa_dist.config.loading import vary
from lisa_dist.config.updates import LoraUpdateConfig
from lisa_dist.data.batches import GlobalBatches, MicroBatch
from lisa_dist.method.updates.lora import adapter_config
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.inspection import pretrained_architecture
from lisa_dist.models.kernels import has_liger
from lisa_dist.models.layer_map import LayerMap, find_layers
from lisa_dist.runtime import distributed
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.sharding.rounding import dtype_of

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # the variables by which accelerate knows of other ranks


def peer_full(config: Config, batches: GlobalBatches) -> PeerTarget:
    """The Trainer alone: every parameter trains, and is stored in ``precision.active``."""
    check_peer("peer_full", config, "accelerate")
    model = plain_model(config, config.precision.active)
    return PeerTarget(config, batches, model)


def peer_lora(config: Config, batches: GlobalBatches) -> PeerTarget:
    """The Trainer with PEFT's adapters, in fp32, beside the base in ``precision.frozen``."""
    check_peer("peer_lora", config, "accelerate", "peft")
    from peft import get_peft_model  # takes seconds to import

    adapters = config.update.adapters or vary(config, ["method=lora"]).update.adapters
    assert isinstance(adapters, LoraUpdateConfig)
    model = plain_model(config, config.precision.frozen)
    described = adapter_config(adapters, find_layers(model, config.model.blocks))
    return PeerTarget(config, batches, get_peft_model(model, described))


def peer_lisa(config: Config, batches: GlobalBatches) -> PeerTarget:
    """The Trainer with a callback that toggles blocks, as LISA is mostly shared: all is stored in ``precision.frozen``.

    So there are no fp32 masters, Adam's moments are in that dtype too, and those of a block that is frozen again stay.
    """
    check_peer("peer_lisa", config, "accelerate")
    if distributed.world_size() > 1:
        raise UserError(
            "bench.compare=peer_lisa: DDP settles which parameters train when it is built, so that a callback can't "
            "toggle them; measure it with parallel.nproc_per_node=1"
        )
    lisa = config if config.method == "lisa" else vary(config, ["method=lisa"])
    model = plain_model(config, config.precision.frozen)
    layers = find_layers(model, config.model.blocks)
    toggling = TogglingCallback(layers, lisa.sampler.active_layers or 0, config.train.seed)
    return PeerTarget(config, batches, model, toggling)


PEERS: dict[str, Callable[[Config, GlobalBatches], PeerTarget]] = {
    "peer_full": peer_full,
    "peer_lora": peer_lora,
    "peer_lisa": peer_lisa,
}


def check_peer(name: str, config: Config, *packages: str) -> None:
    """Refuse a peer whose packages are missing, or that can't do what the configuration asks of all that is compared.

    Raises:
        UserError: which package, or which key.
    """
    for package in packages:
        check_package(package, f"bench.compare={name}")
    for key, value, allowed in (
        ("optimizer.name", config.optimizer.name, ["adamw"]),
        ("model.quantization", config.model.quantization, ["none"]),
        ("parallel.offload", config.parallel.offload, ["none"]),
        ("parallel.activation_checkpointing", config.parallel.activation_checkpointing, ["none", "full"]),
    ):
        if value not in allowed:
            raise UserError(
                f"bench.compare={name}: is no comparison with {key}={value}, which transformers' Trainer does not "
                f"have; choose {key}={' or '.join(allowed)}"
            )


def plain_model(config: Config, stored: str) -> PreTrainedModel:
    """Return transformers' own model with the weights to start from, stored in one dtype. Collective: every rank."""
    architecture = pretrained_architecture(config.model, config.precision.frozen)
    architecture.use_cache = False
    model: Any = build_meta_model(config.model, architecture)
    model.to(dtype_of(stored))
    fill_weights(model, config.model, config.train.seed)
    if config.parallel.activation_checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def uses_liger() -> bool:
    """Whether the peers run with Liger's kernels: they do where they can."""
    return torch.cuda.is_available() and has_liger()


class PeerTarget:
    """A model in transformers' ``Trainer``, which makes some steps whenever it is asked to."""

    def __init__(
        self, config: Config, batches: GlobalBatches, model: nn.Module, toggling: TogglingCallback | None = None
    ) -> None:
        self.model = model
        self.kernels = "liger" if uses_liger() else "eager"
        self.toggling = toggling
        self.measuring = _Measuring()
        self.directory = tempfile.TemporaryDirectory(prefix="lisa-dist-bench-")
        ranks = ParallelDims.of(config.parallel).data_ranks
        optimizer = config.optimizer
        with _launched_as_accelerate_expects():
            arguments = transformers.TrainingArguments(
                output_dir=self.directory.name,
                max_steps=HORIZON,  # each call of train has a number of its own
                per_device_train_batch_size=config.train.micro_batch_size,
                gradient_accumulation_steps=config.train.global_batch_size // (config.train.micro_batch_size * ranks),
                bf16=config.precision.compute == "bfloat16",
                use_cpu=distributed.device().type == "cpu",
                optim="adamw_torch_fused",
                learning_rate=optimizer.lr,
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                weight_decay=optimizer.weight_decay,
                max_grad_norm=optimizer.grad_clip,
                lr_scheduler_type="constant",
                use_liger_kernel=uses_liger(),
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=config.train.seed,
            )
            arguments._n_gpu = min(arguments.n_gpu, 1)  # one rank has one GPU, however many are visible
            callbacks = [self.measuring, *([toggling] if toggling else [])]
            self.trainer = transformers.Trainer(model=model, args=arguments, callbacks=callbacks)
        distributed.set_threads(config.parallel)  # accelerate chooses the threads of a CPU rank by itself
        self.trainer.remove_callback(transformers.trainer_callback.PrinterCallback)

    def dry_run_batch(self, micro_batch: MicroBatch) -> None:
        """Make a step of nothing but copies of the micro-batch."""
        self._train(1, lambda: [micro_batch])

    def switch(self, blocks: list[int] | None = None) -> None:
        """Have the callback, which draws by itself, draw blocks at the beginning of the next step."""
        if self.toggling is not None:
            self.toggling.is_due = True

    def make_steps(self, clock: StepClock, count: int) -> None:
        """Call ``Trainer.train`` for so many steps; what it does before the first of them is not measured."""
        self.measuring.clock = clock
        self._train(count, clock.next_batches)
        self.measuring.clock = None

    def _train(self, steps: int, source: Callable[[], list[MicroBatch]]) -> None:
        self.trainer.args.max_steps = steps
        self.trainer.get_train_dataloader = lambda: _Batches(source)
        with _launched_as_accelerate_expects(), _unchanged_elsewhere(self.model):
            self.trainer.train()


class _Measuring(TrainerCallback):
    """The clock at the Trainer's steps, where they are measured."""

    clock: StepClock | None = None

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        if self.clock is not None:
            self.clock.start()

    def on_step_end(self, *given: Any, **more: Any) -> None:
        if self.clock is not None:
            self.clock.stop(uncounted)
            self.clock.start()


class _Batches:
    """What the Trainer takes for its data loader: micro-batches without end, and so without a length."""

    def __init__(self, source: Callable[[], list[MicroBatch]]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from map(dict, self.source())


class TogglingCallback(TrainerCallback):
    """LISA as it is mostly shared: freeze every block, thaw a few at random; embeddings, norm and head always train.

    https://github.com/OptimalScale/LMFlow/blob/main/src/lmflow/pipeline/utils/lisa_trainer.py is one of many.
    """

    def __init__(self, layers: LayerMap, active_layers: int, seed: int) -> None:
        self.layers = layers
        self.active_layers = active_layers
        self.random = random.Random(seed)
        self.is_due = True

    def on_step_begin(self, *given: Any, **more: Any) -> None:
        if not self.is_due:
            return
        self.is_due = False
        chosen = self.random.sample(range(len(self.layers.blocks)), self.active_layers)
        for index, block in enumerate(self.layers.blocks):
            block.requires_grad_(index in chosen)


@contextmanager
def _unchanged_elsewhere(model: nn.Module) -> Iterator[None]:
    """Put back what Liger changes, anew for each training, in transformers' modules: other targets use them too."""
    kinds = {type(module).__module__ for module in model.modules()}
    before = {name: dict(vars(sys.modules[name])) for name in kinds if name.startswith("transformers.models.")}
    try:
        yield
    finally:
        for name, contents in before.items():
            vars(sys.modules[name]).update(contents)


@contextmanager
def _launched_as_accelerate_expects() -> Iterator[None]:
    """Let accelerate see as many ranks as there are: it would wrap the model of a single launched one in DDP too."""
    before = dict(os.environ)
    warnings = logging.getLogger("transformers.training_args")  # of a process group that is not used
    warnings.setLevel(logging.ERROR)
    for name in LAUNCHED:
        os.environ.pop(name, None)
    if distributed.world_size() > 1:
        found = (distributed.rank(), distributed.world_size(), distributed.local_rank())
        os.environ.update(zip(LAUNCHED, map(str, found)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        warnings.setLevel(logging.NOTSET)
