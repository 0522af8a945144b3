"""The command line: what it prints, where it sends a command, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lisa_dist import __version__, cli
from lisa_dist.cli import main
from lisa_dist.commands import table, words
from lisa_dist.commands.table import COMMANDS
from lisa_dist.config import Config, OutOfMemoryError, UserError
from lisa_dist.config.loading import load, load_run, to_yaml

TARGETS = [
    *(f"lisa_dist.commands.{name}.run" for name in COMMANDS if name not in ("train", "bench", "launch")),
    "lisa_dist.commands.bench.command.run",
    "lisa_dist.training.loop.train",
    "lisa_dist.launching.local.launch_ranks",
    "lisa_dist.launching.slurm.run",
    "lisa_dist.launching.slurm.run_sweep",
    "lisa_dist.launching.sweeps.run.run_sweep",
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of what the commands import: each target's address and its arguments; each returns 7."""
    recorded: list[tuple[Any, ...]] = []

    def recorder(address: str) -> Any:
        def record(*arguments: Any) -> int:
            recorded.append((address, *arguments))
            return 7

        return record

    for address in TARGETS:
        monkeypatch.setattr(address, recorder(address))
    monkeypatch.setattr("lisa_dist.telemetry.logs.setup_logging", lambda: None)
    monkeypatch.setattr("lisa_dist.launching.rank_server.start_rank_server", lambda: None)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return recorded


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lisa-dist {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert main(["help"]) == 0 and capsys.readouterr().out == shown
    assert all(name in shown and command.summary in shown for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_its_words_and_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    words = {"generate": '[PLACE "PROMPT"] ', "chat": "[PLACE] ", "runs": "[FOLDER] ", "launch": "slurm [FILE.yaml] "}
    words |= dict.fromkeys(("train", "plan", "bench", "init"), "[FILE.yaml] ")
    assert shown.startswith(f"lisa-dist {name} {words.get(name, '')}[key=value ...]: {COMMANDS[name].summary}\n")
    assert main(["help", name]) == 0 and capsys.readouterr().out == shown
    for group in COMMANDS[name].keys:
        part = getattr(Config(), group)
        assert all(f"  {group}.{field.name}" in shown for field in dataclasses.fields(part))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_function_of_a_command_runs_what_it_imports(name: str, calls: list[tuple[Any, ...]]) -> None:
    more = {"launch": (["train.seed=1"], None), "init": ("my.yaml", ("train",))}
    given = (Config(), *more.get(name, ()))
    assert COMMANDS[name].function.__name__ == name and COMMANDS[name].function(*given) == 7
    elsewhere = {"train": "training.loop.train", "bench": "commands.bench.command.run", "launch": "launching.slurm.run"}
    assert calls == [(f"lisa_dist.{elsewhere.get(name, f'commands.{name}.run')}", *given)]


def test_nothing_else_is_taken_for_a_stdin_that_is_closed() -> None:
    code = "import os; from lisa_dist.cli import main; main(['--version']); print(os.readlink('/proc/self/fd/0'))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=lambda: os.close(0)
    )
    assert ran.stdout.splitlines()[-1] == os.devnull


def test_output_that_nobody_reads_any_more_ends_in_a_sentence() -> None:
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "lisa_dist", "--version"]
    ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    os.close(write)
    assert ran.returncode == 2 and ran.stderr.startswith("lisa-dist: nobody reads any more")
    assert len(ran.stderr.splitlines()) == 1


def test_a_broken_pipe_to_another_process_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_process(*arguments: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("lisa_dist.cli._run", lose_process)
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)
    with pytest.raises(BrokenPipeError):
        main(["train"])


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    """Importing torch, transformers and datasets takes seconds; a process of its own, for here they are imported."""
    code = (
        "import sys; from lisa_dist.cli import main; from lisa_dist.commands.table import COMMANDS\n"
        "calls = [['--help'], ['--version'], ['train', 'sampler.perod=3'], ['plan', '--cfg', 'job']]\n"
        "codes = [main(words) for words in [*calls, *([name, '--help'] for name in COMMANDS)]]\n"
        "slow = {'torch', 'transformers', 'datasets', 'numpy', 'rich', 'wandb'} & set(sys.modules)\n"
        "print(codes, sorted(slow), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    codes = [0, 0, 2, 0, *[0] * len(COMMANDS)]
    assert done.stderr.splitlines()[-1] == f"{codes} []"


@pytest.mark.parametrize("ended_by_rank_0", [True, False])
def test_another_rank_speaks_of_a_mistake_only_where_rank_0_does_not(
    ended_by_rank_0: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "stops_within", lambda seconds: ended_by_rank_0)
    monkeypatch.setattr(cli, "install_stop_handlers", lambda: None)
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "sampler.perod=3"]) == 2
    assert ("did you mean sampler.period?" in capsys.readouterr().err) != ended_by_rank_0


