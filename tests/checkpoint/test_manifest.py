"""What makes a checkpoint complete, which damage is found, and which checkpoints are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lisa_dist.checkpoint.manifest import (
    MANIFEST,
    checkpoint_name,
    damage,
    describe_file,
    list_checkpoints,
    remove_old,
    write_manifest,
)


def make_checkpoint(directory: Path, step: int, needs: list[int] | None = None) -> Path:
    """A checkpoint of three files of other content at every step."""
    checkpoint = directory / checkpoint_name(step)
    (checkpoint / "weights").mkdir(parents=True)
    for name in ("state.json", "config.yaml", "weights/rank_00000.safetensors"):
        (checkpoint / name).write_text(f"{name} of step {step}")
    files = {str(p.relative_to(checkpoint)): describe_file(p) for p in checkpoint.rglob("*") if p.is_file()}
    write_manifest(checkpoint, files, [checkpoint_name(base) for base in needs or []])
    return checkpoint


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda c: flip_byte(c / "weights/rank_00000.safetensors"), "another checksum"),
    "truncated": (lambda c: (c / "weights/rank_00000.safetensors").write_bytes(b"short"), "5 bytes instead of"),
    "missing": (lambda c: (c / "weights/rank_00000.safetensors").unlink(), "is missing"),
    "state": (lambda c: flip_byte(c / "state.json"), "another checksum"),
    "unfinished": (lambda c: (c / MANIFEST).unlink(), "was never finished"),
    "torn manifest": (lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:40]), "is not readable"),
    "empty manifest": (lambda c: (c / MANIFEST).write_text('{"files": {}, "needs": []}'), "does not list"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    do_damage, sentence = DAMAGES[kind]
    checkpoint = make_checkpoint(tmp_path, 10)
    assert damage(checkpoint) is None
    do_damage(checkpoint)
    assert sentence in str(damage(checkpoint))


@pytest.mark.parametrize("kind", ["flipped", "missing", "unfinished"])
def test_a_damaged_base_damages_what_builds_on_it(kind: str, tmp_path: Path) -> None:
    base, later = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20, needs=[10])
    assert damage(later) is None
    DAMAGES[kind][0](base)
    assert "step_00000010" in str(damage(later))
    shutil.rmtree(base)
    assert "step_00000010 is missing" in str(damage(later))


def test_a_base_counts_by_its_weights_alone(tmp_path: Path) -> None:
    base, later = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20, needs=[10])
    flip_byte(base / "state.json")
    assert damage(base) is not None and damage(later) is None


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    flip_byte(checkpoint / "state.json")
    found = [damage(checkpoint, part, 4) for part in range(4)]
    assert len([wrong for wrong in found if wrong is not None]) == 1


def test_retention_keeps_bases_and_later_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 20, needs=[10])
    make_checkpoint(tmp_path, 30)
    make_checkpoint(tmp_path, 40, needs=[10, 30])
    newest = make_checkpoint(tmp_path, 50, needs=[30])
    later = make_checkpoint(tmp_path, 90)
    remove_old(tmp_path, newest, keep=2)
    kept = [path.name for path in list_checkpoints(tmp_path)]
    assert kept == [checkpoint_name(step) for step in (90, 50, 40, 30, 10)], "10 and 30 are needed, 20 is not"
    assert damage(later) is None and damage(newest) is None
    remove_old(tmp_path, newest, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (90, 50, 30)]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "weights/../../x", "a\0b"])
def test_files_outside_the_checkpoint_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    content = json.loads((checkpoint / MANIFEST).read_text())
    content["files"][name] = {"bytes": 1, "sha256": ""}
    (checkpoint / MANIFEST).write_text(json.dumps(content))
    assert "outside" in str(damage(checkpoint))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
manifests = st.fixed_dictionaries(
    {},
    optional={
        "files": st.dictionaries(
            st.sampled_from(["state.json", "config.yaml", "weights/rank_00000.safetensors"]) | st.text(max_size=300),
            st.fixed_dictionaries({}, optional={"bytes": json_values, "sha256": json_values}) | json_values,
            max_size=4,
        )
        | json_values,
        "needs": st.lists(st.just("step_00000010") | st.text(max_size=20), max_size=3) | json_values,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | json_values.map(json.dumps) | manifests.map(json.dumps))
def test_any_manifest_is_read_without_an_exception(content: bytes | str, tmp_path: Path) -> None:
    checkpoint = tmp_path / checkpoint_name(10)
    if not checkpoint.exists():
        make_checkpoint(tmp_path, 10)
    (checkpoint / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert isinstance(damage(checkpoint), str), "none of these lists the right checksums"
