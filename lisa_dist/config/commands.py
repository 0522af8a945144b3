"""Keys of the commands beyond training: export, evaluate, generate, plan, bench, report, runs, sweep and launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lisa_dist.config.errors import UserError, check_choices, check_minimums


@dataclass
class ExportConfig:
    path: str | None = None  # the Hugging Face directory to write
    adapter: bool = False  # of LoRA updates: write the adapters alone, as a PEFT directory, instead of merging them
    dtype: str | None = None  # null: that of the model's own weights
    max_shard_size: str = "5GB"  # of a file of weights
    step: int | None = None  # which checkpoint; null: the newest

    def __post_init__(self) -> None:
        check_choices("export", self, dtype=["float32", "bfloat16", "float16"])


@dataclass
class EvaluateConfig:
    path: str | None = None  # a Hugging Face directory; null: the checkpoint of run.dir
    step: int | None = None  # which checkpoint of run.dir; null: the newest
    data: str | None = None  # a file, a glob, a directory or a hub id; null: the validation data of the run
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, by name or pattern (mmlu_*)
    task_dir: str | None = None  # a folder with further tasks of lm-evaluation-harness (YAML)
    limit: int | None = None  # rows, or samples a task
    batch_size: int = 8  # answers to a task that a rank generates together
    output: str | None = None  # null: evaluation.json in run.dir, without a run in the current directory

    def __post_init__(self) -> None:
        check_minimums("evaluate", self, limit=1, batch_size=1)


@dataclass
class GenerateConfig:
    path: str | None = None  # a Hugging Face directory; null: the checkpoint of run.dir
    step: int | None = None  # which checkpoint of run.dir; null: the newest
    prompts: Any = field(default_factory=list)  # a list; or a file: one prompt a line, or JSON lines (*.jsonl)
    max_new_tokens: int = 128  # of an answer
    temperature: float = 0.0  # 0: greedy
    batch_size: int = 8  # prompts that a rank answers together
    system: str | None = None  # a system prompt before each prompt or conversation; null: what the template says itself
    compare: list[str] = field(default_factory=list)  # run or Hugging Face directories: their answers side by side
    output: str | None = None  # a new file of JSON lines with prompt and answer; null: stdout, answers alone

    def __post_init__(self) -> None:
        check_minimums("generate", self, max_new_tokens=1, temperature=0, batch_size=1)
        if len(self.compare) == 1:
            raise UserError(f"generate.compare=[{self.compare[0]}]: must name at least two directories")


@dataclass
class PlanConfig:
    gpu: str = "a100_80gb"  # a preset of conf/gpu, or a YAML file of the same keys
    format: str = "table"  # table, json
    search: bool = False  # the largest micro-batch and the fastest setting that fits
    compare: list[str] = field(default_factory=list)  # methods side by side

    def __post_init__(self) -> None:
        check_choices("plan", self, format=["table", "json"])


@dataclass
class BenchConfig:
    steps: int = 20  # measured steps of a method, after warm-up
    warmup_steps: int = 3  # steps that are not measured, first of all
    rounds: int = 7  # the steps are made in so many rounds, each after a switch; compared methods take turns
    compare: list[str] = field(
        default_factory=list
    )  # in the same run: methods, fsdp_baseline (a plain FSDP2 loop), peer_full, peer_lora, peer_lisa (transformers)
    sweep: list[str] = field(default_factory=list)  # override lines measured one after the other
    profile: bool = False  # write a trace of one step into the run directory
    format: str = "table"  # table, json

    def __post_init__(self) -> None:
        check_choices("bench", self, format=["table", "json"])
        check_minimums("bench", self, steps=1, warmup_steps=1, rounds=1)


@dataclass
class ReportConfig:
    watch: bool = False  # write the page again and again while the run goes on (--watch)


@dataclass
class RunsConfig:
    dir: str = "runs"  # the folder below which run directories are looked for (lisa-dist runs FOLDER)
    format: str = "table"  # table, json

    def __post_init__(self) -> None:
        check_choices("runs", self, format=["table", "json"])


@dataclass
class SweepConfig:
    dir: str | None = None  # null: sweeps/<date and time>
    parallel: int = 1  # jobs side by side
    trials: int = 0  # jobs whose values Optuna chooses by the losses of earlier ones; 0: every combination

    def __post_init__(self) -> None:
        check_minimums("sweep", self, trials=0, parallel=1)


@dataclass
class LaunchConfig:
    setup: list[str] = field(default_factory=list)  # shell lines before the run
    nodes: int | None = None  # null: parallel.nodes
    tasks_per_node: int | None = None  # null: one a GPU; without GPUs parallel.nproc_per_node, or 1
    gpus_per_node: int = 0  # 0: CPU nodes
    time: str = "24:00:00"  # the limit of one start; the job goes on after it
    partition: str | None = None  # of Slurm; null: the default one
    account: str | None = None  # that Slurm books the job to; null: the default one
    options: list[str] = field(default_factory=list)  # further sbatch options, such as --mem=100G
    container: str | None = None  # a file *.sif runs in apptainer, another image through pyxis
    script: str | None = None  # where the job script is written; null: in the run directory
    dry_run: bool = False  # write and show, do not submit

    def __post_init__(self) -> None:
        check_minimums("launch", self, nodes=1, tasks_per_node=1, gpus_per_node=0)