def test_cfg_job_prints_a_configuration_that_can_be_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["method=full", "train.seed=3", "model.path=/models/mine"]
    assert main(["train", "--cfg", "job", *overrides]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert load_run(str(tmp_path), []) == load([*overrides, f"run.dir={tmp_path}"])


def test_options_may_stand_among_the_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain: {seed: 9}\n")
    assert main(["train", "train.epochs=2", "--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "  seed: 9\n" in shown and "  epochs: 2.0\n" in shown


PROMPTS = ["x=3, y=[1,2]?", "data = 5", "-5 + 3 = ?", "--what is 'this'?", "{a: ${b}} \\ #", "null", "model=3"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_meant_letter_by_letter(prompt: str, calls: list[tuple[Any, ...]]) -> None:
    guard = ["--"] if prompt.startswith("model=") else []  # what begins like a key needs it
    assert main(["generate", "generate.max_new_tokens=3", "someone/model", *guard, prompt]) == 7
    (_, config, entry, _) = calls[0]
    assert entry == table.generate and config.generate.path == "someone/model"
    assert (config.generate.prompts, config.generate.max_new_tokens) == ([prompt], 3)


def test_generate_and_chat_take_the_directory_of_a_run(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run = tmp_path / "my run [1], (a=b)"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load(["train.seed=5", "precision.compute=float32"])))
    assert main(["generate", str(run), "Hello", "precision.compute=bfloat16"]) == 7
    assert main(["generate", f"run.dir={tmp_path / 'my run [1], (a=b)'}", "Hello"]) == 7
    assert main(["chat", str(run)]) == 7
    configs = [call[1] for call in calls]
    assert {config.run.dir for config in configs} == {str(run)} and {config.train.seed for config in configs} == {5}
    assert [config.precision.compute for config in configs] == ["bfloat16", "float32", "float32"]
    assert [config.generate.prompts for config in configs] == [["Hello"], ["Hello"], []]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "someone/model", "Hello"],
        ["chat", "generate.path=someone/model"],
        ["evaluate", "evaluate.path=someone/model", "evaluate.data=builtin:demo"],
    ],
    ids=["generate", "chat", "evaluate"],
)
def test_a_model_of_no_run_takes_nothing_from_the_demonstration(
    command: list[str], calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for has_gpu in (True, False):
        monkeypatch.setattr(words, "may_have_gpu", lambda has_gpu=has_gpu: has_gpu)
        assert main(command) == main([*command, "precision.compute=float32", "train.micro_batch_size=3"]) == 7
        assert main([*command, "precision.compute=bfloat16"]) == 7
    monkeypatch.setattr(words, "may_have_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(command) == 7
    configs = [call[1] for call in calls]
    dtypes = [config.precision.compute for config in configs]
    assert dtypes == ["bfloat16", "float32", "bfloat16", "float32", "float32", "bfloat16", "float32"]
    assert [config.train.micro_batch_size for config in configs] == [1, 3, 1, 1, 3, 1, 1]


def test_compare_asks_each_model_in_ranks_of_its_own(
    calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(config: Config, entry: Any, logs: Path) -> int:
        assert config.generate.output is not None
        rows = [{"prompt": prompt, "answer": f"by {config.generate.path}"} for prompt in config.generate.prompts]
        Path(config.generate.output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return 0

    monkeypatch.setattr("lisa_dist.launching.local.launch_ranks", answer)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    models = ["someone/model", str(tmp_path / "model")]
    assert main(["generate", "--compare", *models, "Which?"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("by") == 2 and "Which?" in shown and "by someone/model" in " ".join(shown.split())
    output, asked = tmp_path / "new" / "answers.jsonl", "Which\u2028one?"  # which str.splitlines would cut
    assert main(["generate", f"generate.compare=[{','.join(models)}]", asked, f"generate.output={output}"]) == 0
    expected = {"prompt": asked, "answers": {model: f"by {model}" for model in models}}
    assert [json.loads(line) for line in output.read_text().splitlines()] == [expected]


def test_a_command_that_saves_nothing_ends_at_the_first_interrupt(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lisa_dist.launching.local.launch_ranks", interrupted)
    assert main(["generate", "someone/model", "Hello"]) == 130
    assert capsys.readouterr().err == "lisa-dist: interrupted\n"


def test_train_starts_ranks_with_a_settled_run_directory(
    calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "run.name=first"]) == 7
    (address, config, entry) = calls[0]
    assert (address, entry) == ("lisa_dist.launching.local.launch_ranks", table.train)
    assert config.run.dir == str(tmp_path / "runs" / "first")
    assert config.optimizer == load([]).optimizer


def test_train_does_not_write_over_a_run(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert main(["train", f"run.dir={tmp_path}"]) == 2
    assert calls == []
    assert main(["train", f"run.dir={tmp_path}", "checkpoint.resume=auto"]) == 7


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}],
)
def test_a_rank_trains_in_its_own_process(
    calls: list[tuple[Any, ...]], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[str] = []
    monkeypatch.setattr(cli, "install_stop_handlers", lambda: signals.append("installed"))
    monkeypatch.setattr(cli, "ignore_stop_signals", lambda: signals.append("ignored"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "train.seed=4"]) == 7
    assert calls == [("lisa_dist.training.loop.train", load(["train.seed=4"]))]
    assert signals == ["installed", "ignored"]


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_mpirun_are_told_that_they_are_no_ranks(
    name: str, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "4")
    assert main(["train", "run.name=one"]) == 7
    assert calls[0][0] == "lisa_dist.launching.local.launch_ranks"
    assert f"{name}=4: processes of mpirun are no ranks here" in capsys.readouterr().err
    monkeypatch.setenv(name, "1")
    assert main(["train", "run.name=one"]) == 7 and capsys.readouterr().err == ""


def test_one_task_of_srun_is_no_rank(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert main(["train"]) == 7
    assert calls[0][0] == "lisa_dist.launching.local.launch_ranks"


def test_commands_on_a_run_get_its_configuration(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run = load(["train.seed=11", "method=full"])
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    (tmp_path / "checkpoints").mkdir()
    assert main(["export", f"run.dir={tmp_path}", "export.path=out"]) == 7
    address, config = calls[-1]
    assert address == "lisa_dist.commands.export.run"
    assert (config.train.seed, config.method, config.export.path) == (11, "full", "out")


@pytest.mark.parametrize("command", [["train"], ["launch", "slurm"]])
def test_a_run_that_goes_on_takes_its_own_settings(
    command: list[str], calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a run, quoted"
    overrides = [f"run.dir='{run_dir}'", "checkpoint.resume=auto"]
    assert main([*command, *overrides]) == 7
    assert calls[-1][1].model == load([]).model, "in an empty directory a run starts with the defaults"
    run_dir.mkdir()
    mine = ["model.path=builtin:demo", "model=custom", "data=demo"]
    (run_dir / "config.yaml").write_text(to_yaml(load([*mine, "train.seed=11", "method=full"])))
    assert main([*command, *overrides, "optimizer.lr=0.25"]) == 7
    config = calls[-1][1]
    assert (config.train.seed, config.model.name, config.method) == (11, "custom", "full")
    assert config.optimizer.lr == 0.25
    assert (config.run.dir, config.checkpoint.resume) == (str(run_dir), "auto")
    assert f"settings that are not given here are those of {run_dir}/config.yaml" in capsys.readouterr().err
    assert main([*command, f"run.dir='{run_dir}'"]) == 7
    assert calls[-1][1].train.seed == 0, "without checkpoint.resume=auto nothing goes on"


def test_plan_composes_and_runs_here(calls: list[tuple[Any, ...]]) -> None:
    assert main(["plan", "plan.format=json"]) == 7
    assert calls[-1] == ("lisa_dist.commands.plan.run", load(["plan.format=json"]))


def test_plan_of_a_run_takes_its_settings(
    calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load(["train.micro_batch_size=4", "method=full"])))
    assert main(["plan", f"run.dir={tmp_path}", "data.sequence_length=99"]) == 7
    config = calls[-1][1]
    assert (config.train.micro_batch_size, config.method, config.data.sequence_length) == (4, "full", 99)
    assert "settings that are not given here are those of" in capsys.readouterr().err
    assert main(["plan", f"run.dir={tmp_path}/none", "method=lisa"]) == 7
    assert calls[-1][1].method == "lisa", "where no run is, its directory is one more key"


def test_memory_that_runs_out_is_one_sentence_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*arguments: Any) -> int:
        raise OutOfMemoryError("out of memory in forward of step 3")

    monkeypatch.setattr("lisa_dist.commands.plan.run", run_out)
    monkeypatch.setenv("RANK", "1")
    assert main(["plan"]) == 1
    assert capsys.readouterr().err == "lisa-dist: rank 1 failed: out of memory in forward of step 3\n"


def test_a_key_that_the_command_does_not_read_is_told(
    calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["launch.nodes=2", "sweep.trials=3", "parallel.nodes=2", "sampler=all", "plan.search=true"]
    assert main(["plan", *given]) == 7
    assert capsys.readouterr().err.splitlines() == [
        "lisa-dist: launch.nodes=2: has no effect on plan, it is a key of launch",
        "lisa-dist: sweep.trials=3: has no effect on plan, it is a key of report, launch, train --multirun",
    ]
    file = tmp_path / "my.yaml"
    assert main(["init", str(file), "parallel.nodes=2", "bench.steps=9"]) == 7
    assert capsys.readouterr().err == "lisa-dist: bench.steps=9: has no effect on init, it is a key of bench\n"
    file.write_text("bench.steps: 9\nmodel: demo\ndata: demo\n")  # a file may hold keys of several commands
    assert main(["train", str(file), "parallel.nodes=2", f"run.dir={tmp_path / 'run'}"]) == 7
    told = capsys.readouterr().err
    assert "parallel.nodes=2: has no effect on train, it is a key of plan, launch, init\n" in told
    assert "bench" not in told


def test_what_a_command_does_not_ask_with_is_told(
    calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.txt").write_text("Why?")
    assert main(["chat", "someone/model", "generate.output=said.jsonl"]) == 7
    told = "lisa-dist: generate.output=said.jsonl: has no effect on chat, it is a key of generate\n"
    assert capsys.readouterr().err == told
    assert main(["generate", "someone/model", f"{tmp_path}/questions.txt"]) == 7
    assert f"generate.prompts={tmp_path}/questions.txt asks what the file holds" in capsys.readouterr().err
    assert calls[-1][1].generate.prompts == [f"{tmp_path}/questions.txt"]


def test_launch_slurm_gets_the_overrides_too(calls: list[tuple[Any, ...]]) -> None:
    assert main(["launch", "slurm", "train.seed=2", "launch.dry_run=true"]) == 7
    overrides = ["train.seed=2", "launch.dry_run=true"]
    assert calls == [("lisa_dist.launching.slurm.run", load(overrides), overrides, None)]


def test_multirun_goes_to_the_sweep(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "-m", "train.seed=1,2"]) == 7
    ((address, space, config, config_dir),) = calls
    assert address == "lisa_dist.launching.sweeps.run.run_sweep" and config_dir is None
    assert space == {"train.seed": ["train.seed=1", "train.seed=2"]} and config.train.seed == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "-m", "train.seed=1,2"]) == 2
    assert len(calls) == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("lisa_dist.commands.plan.run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_a_mistake_found_by_a_command_is_told_like_any_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(*arguments: Any) -> int:
        raise UserError("plan.gpu=abacus: must be a preset")

    monkeypatch.setattr("lisa_dist.commands.plan.run", mistake)
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == "lisa-dist: plan.gpu=abacus: must be a preset\n"


def test_torchrun_shows_a_mistake_once() -> None:
    """Under torchrun every rank reads the configuration; one of them speaks. Real processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, "-m", "lisa_dist", "train", "sampler.perod=3"], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1  # torchrun's own, whatever the ranks return
    assert ended.stderr.count("did you mean sampler.period?") == 1
    assert "exitcode  : 2" in ended.stderr
