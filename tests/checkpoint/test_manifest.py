"""What makes a checkpoint complete, and which damage is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lisa_dist.checkpoint.export import find_checkpoint
from lisa_dist.checkpoint.manifest import MANIFEST, checkpoint_name, verify
from lisa_dist.checkpoint.restore import newest_complete
from lisa_dist.config import UserError
from tests.support.checkpoints import make_checkpoint


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda c: flip_byte(c / "weights/rank_00000.safetensors"), "another checksum"),
    "truncated": (lambda c: (c / "weights/rank_00000.safetensors").write_bytes(b"short"), "5 bytes instead of"),
    "missing": (lambda c: (c / "weights/rank_00000.safetensors").unlink(), "is missing"),
    "state": (lambda c: flip_byte(c / "state.json"), "another checksum"),
    "of more ranks": (
        lambda c: (c / "weights/rank_00007.safetensors").write_bytes(b"x"),
        "rank_00007.safetensors is not",
    ),
    "unfinished": (lambda c: (c / MANIFEST).unlink(), "was never finished"),
    "torn manifest": (lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:40]), "is not readable"),
    "empty manifest": (lambda c: (c / MANIFEST).write_text('{"files": {}, "depends_on": {}}'), "does not list"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    do_damage, sentence = DAMAGES[kind]
    checkpoint = make_checkpoint(tmp_path, 10)
    assert verify(checkpoint) is None
    do_damage(checkpoint)
    assert sentence in str(verify(checkpoint))


def test_a_model_that_is_exported_into_a_checkpoint_does_it_no_harm(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf" / "model.safetensors").touch()
    assert verify(checkpoint) is None


@pytest.mark.parametrize("kind", ["flipped", "missing", "of more ranks", "unfinished"])
def test_a_damaged_base_damages_what_builds_on_it(kind: str, tmp_path: Path) -> None:
    base, later = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20, depends_on=[10])
    assert verify(later) is None
    DAMAGES[kind][0](base)
    assert "step_00000010" in str(verify(later))
    shutil.rmtree(base)
    assert "step_00000010 is missing" in str(verify(later))


def test_a_base_that_was_written_anew_is_another(tmp_path: Path) -> None:
    """Step 5 is damaged, the run goes back to 4, writes another 5, and is killed before it writes another 6."""
    make_checkpoint(tmp_path, 4)
    base, later = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 6, depends_on=[4, 5])
    last = make_checkpoint(tmp_path, 7, depends_on=[6])
    flip_byte(base / "weights/rank_00000.safetensors")
    assert "step_00000005/weights" in str(verify(later))
    shutil.rmtree(base)
    make_checkpoint(tmp_path, 5)
    assert verify(later) is None and verify(last) is None, "the same bytes once more"
    shutil.rmtree(base)
    make_checkpoint(tmp_path, 5, words="other data")
    assert verify(base) is None
    assert verify(later) == "step_00000006 depends on step_00000005, which has been written anew since"
    assert find_checkpoint(tmp_path, None) == last, "which has its weights in 6 and in its own files alone"
    (last / "state.json").unlink()
    assert find_checkpoint(tmp_path, None) == newest_complete(tmp_path) == base
    with pytest.raises(UserError, match=r"export\.step=6: .* written anew since"):
        find_checkpoint(tmp_path, 6)


def test_a_base_counts_by_its_weights_alone(tmp_path: Path) -> None:
    base, later = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20, depends_on=[10])
    flip_byte(base / "state.json")
    assert verify(base) is not None and verify(later) is None


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    flip_byte(checkpoint / "state.json")
    found = [verify(checkpoint, part, 4) for part in range(4)]
    assert len([wrong for wrong in found if wrong is not None]) == 1


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "weights/../../x", "a\0b"])
def test_files_outside_the_checkpoint_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    content = json.loads((checkpoint / MANIFEST).read_text())
    content["files"][name] = {"bytes": 1, "sha256": ""}
    (checkpoint / MANIFEST).write_text(json.dumps(content))
    assert "outside" in str(verify(checkpoint))


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
        "depends_on": st.dictionaries(st.just("step_00000010") | st.text(max_size=20), json_values, max_size=3)
        | json_values,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | json_values.map(json.dumps) | manifests.map(json.dumps))
def test_any_manifest_is_read_without_an_exception(content: bytes | str, tmp_path: Path) -> None:
    checkpoint = tmp_path / checkpoint_name(10)
    if not checkpoint.exists():
        make_checkpoint(tmp_path, 10)
    (checkpoint / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert isinstance(verify(checkpoint), str), "none of these lists the right checksums"
