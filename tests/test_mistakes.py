"""Mistakes that a user makes: each is one sentence and exit code 2, told without torch, and nothing is left behind.

A fresh Python that must not import torch takes them all, one after the other, so that what is slow fails here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Arguments (FOLDER is where the test is, LONG a name that no file system takes), and what the sentence must hold. In
# FOLDER lie: rows.jsonl, list.json, model/ (a model), empty/, used/ (a run that has trained), my.yaml (settings),
# circle (a link to itself), my.txt, table.tsv, none.jsonl (empty).
MISTAKES = [
    (["trian"], "command=trian: must be one of train, plan"),
    (["trian"], "did you mean train?"),
    ([], "a command is missing, one of train, plan, bench"),
    (["train", "sampler.perod=3"], "did you mean sampler.period?"),
    (["train", "--cfg", "jo"], "--cfg"),
    (["train", "--config-dir"], "--config-dir"),
    (["train", "--frobnicate"], "--frobnicate"),
    (["plan", "--multirun", "train.seed=1,2"], "sweeps train only"),
    (["train", "--multirun", "train.sede=1,2"], "did you mean train.seed?"),
    (["train", "--multirun", "train.seed=1,2", "run.dir=FOLDER/x"], "a run directory of its own, set sweep.dir inst"),
    (["train", "--multirun", "method=lsa,lora_b"], "did you mean lisa?"),
    (["train", "--multirun", "train.seed=1,2", "sweep.dir="], "sweep.dir=: is empty, as a variable of the shell"),
    (["bench", "data.path=FOLDER/none.jsonl"], "data.path=FOLDER/none.jsonl: the data set is empty"),
    (["plan", "plan.gpu=h1000"], "did you mean h100"),
    (["plan", "plan.compare=[loar]"], "did you mean lora?"),
    (["export", "run.dir=FOLDER/used", "export.path=FOLDER/new"], "run.dir=FOLDER/used: has no checkpoint yet"),
    (["train", "--multirun", "train.seed=1,2", "--cfg", "job"], "--multirun has one for each job"),
    (["init", "FOLDER/new.yaml", "--cfg", "job"], "init writes it to a file"),
    (["init", "FOLDER/new.yaml", "--watch"], "--watch: the report of a run is watched, not init"),
    (["report", "run.dir=nowhere"], "run.dir=nowhere"),
    (["train", "train.sede=3"], "did you mean train.seed?"),
    (["train", "learning_rate=1e-5"], "here it is optimizer.lr"),
    (["train", "--learning_rate", "1e-5"], "keys are written KEY=VALUE; here it is optimizer.lr"),
    (["train", "num_train_epochs=3"], "here it is train.epochs"),
    (["train", "per_device_train_batch_size=3"], "here it is train.micro_batch_size"),
    (["train", "gradient_accumulation_steps=4"], "here it is train.global_batch_size"),
    (["train", "max_seq_length=4096"], "here it is data.sequence_length"),
    (["train", "lora_r=8"], "here it is update.rank"),
    (["train", "optimizer.lr=fast"], "must be a number"),
    (["train", "optimizer.lr=1e-5,5e-5"], "several values need --multirun"),
    (["train", "train.max_steps=0"], "must be at least 1"),
    (["train", "train.epochs=inf"], "train.epochs=inf: must be a finite number"),
    (["train", "train.seed=-1"], "train.seed=-1: must be at least 0"),
    (["train", "sampler.seed=-5"], "sampler.seed=-5: must be at least 0"),
    (["train", "method=lsa"], "did you mean lisa?"),
    (["train", "sampler.blocks=[1]"], "it belongs to sampler=fixed"),
    (["train", "model=FOLDER/model"], "a path goes into model.path=FOLDER/model"),
    (["train", "model.path=FOLDER/modle"], "no such directory; did you mean FOLDER/model?"),
    (["train", "model.path=my [model]"], "model.path=my [model]: no such directory"),
    (["train", "model.path=FOLDER/empty"], "has no config.json"),
    (["train", "model.path=FOLDER/rows.jsonl"], "must be a directory or a hub id, not a file"),
    (["train", "model.path=FOLDER/model", "data=demo"], "model.path=FOLDER/model: model.safetensors is empty"),
    (["train", "model.path=FOLDER/broken", "data=demo"], "config.json is no valid JSON"),
    (["train", "model.path=FOLDER/awq", "data=demo"], "its weights are stored quantised (quantization_config of con"),
    (["train", "model.path=FOLDER/mute", "data=demo"], "model.tokenizer=FOLDER/mute: no tokenizer found"),
    (["generate", "FOLDER/mute", "Hello"], "model.tokenizer=FOLDER/mute: no tokenizer found"),
    (["chat", "FOLDER/broken"], "generate.path=FOLDER/broken: config.json is no valid JSON"),
    (["train", "model.path=builtin:dmo"], "did you mean builtin:demo?"),
    (["train", "model.tokenizer=FOLDER/nowhere"], "model.tokenizer=FOLDER/nowhere: no such directory"),
    (["train", "data.path=FOLDER/row.jsonl"], "no such file or directory"),
    (["train", "data.path=FOLDER/rows (1), [2].jsonl"], "data.path=FOLDER/rows (1), [2].jsonl: no"),
    (["train", "data.path=FOLDER/empty"], "holds no file that ends in one of"),
    (["train", "data.path=FOLDER/*.csv"], "no file matches"),
    (["train", "data.path=FOLDER/rows.jsonl", "data.split=test"], "a file has no splits"),
    (["train", "data.path=FOLDER/table.tsv"], "data.format=auto: no format fits the columns a, b"),
    (["train", "data.path=FOLDER/rows.jsonl", "data.format=chat"], "needs the column messages, the data have prompt"),
    (["train", "data.path=FOLDER/rows.jsonl", "data.columns={prompt: ask}"], "data.columns.prompt=ask: no such column"),
    (["train", "data.path=FOLDER/list.json"], "list.json, row 1: column prompt must be text, found"),
    (["train", "data.path=FOLDER/my.txt", "data.validation=FOLDER/table.tsv"], "no format fits the columns a, b"),
    (["train", "data.path=FOLDER/none.jsonl"], "data.path=FOLDER/none.jsonl: the data set is empty"),
    (["train", "data.path=FOLDER/my.yaml"], "the name must end in one of"),
    (["train", "data.validation=FOLDER/nowhere.jsonl"], "data.validation=FOLDER/nowhere.jsonl: no such file"),
    (["train", "data.validation=1.5"], "must lie between 0 and 1"),
    (["train", "data.format=alpcaa"], "did you mean alpaca?"),
    (["train", "run.dir=FOLDER/used"], "holds a run already"),
    (["train", "run.dir=FOLDER/rows.jsonl"], "must be a directory, but is a file"),
    (["train", "run.dir=FOLDER/circle"], "must be a directory, but is a file, or a link to none"),
    (["train", "train.global_batch_size=7", "train.micro_batch_size=2"], "near are 6 and 8"),
    (["train", "train.global_batch_size=2", "train.micro_batch_size=1", "parallel.nproc_per_node=4"], "near are 4"),
    (["train", "optimizer.in_backward=true", "train.on_nonfinite=skip"], "can't leave steps out"),
    (["train", "model.quantization=nf4"], "quantised weights can't be trained by update=full_rank"),
    (["train", "--config-dir", "FOLDER/nowhere"], "--config-dir FOLDER/nowhere: must be a folder that exists"),
    (["train", "FOLDER/mine.yaml"], "or a YAML file that exists; did you mean FOLDER/my.yaml?"),
    (["train", "FOLDER/my.yaml"], "data.path=null: must name a file"),
    (["train", "FOLDER/my.yaml", "FOLDER/my.yml"], "one configuration file is read"),
    (["train", "optimizer.lr", "=", "1e-5"], "optimizer.lr: must be KEY=VALUE without blanks around =, or a YAML file"),
    (["report", "FOLDER/used"], "must be KEY=VALUE; the directory of a run is named by run.dir=FOLDER/used"),
    (["export", "run.dir=FOLDER/used", "nowhere"], "nowhere: must be KEY=VALUE"),
    (["train", "FOLDER/used"], "a YAML file that exists; the directory of a run is named by run.dir=FOLDER/used"),
    (["train", "--config", "FOLDER/my.yaml"], "a configuration file is a word of its own: lisa-dist train FILE.yaml"),
    (["plan", "run.dir=FOLDER/nowhere"], "run.dir=FOLDER/nowhere: must be the directory of a run, which has a config"),
    (["init", "FOLDER/my.yaml"], "is there already and is not written over"),
    (["init", "FOLDER/circle"], "is there already and is not written over"),
    (["init", "FOLDER/a.yaml", "FOLDER/b.yaml"], "one configuration file is read, and FOLDER/a.yaml is given already"),
    (["launch", "slrm"], "launch: must be followed by slurm"),
    (["launch", "train.seed=1"], "launch: must be followed by slurm, as in lisa-dist launch slurm"),
    (["evaluate"], "evaluate.path=null: name a Hugging Face directory, or a run"),
    (["evaluate", "evaluate.path=FOLDER/model"], "evaluate.data=null: name the data"),
    (["evaluate", "evaluate.path=FOLDER/model", "evaluate.data=FOLDER/no.jsonl"], "evaluate.data=FOLDER/no.jsonl: no"),
    (["evaluate", "evaluate.path=FOLDER/model", "data=demo", "evaluate.output=FOLDER/rows.jsonl"], "holds something"),
    (["evaluate", "evaluate.path=FOLDER/model", "data=demo", "evaluate.output=FOLDER/empty"], "is a folder"),
    (["train", "data.path=FOLDER/rows.jsonl", "data.preview_file=FOLDER/rows.jsonl"], "holds something else"),
    (["train", "model.path=FOLDER/model", "data.path=FOLDER/rows.jsonl", "run.dir=FOLDER"], "holds model, which no"),
    (["evaluate", "run.dir=FOLDER/empty"], "must be the directory of a run"),
    (["generate", "FOLDER/nowhere", "Hello"], "generate.path=FOLDER/nowhere: no such directory"),
    (["generate", "FOLDER/empty", "Hello"], "has no config.json"),
    (["generate", "FOLDER/adapted", "Hello"], "generate.path=FOLDER/adapted: the directory holds an adapter"),
    (["generate", "builtin:demo", "Hello"], "generate.path=builtin:demo: has no *.safetensors, so"),
    (["evaluate", "evaluate.path=FOLDER/pickled", "data=demo"], "has pytorch_model.bin but no safetensors"),
    (["train", "model=custom", "model.path=FOLDER/bare"], "model.path=FOLDER/bare: has no *.safetensors"),
    (["generate", "generate.prompts=[Hello]"], "name a Hugging Face directory, or a run"),
    (
        ["generate", "What is this?"],
        "generate: What is this? is taken for the model, and there is no prompt: generate PL",
    ),
    (["generate", "generate.path=FOLDER/model"], "holds no prompt"),
    (["generate", "FOLDER/model", "  "], "prompt 1 of 1 is empty"),
    (["generate", "FOLDER/model", "generate.prompts=FOLDER/no.txt"], "must be a list such as"),
    (["generate", "FOLDER/model", "generate.prompts=FOLDER/list.json"], 'line 1 must be an object with "prompt"'),
    (["generate", "FOLDER/model", "What", "is", "this?"], "'this?' is one text too many; put a prompt in quotes"),
    (["generate", "FOLDER/model", "generate.max_new_token=3"], "did you mean generate.max_new_tokens?"),
    (["generate", "FOLDER/model", "--temperature", "3"], "--temperature: is no option"),
    (["generate", "FOLDER/model", "Hello", "generate.output=FOLDER/my.yaml"], "is there already and is not written"),
    (["generate", "FOLDER/model", "Hi", "generate.prompts=[a]"], "generate.prompts: stands beside the prompt 'Hi'"),
    (["generate", "FOLDER/model", "Hi", "generate.step=3"], "generate.step=3: chooses a checkpoint of a run, and"),
    (["evaluate", "evaluate.path=FOLDER/model", "data=demo", "evaluate.step=3"], "evaluate.path=FOLDER/model has none"),
    (["generate", "--compare", "FOLDER/model"], "--compare: expected 2 arguments"),
    (["generate", "generate.compare=[FOLDER/model]", "Hello"], "must name at least two directories"),
    (["generate", "--compare", "FOLDER/model", "FOLDER/nowhere", "Hello"], "generate.compare=FOLDER/nowhere: no such"),
    (["chat"], "name a Hugging Face directory, or a run"),
    (["chat", "FOLDER/model", "Hello"], "what you say is typed once the model is there"),
    (["evaluate", "--compare", "FOLDER/a", "FOLDER/b"], "--compare: belongs to generate"),
    (["export", "export.path=FOLDER/out"], "run.dir=null: name the directory of the run"),
    (["export", "run.dir=FOLDER/used"], "export.path=null"),
    (["launch", "slurm", "run.dir=FOLDER/job", "launch.script=FOLDER/empty"], "FOLDER/empty: must be a new file"),
    (["export", "run.dir=FOLDER/used", "export.path=FOLDER/model"], "must be a new or an empty directory"),
    (["export", "run.dir=FOLDER/used", "export.path=FOLDER/circle"], "must be a new or an empty directory"),
    (["launch", "slurm", "run.dir=FOLDER/job", "launch.script=FOLDER/circle"], "FOLDER/circle: must be a new file"),
    (["launch", "slurm", "--multirun", "train.seed=1,2", "sweep.dir=FOLDER/circle"], "sweep.dir=FOLDER/circle: can't"),
    (["export", "run.dir=FOLDER/used", "export.path=FOLDER/LONG"], "export.path=FOLDER/LONG: File name too long"),
    (["train", "run.dir=FOLDER/LONG"], "run.dir=FOLDER/LONG: File name too long (FOLDER/LONG/metrics.jsonl); name a"),
    (["launch", "slurm", "run.dir=FOLDER/job", "launch.script=FOLDER/LONG"], "launch.script=FOLDER/LONG: File name"),
    (["init", "FOLDER/LONG"], "FOLDER/LONG: File name too long; name a path that this account may use"),
    (["train", "--config-dir", "LONG"], "LONG: File name too long; name a path that this account may use"),
    (["runs", "FOLDER/LONG"], "FOLDER/LONG: File name too long; name a path that this account may use"),
]

PROGRAM = """
import contextlib, io, json, sys, time

