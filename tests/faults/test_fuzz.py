"""Whatever is written on the command line, in a data set or in a run's records: a clean error or none."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lisa_dist.config import Config, DataConfig, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.overrides import all_keys
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.prepare import prepare_data
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.telemetry.records import RowWriter, read_rows

# The same examples in every run, however slow the machine is.
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

KEYS = list(all_keys(OmegaConf.structured(Config)))
TOKENIZER = load_tokenizer("builtin:demo")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def join(parts: tuple[str, str, str]) -> str:
    prefix, key, value = parts
    return f"{prefix}{key}={value}"


keys = st.sampled_from(sorted(KEYS)) | st.text(string.ascii_lowercase + "._", min_size=1, max_size=20)
values = (
    json_values.map(lambda value: json.dumps(value))
    | st.text(max_size=20)
    | st.sampled_from(
        ["null", "-1", "1e400", "nan", "${oc.env:HOME}", "${a}", "[", "{a:", "'", "a,b", "???", "${train.seed}"]
    )
)


@QUICK
@example(overrides=["train.max_steps=${train.max_steps}"])
@given(
    overrides=st.lists(st.tuples(st.sampled_from(["", "+", "++", "~"]), keys, values).map(join), min_size=1, max_size=3)
)
def test_any_override(overrides: list[str]) -> None:
    try:
        assert isinstance(load(overrides), Config)
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)


rows = st.dictionaries(
    st.sampled_from(["instruction", "input", "output", "messages", "conversations", "prompt", "completion", "text"]),
    json_values
    | st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_values,
                "content": json_values,
                "from": st.sampled_from(["human", "gpt"]) | json_values,
                "value": json_values,
            },
        ),
        max_size=4,
    ),
    max_size=4,
)
lines = st.lists((rows | json_values).map(json.dumps) | st.text(max_size=30), min_size=1, max_size=5).map("\n".join)


@QUICK
@given(content=lines.map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=80))
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_any_data_set(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(content)
    config = DataConfig(path=str(file), sequence_length=32, cache_dir=str(tmp_path / "cache"))
    for on_bad_row in ("error", "skip"):
        config.on_bad_row = on_bad_row
        try:
            assert len(prepare_data(config, TOKENIZER, seed=0).train) > 0
        except UserError as error:
            assert str(error).strip() and "Traceback" not in str(error)


@QUICK
@given(content=st.lists(json_values.map(json.dumps) | st.just('{"step": 1}') | st.text(max_size=9), max_size=4))
@pytest.mark.parametrize("name", ["layers.jsonl", "metrics.jsonl"])
def test_any_history_of_layers(name: str, content: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n".join(content))
    writer, row = RowWriter(RunDirectory(tmp_path)), {"period": 1, "step": 2, "active_layers": [0], "num_blocks": 4}
    try:
        writer.cut_after(1)
    except UserError as error:
        assert f"{name} is damaged" in str(error)
        return
    writer.append(writer.run.layers, row)
    writer.close()
    if name == "layers.jsonl":
        assert read_rows(tmp_path / name)[-1] == row
