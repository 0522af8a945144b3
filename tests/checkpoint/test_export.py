"""A checkpoint as a Hugging Face directory: the same logits, files of the wanted size, and little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisa_dist.checkpoint.description import write_description, write_tokenizer
from lisa_dist.checkpoint.export import export_checkpoint, find_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.method.module import build_train_module, load_initial_weights
from lisa_dist.models.architecture import read_architecture
from tests.support.private_memory import give_freed_tensors_back_at_once, peak_private_bytes
from tests.support.ranks import run_on_fresh_ranks
from tests.support.runs import make_config, tensors_of, train

MIB = 2**20


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on two ranks whose newest checkpoint builds on earlier ones, of float32 throughout."""
    run_dir = tmp_path_factory.mktemp("run")
    tied = f"model.architecture.tie_word_embeddings={str(request.param).lower()}"
    config = make_config(run_dir, "checkpoint.full_every=9", "precision.frozen=float32", tied, "train.max_steps=4")
    train(2, config)
    return config


def newest(config: Config) -> Path:
    return find_checkpoint(Path(str(config.run.dir)) / "checkpoints", None)


def test_transformers_loads_the_same_model(trained: Config, tmp_path: Path) -> None:
    trained.export.dtype, trained.export.max_shard_size = "float32", "30KB"
    files = export_checkpoint(trained, newest(trained), tmp_path / "hf")
    weights = {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors_of(newest(trained)).items()
        if name.startswith("weights/")
    }
    tied = trained.model.architecture["tie_word_embeddings"]
    assert ("lm_head.weight" in weights) is not tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    restored = dict(again.named_parameters())
    assert all(torch.equal(restored[name], tensor) for name, tensor in weights.items() if name in restored)
    assert restored.keys() <= weights.keys()
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")("what is 2 + 2", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_config(again.config, dtype=torch.float32).eval()
    missing = plain.load_state_dict(weights, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, plain(input_ids=ids).logits)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 2
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    sizes = {file: (tmp_path / "hf" / file).stat().st_size for file in files}
    alone = {file for file in files if list(index["weight_map"].values()).count(file) == 1}
    assert all(size < 30_000 + 2_000 for file, size in sizes.items() if file not in alone)


def test_the_default_dtype_and_what_is_refused(trained: Config, tmp_path: Path) -> None:
    trained.export.dtype, trained.export.max_shard_size = None, "5GB"
    assert export_checkpoint(trained, newest(trained), tmp_path / "hf") == ["model.safetensors"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16", "weights were random"
    before = sorted(path.name for path in (tmp_path / "hf").iterdir())
    with pytest.raises(UserError, match="nothing is written over"):
        export_checkpoint(trained, newest(trained), tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == before
    with pytest.raises(UserError, match="has no checkpoint of that step; it has 1, 3, 4"):
        find_checkpoint(newest(trained).parent, 2)


def peak_while_exporting(folder: str) -> tuple[int, int, int]:
    """Save a random model and export it; the peak above the start, the model's and the largest tensor's bytes."""
    give_freed_tensors_back_at_once()
    architecture = (
        "{model_type:llama,vocab_size:1024,hidden_size:1024,intermediate_size:2560,num_hidden_layers:6,"
        "num_attention_heads:16,num_key_value_heads:16}"
    )
    choices = [
        "model=custom",
        "model.init=random",
        "model.tokenizer=builtin:demo",
        f"model.architecture={architecture}",
    ]
    config = load([*choices, "export.max_shard_size=16MiB", "export.dtype=float32"])
    config.run.dir = folder
    write_tokenizer(RunDirectory.of(config).tokenizer, config.model, load_tokenizer("builtin:demo"))
    write_description(RunDirectory.of(config), config.model, read_architecture(config.model))
    train_module = build_train_module(config)
    load_initial_weights(train_module, torch.device("cpu"))
    saver = CheckpointSaver(train_module, Path(folder), "")
    saver.save(Progress(step=1))
    sizes = [4 * train_module.store.parameter(name).numel() for name in train_module.store.names]
    checkpoint = find_checkpoint(Path(folder), 1)
    export_checkpoint(config, checkpoint, Path(folder) / "once")  # imports are no part of it
    del train_module, saver
    peak = peak_private_bytes(lambda: export_checkpoint(config, checkpoint, Path(folder) / "again"))
    return peak, sum(sizes), max(sizes)


def test_the_model_is_never_in_memory(tmp_path: Path) -> None:
    [(peak, model, largest)] = run_on_fresh_ranks(1, peak_while_exporting, str(tmp_path))
    print(f"peak {peak / MIB:.0f} MiB, model {model / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB")
    assert model > 200 * MIB
    assert peak > 16 * MIB, "the measurement sees the tensors of a file"
    assert peak < 16 * MIB + 3 * largest, "a file's tensors and the next one, read, converted and held back"
