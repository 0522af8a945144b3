"""The Python files that come with a model: found through their relative imports, however these are written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.checkpoint.code_files import copy_code, needed_files

CODE = {
    "modeling_own.py": "import os\nfrom .configuration_own import OwnConfig\nfrom . import helpers\n",
    "configuration_own.py": "try:\n    from .constants import A\nexcept ImportError:\n    A = 1\n",
    "constants.py": "from .modeling_own import nothing  # a circle\n",
    "helpers.py": "def late():\n    from .parts.attention import Attention\n    return Attention\n",
    "parts/__init__.py": "",
    "parts/attention.py": "from ..shared import x\nfrom . import masks as m\n",
    "parts/masks.py": "",
    "shared.py": "this is no Python",
    "train.py": "from .unused import y\n",
    "unused.py": "",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, code in CODE.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(code)
    return tmp_path / "source"


def test_what_is_imported_relatively_is_needed_and_nothing_else(source: Path) -> None:
    def find(name: str) -> Path | None:
        return source / name if (source / name).is_file() else None

    assert needed_files(find, "modeling_own.py").keys() == CODE.keys() - {"train.py", "unused.py"}
    assert needed_files(find, "absent.py") == {}
    assert needed_files(find, "../source/train.py") == {}, "no file outside the model's is taken"


def test_code_is_copied_and_what_is_not_there_is_said(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields: dict[str, Any] = {
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
            "AutoModelForTokenClassification": "classifier.OwnForTokenClassification",
            "AutoModel": "somebody/else--modeling_else.Else",
            "AutoTokenizer": ["shared.Slow", None],
        }
    }
    with caplog.at_level(logging.WARNING):
        copy_code(lambda name: source / name if (source / name).is_file() else None, fields, tmp_path / "out", "no.py")
    copied = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.py")}
    assert copied == CODE.keys() - {"train.py", "unused.py"}
    assert (tmp_path / "out" / "modeling_own.py").read_text() == CODE["modeling_own.py"]
    assert list(fields["auto_map"]) == ["AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"]
    assert "AutoModelForTokenClassification=classifier.OwnForTokenClassification is not there" in caplog.text
    assert "AutoModel is loaded from somebody/else--modeling_else.Else" in caplog.text
