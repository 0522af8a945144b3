"""``lisa-dist evaluate``: held-out loss and perplexity, or tasks of lm-evaluation-harness, of a trained model."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lisa_dist.checkpoint.state import read_state
from lisa_dist.commands.inference import OpenedModel, answer_ends, open_model
from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.data.locate import has_subset
from lisa_dist.data.prepare import PreparedData, fingerprint, prepare_data, validation_split
from lisa_dist.data.sequences import Sequences
from lisa_dist.launching.inputs import check_evaluate, results_file
from lisa_dist.method.probes import mean_loss
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import make_folder, to_json, write_atomically
from lisa_dist.telemetry.logs import setup_logging
from lisa_dist.training.limits import check_tokens
from lisa_dist.training.setup import make_batches

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Evaluate the model that ``evaluate.path`` or ``run.dir`` names, print and write the results.

    With ``evaluate.tasks`` and without ``evaluate.data`` only the tasks are run. Collective: every rank.

    Raises:
        UserError: there is no such model or no data, or the results can't be written.
    """
    distributed.initialize(config.parallel)
    setup_logging()
    choice = config.evaluate
    distributed.on_rank_zero(lambda: check_evaluate(config))  # under torchrun nobody has before
    distributed.on_rank_zero(lambda: make_folder(results_file(config).parent, f"evaluate.output={choice.output}"))
    opened = open_model(config, choice.path, choice.step, "evaluate")
    results: dict[str, Any] = {"model": opened.source, "step": opened.step}
    if choice.data is not None or not choice.tasks:
        results |= held_out_loss(config, opened)
    if choice.tasks:
        results |= run_tasks(config, opened)
    distributed.on_rank_zero(lambda: _write(config, results))
    return EXIT_DONE


def held_out_loss(config: Config, opened: OpenedModel) -> dict[str, Any]:
    """Return the mean loss over the label tokens and its exponential. Collective: every rank."""
    name, sequences = held_out_sequences(config, opened)
    train_module = opened.train_module
    dims = train_module.dims
    architecture: Any = train_module.store.module.config
    with distributed.longer_timeout(config.parallel.timeout):
        check_tokens(sequences, opened.tokenizer, architecture.vocab_size, f"evaluate.data={name}")
    batches = make_batches(config, dims, sequences, int(opened.tokenizer.pad_token_id or 0))
    loss = mean_loss(train_module.store.module, train_module.objective, dims, batches.validation_batches())
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"data": name, "sequences": len(sequences), "eval_loss": loss, "perplexity": perplexity}


def held_out_sequences(config: Config, opened: OpenedModel) -> tuple[str, Sequences]:
    """Return the name and the sequences of ``evaluate.data``, or of the run's validation data.

    Collective: every rank.

    Raises:
        UserError: the run held no data out, or the data can't be read.
    """
    path, limit = config.evaluate.data, config.evaluate.limit
    if path is not None:
        subset = config.data.subset if has_subset(path, config.data.subset) else None
        split = validation_split(path, subset)
        chosen = replace(config.data, path=path, split=split, subset=subset, validation=None, limit=limit)
        return path, prepare_data(chosen, opened.tokenizer, config.train.seed, key="evaluate.data").train
    data = prepare_data(config.data, opened.tokenizer, config.train.seed)
    held_out = data.validation
    if held_out is None:
        raise UserError("evaluate.data=null: the run held no data out, name a file, a directory or a hub id")
    if config.data.validation_fraction is not None and opened.step is not None:
        distributed.on_rank_zero(lambda: _warn_of_other_rows(config, opened, data))
    name = f"the validation data of {config.data.path}"
    if limit is None or limit >= len(held_out):
        return name, held_out
    if held_out.packing is not None:
        return name, Sequences(held_out.rows, held_out.packing[:limit])
    return name, Sequences(held_out.rows.select(range(limit)))


def _warn_of_other_rows(config: Config, opened: OpenedModel, data: PreparedData) -> None:
    """Say where a fraction is held out of other rows than those of training, which may then be among them."""
    then = read_state(Path(opened.source))["progress"]["data"]
    if then.get("rows") != fingerprint(config.data, data, opened.tokenizer)["rows"]:
        logger.warning(
            "data.validation=%s of data.path=%s leaves other rows than those that %s was trained on, so some that it "
            "was trained on may be among those held out",
            *(config.data.validation, config.data.path, opened.source),
        )


def run_tasks(config: Config, opened: OpenedModel) -> dict[str, Any]:
    """Run ``evaluate.tasks``, and return the harness' results by task and what was cut. Collective: every rank.

    Raises:
        UserError: a task is unknown, can't be loaded or asks for what is not done here.
    """
    from lisa_dist.commands.harness import evaluate_tasks  # needs the optional package lm-eval

    return evaluate_tasks(opened, config, answer_ends(config, opened, config.evaluate.path))


def _write(config: Config, results: dict[str, Any]) -> None:
    file = results_file(config)
    if "eval_loss" in results:
        print(f"loss {results['eval_loss']:.4f}, perplexity {results['perplexity']:.2f} on {results['data']}")
    for task, found in results.get("tasks", {}).items():
        numbers = (f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
        print(f"{task}: {', '.join(numbers)}")
    try:
        write_atomically(file, to_json(results, indent=1))
    except OSError as error:
        raise UserError(f"evaluate.output={file}: can't be written ({error.strerror})") from error
    print(file)
