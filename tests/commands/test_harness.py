"""``evaluate.tasks`` on one rank and on two: the figures that lm-evaluation-harness itself finds for the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lisa_dist.commands import evaluate
from lisa_dist.commands.inference import open_model
from lisa_dist.config import UserError
from lisa_dist.config.loading import load
from lisa_dist.config.paths import model_directory
from lisa_dist.launching.inputs import check_evaluate
from tests.support.ranks import run_on_ranks

pytest.importorskip("lm_eval")

LONGEST = 32  # tokens: less than some of the texts below have
LONG = "One potato, two potatoes, and " * 5

CHOICES = [
    {"text": "The opposite of late is", "choices": [" early", " low", " a kind of fish", " A"], "answer": 0},
    {"text": "What is a bus?", "choices": ["A", "B", "C", "D"], "answer": 2},  # one row of a forward pass
    {"text": LONG, "choices": [" six", " A", " five", " a bus"], "answer": 1},  # all are cut
    {"text": "Before", "choices": [" six", " five comes", " low", " coat"], "answer": 1},
]
# Five windows, two at a time: of two ranks one has a pass more than the other.
TEXTS = [{"text": "A shark is a kind of fish."}, {"text": LONG + "then a coat."}, {"text": "Berlin"}, {"text": "Six"}]
QUESTIONS = [
    {"text": "Name what comes after Tuesday.", "answer": "After Tuesday comes Wednesday."},
    {"text": LONG, "answer": "There are three."},  # is cut
    {"text": "What is a coat?", "answer": "A coat is a kind of garment."},
]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choices": (
        CHOICES,
        {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metrics": ["acc", "brier_score"]},
    ),
    "texts": (TEXTS, {"doc_to_text": "", "doc_to_target": "{{text}}", "metrics": ["word_perplexity", "bits_per_byte"]}),
    "answers": (QUESTIONS, {"doc_to_target": "{{answer}}", "metrics": ["chrf"]}),
    "unknown_choice": (CHOICES, {"doc_to_target": LONG, "metrics": ["acc"]}),
    "many_beams": (QUESTIONS, {"doc_to_target": "{{answer}}", "metrics": ["chrf"]}),
    "long_answers": (QUESTIONS, {"doc_to_target": "{{answer}}", "metrics": ["chrf"]}),
    "lost": ([], {"doc_to_target": "{{answer}}", "metrics": ["chrf"]}),
}
KINDS = {"choices": "multiple_choice", "texts": "loglikelihood_rolling", "unknown_choice": "loglikelihood"}
GENERATION = {"until": ["e"], "max_gen_toks": 10, "do_sample": False, "top_p": 0.9}
GENERATIONS = {"many_beams": GENERATION | {"num_beams": 3}, "long_answers": GENERATION | {"max_gen_toks": LONGEST}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts BOS before a text, and tasks."""
    folder = tmp_path_factory.mktemp("harness")
    demo = model_directory("builtin:demo")
    assert demo is not None
    architecture = AutoConfig.from_pretrained(demo, num_hidden_layers=2, initializer_range=0.3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.save_pretrained(folder / "model")
    file = folder / "model" / "tokenizer.json"
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    bos = {"<s>": {"id": "<s>", "ids": [tokenizer.bos_token_id], "tokens": ["<s>"]}}
    added = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": bos}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": added}))
    assert AutoTokenizer.from_pretrained(folder / "model")("A").input_ids[0] == tokenizer.bos_token_id
    (folder / "tasks").mkdir()
    for name, (rows, settings) in TASKS.items():
        data = folder / f"{name}.jsonl"
        if rows:
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kind = KINDS.get(name, "generate_until")
        task = {
            "task": name,
            "dataset_path": "json",
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "{{text}}",
        }
        task["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        task |= {key: value for key, value in settings.items() if key != "metrics"}
        task["metric_list"] = [{"metric": metric} for metric in settings["metrics"]]
        if kind == "generate_until":
            task["generation_kwargs"] = GENERATIONS.get(name, GENERATION)
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    return folder


def keys_of(folder: Path, *tasks: str) -> list[str]:
    keys = [f"evaluate.path={folder}/model", f"evaluate.task_dir={folder}/tasks", f"evaluate.tasks={list(tasks)}"]
    keys += [f"data.sequence_length={LONGEST}", "train.micro_batch_size=2", "evaluate.batch_size=2"]
    return [*keys, "precision.compute=float32", "parallel.cpu_threads=1"]


def found_by_evaluate(folder: Path, output: str) -> list[str]:
    """Warnings of ``evaluate``, whose results are written. Runs on a rank."""
    from lisa_dist.commands import harness

    said: list[str] = []
    with (
        mock.patch.object(harness, "BOOTSTRAPS", 0),
        mock.patch("lm_eval.evaluator.add_env_info"),  # asks many programs, for seconds
        mock.patch.object(harness.logger, "warning", lambda text, *values: said.append(text % values)),
    ):
        assert evaluate.run(load([*keys_of(folder, "choices", "texts", "answers"), f"evaluate.output={output}"])) == 0
    return said


def found_by_the_harness(folder: Path) -> dict[str, Any]:
    """Results of the harness with transformers' model. Runs on a rank, the only one."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    hflm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder / "model"), max_length=LONGEST, batch_size=1)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):
        found = simple_evaluate(hflm, tasks=["choices", "texts", "answers"], task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return json.loads(json.dumps(found["results"]))


def floats(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, float)}


def test_evaluate_finds_what_the_harness_finds_and_says_what_is_cut(folder: Path) -> None:
    (expected,) = run_on_ranks(1, found_by_the_harness, folder)
    figures = {task: floats(values) for task, values in expected.items()}
    assert {task: len(values) for task, values in figures.items()} == {"choices": 2, "texts": 2, "answers": 1}
    for ranks in (1, 2):
        output = folder / f"{ranks}.json"
        said = run_on_ranks(ranks, found_by_evaluate, folder, str(output))
        assert said[1:] == [[]] * (ranks - 1) and len(said[0]) == 1
        assert said[0][0].startswith(
            "5 of 19 requests of the tasks are longer than 32 tokens (data.sequence_length=32)"
        )
        found = json.loads(output.read_text())
        assert found["requests_cut"] == 5
        for task, values in figures.items():
            assert floats(found["tasks"][task]) == pytest.approx(values, rel=1e-4), (task, ranks)


def refusals(folder: Path, tasks: list[str]) -> list[str]:
    """What the user is told of each task. Runs on a rank."""
    from lisa_dist.commands import harness

    config = load(keys_of(folder))
    opened = open_model(config, config.evaluate.path, None, "evaluate")
    told = []
    own_tasks = partial(harness._Tasks, include_defaults=False)  # reading all that the harness has takes seconds
    with mock.patch.object(harness, "_Tasks", own_tasks):
        for task in tasks:
            chosen = replace(config, evaluate=replace(config.evaluate, tasks=[task]))
            with pytest.raises(UserError) as caught:
                harness.evaluate_tasks(opened, chosen, {2})
            told.append(str(caught.value))
    return told


def test_tasks_that_cannot_be_run_are_refused_in_a_sentence(folder: Path) -> None:
    expected = {
        "choise": "the harness knows no task choise; did you mean choices?",
        "lost": f"lm-evaluation-harness can't load them (Unable to find '{folder}/lost.jsonl'",
        "many_beams": "generation with num_beams=3 is not done here; known are do_sample, max_gen_toks, temperature",
        "long_answers": "answers may have 32 tokens, which leaves none for prompts, since data.sequence_length=32",
        "unknown_choice": "tokens, but data.sequence_length=32 allows 32",
    }
    (told,) = run_on_ranks(1, refusals, folder, list(expected))
    for (task, message), said in zip(expected.items(), told):
        assert said.startswith(f"evaluate.tasks=[{task}]: ") and message in said


def test_a_folder_of_tasks_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"^evaluate.task_dir=.*/task: must be a directory that exists; did you mean .*/tasks"
    ):
        check_evaluate(load([*keys_of(folder, "choices"), f"evaluate.task_dir={folder}/task"]))
