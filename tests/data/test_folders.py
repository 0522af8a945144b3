"""A folder is split as ``datasets`` splits it."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from lisa_dist.config import UserError
from lisa_dist.data.folders import find_files

FOLDERS = [
    ["a.jsonl", "b.jsonl", "LICENSE.txt", "dataset_infos.json", "README.md"],
    ["data/train.jsonl", "data/dev.jsonl"],
    ["train/a.jsonl", "test/b.jsonl", "extra.jsonl"],
    ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/gen-00000-of-00001.jsonl"],
    ["my_train_file.jsonl", "my_eval_file.jsonl"],
    ["train set.jsonl", "train2.jsonl", "valid-1.jsonl"],
    ["constrained.jsonl", "x.jsonl"],
    ["a.jsonl", "b.csv", "c.csv"],
    ["train.jsonl", "train.csv"],
    ["a.tsv", "b.csv"],
    ["x/train/y/a.jsonl", "x/testing-1/b.jsonl"],
    ["a.jsonl", ".h/b.jsonl", "__x__/c.jsonl"],
    ["en/train.jsonl", "de/train.jsonl"],
    ["a.txt", "b.txt"],
    ["train.jsonl.gz", "b/test.jsonl"],
    ["Train.csv", "Test.csv"],
    ["Test/train.jsonl", "x/test.jsonl"],
]


def split_by_us(folder: Path) -> dict[str, list[str]]:
    found = {}
    for split in ("train", "validation", "test", "gen"):
        try:
            files = find_files(folder, str(folder), split, None, "data.path")[0]
        except UserError as error:
            assert f"no split {split}" in str(error)
        else:
            found[split] = sorted(os.path.relpath(file, folder) for file in files)
    return found


@pytest.mark.parametrize("names", FOLDERS, ids=",".join)
def test_files_go_to_the_splits_that_datasets_gives_them(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    files = datasets.load_dataset_builder(str(tmp_path)).config.data_files
    expected = {str(split): sorted(os.path.relpath(file, tmp_path) for file in files[split]) for split in files}
    assert split_by_us(tmp_path) == expected


def test_files_that_name_another_split_in_capitals_are_told(tmp_path):
    """``datasets`` reads both for training, which a user of these names does not expect."""
    for name in ("Train.csv", "Test.csv"):
        (tmp_path / name).write_text("text\na\n")
    files, notes = find_files(tmp_path, "x", "train", None, "data.path")
    assert len(files) == 2 and len(notes) == 1 and notes[0].startswith("Test.csv: read for train")


@pytest.mark.parametrize("subset", ["one", "two", "three"])
def test_subsets_are_those_that_datasets_gives(tmp_path, subset):
    for name in ("one/a.jsonl", "one/b.jsonl", "two/train.jsonl", "two/test.jsonl", "c.jsonl", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: one, data_files: one/*}\n- {config_name: two, data_dir: two}\n"
        "- {config_name: three, data_files: [{split: train, path: [d.jsonl, 'c*']}, "
        "{split: gen, path: '*/b.jsonl'}]}\n---\n"
    )
    files = datasets.load_dataset_builder(str(tmp_path), subset).config.data_files
    for split in files:
        found = find_files(tmp_path, "x", str(split), subset, "data.path")[0]
        assert sorted(map(str, found)) == sorted(files[split])
