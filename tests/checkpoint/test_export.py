"""A checkpoint as a Hugging Face directory: the same logits, files of the wanted size, and little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisa_dist.checkpoint.description import write_description, write_tokenizer
from lisa_dist.checkpoint.export import as_dtype, export_checkpoint, find_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.stops import stop_ids
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import read_architecture
from tests.support.private_memory import give_freed_tensors_back_at_once, peak_private_bytes
from tests.support.ranks import run_on_fresh_ranks, run_on_ranks
from tests.support.runs import make_config, tensors_of, train
from tests.support.small_training import build_and_load

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


def test_weights_that_half_precision_has_no_room_for_are_refused() -> None:
    weight = torch.tensor([1.0, -70000.0, torch.inf])
    assert torch.equal(as_dtype("norm.weight", weight, torch.bfloat16), weight.bfloat16())
    assert torch.equal(as_dtype("norm.weight", weight[::2], torch.float16), weight[::2].half())
    with pytest.raises(UserError, match=r"export.dtype=float16: norm.weight holds numbers up to 7e"):
        as_dtype("norm.weight", weight[:2], torch.float16)


def test_generation_ends_where_answers_were_trained_to_end(trained: Config, tmp_path: Path) -> None:
    trained.export.dtype = None
    run = RunDirectory.of(trained)
    tokenizer = load_tokenizer("builtin:demo")
    fields = {"temperature": 0.5, "do_sample": True}
    for own, expected in ((5, [5, *sorted(stop_ids(tokenizer))]), ([2, 5], [2, 5]), (None, [2])):
        (run.model / "generation_config.json").write_text(json.dumps({**fields, "eos_token_id": own}))
        export_checkpoint(trained, newest(trained), tmp_path / str(own))
        found = json.loads((tmp_path / str(own) / "generation_config.json").read_text())
        assert found == {**fields, "eos_token_id": expected} and stop_ids(tokenizer) == {2}


def exported_in_bfloat16(folder: str, compute: str) -> dict[str, torch.dtype]:
    """The dtypes of an export of a mixture whose experts are chosen with biases. Runs on a rank."""
    architecture = (
        "{model_type:deepseek_v3,vocab_size:1024,hidden_size:16,intermediate_size:16,moe_intermediate_size:16,"
        "num_hidden_layers:2,num_attention_heads:2,num_key_value_heads:2,n_routed_experts:4,num_experts_per_tok:2,"
        "n_group:1,topk_group:1,q_lora_rank:null,kv_lora_rank:16,qk_rope_head_dim:8,qk_nope_head_dim:8,v_head_dim:8,"
        "first_k_dense_replace:1}"
    )
    choices = ["precision.frozen=float32", f"precision.compute={compute}", "export.dtype=bfloat16"]
    config = make_config(folder, f"model.architecture={architecture}", *choices)
    run = RunDirectory.of(config)
    write_tokenizer(run.tokenizer, config.model, load_tokenizer("builtin:demo"))
    write_description(run, config.model, read_architecture(config.model))
    train_module = build_and_load(config)
    CheckpointSaver(train_module, run.checkpoints, "").save(Progress(step=1))
    export_checkpoint(config, find_checkpoint(run.checkpoints, 1), Path(folder) / "hf")
    return {name: tensor.dtype for name, tensor in load_file(Path(folder) / "hf" / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("compute", "exact"),
    [("float32", {"weight", "e_score_correction_bias"}), ("bfloat16", {"e_score_correction_bias"})],
)
def test_what_neither_training_nor_transformers_rounds_an_export_does_not(
    tmp_path: Path, compute: str, exact: set[str]
) -> None:
    (dtypes,) = run_on_ranks(1, exported_in_bfloat16, str(tmp_path), compute)
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {f"model.layers.1.mlp.gate.{name}" for name in exact}


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
    train_module = build_and_load(config)
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