sys.modules["torch"] = None  # importing it raises ImportError
from lisa_dist.cli import main

results = []
for arguments in json.load(sys.stdin):
    said, printed, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            code = main(arguments)
        except ImportError as error:
            code = str(error)
    results.append((code, said.getvalue(), printed.getvalue(), time.process_time() - start))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for name in ("model", "bare", "pickled", "adapted", "empty", "used"):
        (folder / name).mkdir()
    for name in ("model", "bare", "pickled", "adapted"):
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    for name in ("model", "adapted"):
        (folder / name / "model.safetensors").touch()
    (folder / "adapted" / "adapter_config.json").touch()  # as peft saves it: transformers would load both
    (folder / "pickled" / "pytorch_model.bin").touch()
    (folder / "used" / "config.yaml").write_text("method: lisa\n")
    (folder / "used" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (folder / "my.yaml").write_text("model: demo\n")
    for name, config in {
        "broken": "{",
        "awq": '{"quantization_config": {"quant_method": "awq"}}',
        "mute": "{}",
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        (folder / name / "model.safetensors").write_text("weights")
    (folder / "my.txt").write_text("A text.")
    (folder / "table.tsv").write_text("a\tb\n1\t2\n")
    (folder / "none.jsonl").touch()
    (folder / "list.json").write_text('[{"prompt": null, "completion": "b"}]')
    return folder


def written_out(text: str, folder: Path) -> str:
    return text.replace("FOLDER", str(folder)).replace("LONG", "x" * 300)


@pytest.fixture(scope="module")
def told(folder: Path) -> list[tuple[int | str, str, str, float]]:
    """Of each mistake the exit code, what went to stderr and stdout, and seconds of computing; nothing is written."""
    before = sorted(folder.rglob("*"))
    given = [[written_out(word, folder) for word in arguments] for arguments, _ in MISTAKES]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(given), capture_output=True, text=True, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(folder.rglob("*")) == before, "something is left behind"
    return [tuple(result) for result in json.loads(ran.stdout)]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_told_in_a_sentence(
    number: int, told: list[tuple[int | str, str, str, float]], folder: Path
) -> None:
    code, said, printed, seconds = told[number]
    assert code == 2, said
    assert printed == ""
    assert said.startswith("lisa-dist: ") and said.count("\n") == 1
    assert written_out(MISTAKES[number][1], folder) in said
    assert seconds < 1, "of computing"
