"""Every key, its type, its default and its checks, as dataclasses; one file a group.

Nothing here imports torch, so that a mistake in the configuration is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lisa_dist.config.commands import (
    BenchConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    LaunchConfig,
    PlanConfig,
    ReportConfig,
    RunsConfig,
    SweepConfig,
)
from lisa_dist.config.data import DataConfig
from lisa_dist.config.errors import EXIT_DONE as EXIT_DONE
from lisa_dist.config.errors import EXIT_FAILED as EXIT_FAILED
from lisa_dist.config.errors import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from lisa_dist.config.errors import EXIT_STOPPED as EXIT_STOPPED
from lisa_dist.config.errors import EXIT_USER_ERROR as EXIT_USER_ERROR
from lisa_dist.config.errors import OutOfMemoryError as OutOfMemoryError
from lisa_dist.config.errors import ResourceError as ResourceError
from lisa_dist.config.errors import StorageError as StorageError
from lisa_dist.config.errors import UserError as UserError
from lisa_dist.config.model import ModelConfig
from lisa_dist.config.optimization import AdamWConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from lisa_dist.config.placement import ParallelConfig, PrecisionConfig
from lisa_dist.config.running import CheckpointConfig, LoggerConfig, RunConfig
from lisa_dist.config.sampling import SamplerConfig
from lisa_dist.config.updates import AlwaysActiveConfig, UpdateConfig


@dataclass
class Config:
    """The whole configuration of a command; each part of the program receives only its own group."""

    method: str = "custom"  # the name of the pair sampler x update, for records
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    always_active: AlwaysActiveConfig = field(default_factory=AlwaysActiveConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    runs: RunsConfig = field(default_factory=RunsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
