from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from lisa_dist.config import UserError
from lisa_dist.data import sources
from lisa_dist.data.readers import BrokenRow, Row
from lisa_dist.data.sources import find_source, has_split

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(4)]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path, split="train") -> list:
    return list(find_source(str(path), split).rows())


def values(path, split="train") -> list[dict]:
    return [row.values for row in read(path, split)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows.json", json.dumps({"data": ROWS})),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}, indent=2)),
        ("rows.json", lines(ROWS)),
        ("rows.jsonl", lines(ROWS)),
        ("rows.jsonl", "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n")),
        ("rows.jsonl", lines(ROWS).rstrip("\n")),
        ("rows.jsonl", json.dumps(ROWS)),
        ("rows.csv", "instruction,output\n" + "".join(f"q{i},a{i}\n" for i in range(4))),
        ("rows.tsv", "instruction\toutput\n" + "".join(f"q{i}\ta{i}\n" for i in range(4))),
    ],
)
def test_text_files(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    assert values(file) == ROWS


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("XZ", lzma.compress)])
def test_compressed_files(tmp_path, suffix, compress):
    contents = {
        "json": json.dumps(ROWS, indent=1),
        "jsonl": lines(ROWS),
        "csv": "instruction,output\n" + "".join(f"q{i},a{i}\n" for i in range(4)),
    }
    for name, content in contents.items():
        file = tmp_path / f"rows.{name}.{suffix}"
        file.write_bytes(compress(content.encode()))
        assert values(file) == ROWS
    file.write_bytes(compress(b"x" * 5000)[:-20])
    with pytest.raises(UserError, match=rf"rows\.csv\.{suffix}: can't be read"):
        read(file)


def test_parquet_saved_data_sets_and_globs(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == ROWS
    dataset.save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == ROWS
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "splits")
    assert values(tmp_path / "splits") == ROWS
    assert values(tmp_path / "splits", "test") == ROWS[1:2]
    for kind in ("numpy", "torch", "arrow"):  # the format of tensors that a program set before it saved
        dataset.with_format(kind).save_to_disk(tmp_path / kind)
        assert values(tmp_path / kind) == ROWS
    for number in (2, 1):
        (tmp_path / f"part{number}.jsonl").write_text(lines(ROWS[number : number + 1]))
    assert values(tmp_path / "part*.jsonl") == ROWS[1:3]


def test_values_keep_their_types(tmp_path):
    rows = [{"text": "2020-01-01", "more": {"a": 1}}, {"text": "07", "more": None}]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    assert values(tmp_path / "rows.jsonl") == rows


def test_text_rows_are_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n\n three\n")
    assert [(row.values["text"], row.number) for row in read(tmp_path / "a.txt")] == [("one\ntwo", 2), (" three", 6)]


@pytest.mark.parametrize(
    ("files", "train", "validation"),
    [
        (["train.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["data/train-0.jsonl", "data/train-1.jsonl", "data/val-0.jsonl"],
         ["train-0.jsonl", "train-1.jsonl"], ["val-0.jsonl"]),
        (["train/a.jsonl", "dev/b.jsonl"], ["a.jsonl"], ["b.jsonl"]),
        (["a.jsonl", "b.jsonl", ".hidden/c.jsonl"], ["a.jsonl", "b.jsonl"], None),
        (["data/train-00000-of-00001.jsonl", "data/val-00000-of-00001.jsonl", "stray.jsonl"],
         ["train-00000-of-00001.jsonl"], ["val-00000-of-00001.jsonl"]),
        (["my_train.jsonl", "my-dev.jsonl.gz"], ["my_train.jsonl"], ["my-dev.jsonl.gz"]),
        (["training1.jsonl", "valid.jsonl", "constrained.jsonl"], ["training1.jsonl"], ["valid.jsonl"]),
        (["a.jsonl", "__pycache__/b.jsonl", "LICENSE.txt", "dataset_infos.json", "load.py"], ["a.jsonl"], None),
    ],
)  # fmt: skip
def test_splits_of_a_directory(tmp_path, files, train, validation):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = lines(ROWS[:1]).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert [Path(row.file).name for row in read(tmp_path)] == train
    assert has_split(str(tmp_path), "validation") == (validation is not None)
    if validation is None:
        with pytest.raises(UserError, match="no split validation, it has train"):
            read(tmp_path, "validation")
    else:
        assert [Path(row.file).name for row in read(tmp_path, "validation")] == validation


def test_broken_lines_carry_file_and_number(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        lines(ROWS[:1]).encode() + b'{"instruction": \n\n[1, 2]\n{"a": "\xff"}\n' + lines(ROWS[1:2]).encode()
    )
    rows = read(file)
    assert [row.values for row in rows if isinstance(row, Row)] == ROWS[:2]
    broken = [row for row in rows if isinstance(row, BrokenRow)]
    assert [row.place for row in broken] == [f"{file}, line 2", f"{file}, line 4", f"{file}, line 5"]
    assert "not valid JSON" in broken[0].reason
    assert "must be an object, found list" in broken[1].reason
    assert "not UTF-8" in broken[2].reason
    assert rows[-1].place == f"{file}, line 6"


def test_keys_and_columns_that_are_there_twice_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    twice = '{"instruction": "q", "output": "a", "output": "b"}'
    file.write_text(f'{twice}\n{{"instruction": "q", "output": "a", "output": "a"}}\n')
    broken, row = read(file)
    assert broken == BrokenRow(f"{file}, line 1", "a JSON object has a key with two values, found str 'output'")
    assert row.values == {"instruction": "q", "output": "a"}
    (tmp_path / "rows.json").write_text(f"[{twice}]")
    with pytest.raises(UserError, match=r"rows\.json: a JSON object has a key with two values, found str 'output'"):
        read(tmp_path / "rows.json")
    table = pa.table([["q"], ["a"], ["b"]], names=["instruction", "output", "output"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet names column output twice"):
        read(tmp_path / "rows.parquet")


def test_broken_rows_of_other_files(tmp_path):
    (tmp_path / "rows.csv").write_text('a,b\n1,2\n"x\ny",3\n1,2,3\n4,5\n')
    rows = read(tmp_path / "rows.csv")
    assert [row.place for row in rows] == [f"{tmp_path}/rows.csv, line {n}" for n in (2, 3, 5, 6)]
    assert rows[2].reason == "has 3 fields, the header has 2"
    (tmp_path / "rows.json").write_text(json.dumps([ROWS[0], 7]))
    assert read(tmp_path / "rows.json")[1] == BrokenRow(f"{tmp_path}/rows.json, row 2", "must be an object, found int")


def test_values_that_python_does_not_read_are_broken_rows_and_files(tmp_path):
    huge, deep, row = f'{{"n": {"9" * 5000}}}', '{"a": ' * 20_000, json.dumps(ROWS[0])
    (tmp_path / "rows.jsonl").write_text(f"{huge}\n{deep}\n{row}\n")
    *broken, whole = read(tmp_path / "rows.jsonl")
    assert ["not valid JSON" in row.reason for row in broken] == [True, True] and whole.values == ROWS[0]
    for name, content in (("rows.json", f"[{huge}]"), ("more.json", f"[{deep}]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}: not valid JSON"):
            read(tmp_path / name)
    latin = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": latin}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet: not a readable Parquet file .*utf-8"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", '[{"a": 1},\n {"a": }]', r"rows\.json, line 2: not valid JSON"),
        ("rows.json", '{"rows": []}', r"must be a list of rows or .*, found an object with rows"),
        ("rows.parquet", "nonsense", r"rows\.parquet: not a readable Parquet file"),
        ("rows.csv", "a,b,a\n1,2,3\n", r"rows\.csv, line 1: the header names column a twice"),
        ("rows.csv", 'a,b\n1,2\n3,"4\n5,6\n', r"rows\.csv, line 3: a quote that opens in this row is not closed"),
        ("rows.jsonl.gz", "nonsense", r"rows\.jsonl\.gz: can't be read"),
        ("rows.xml", "<a/>", r"rows\.xml: the name must end in one of \.json, "),
    ],
)
def test_files_broken_as_a_whole(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_missing_paths_name_the_nearest(tmp_path):
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(UserError, match=rf"data.path={tmp_path}/alpacca.json: no such .*mean {tmp_path}/alpaca.json"):
        find_source(f"{tmp_path}/alpacca.json")
    with pytest.raises(UserError, match=r"looked at .*/nowhere/rows\.jsonl"):
        find_source("nowhere/rows.jsonl")
    with pytest.raises(UserError, match=r"no file matches"):
        find_source(f"{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match=r"data.validation=builtin:dmo: bundled are builtin:demo"):
        find_source("builtin:dmo", key="data.validation")
    with pytest.raises(UserError, match=r"holds no file that ends in one of"):
        find_source(str(Path(__file__).parent))
    with pytest.raises(UserError, match=r"a file has no splits, so split test can't be chosen"):
        find_source(f"{tmp_path}/alpaca.json", "test")


def test_hub_is_asked_for_names_like_its_own(monkeypatch):
    asked = []

    def load(path, subset, split):
        asked.append((path, subset, split))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "stay_offline_where_unreachable", lambda: asked.append("reachable?"))
    with pytest.raises(
        UserError, match=r"data.path=org/name: no such file .*as a data set of the hub, split test.*offline"
    ):
        find_source("org/name", "test")
    with pytest.raises(UserError, match=r"data.path=org/name:main: no such file"):
        find_source("org/name:main")
    assert asked == ["reachable?", ("org/name", None, "test"), "reachable?", ("org/name", "main", "train")]


def test_content_hash_follows_the_content(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS))
    first = find_source(str(file)).content_hash()
    copy = tmp_path / "copy.jsonl"
    copy.write_text(lines(ROWS))
    assert find_source(str(copy)).content_hash() == first
    file.write_text(lines(ROWS).replace("q1", "q9"))
    assert find_source(str(file)).content_hash() != first


README = """---
license: mit
configs:
- config_name: {first}
  data_files:
  - split: train
    path: ["parts/*.jsonl", "[more].jsonl"]
  - split: rest
    path: missing.jsonl
- config_name: second
  data_dir: two{options}
---
# A data set

---
"""


def described_folder(tmp_path, first: str = "first", options: str = "") -> str:
    for name in ("parts/1", "parts/2", "[more]", "m", "two/train", "two/test"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(lines([{"text": name}]))
    (tmp_path / "README.md").write_text(README.format(first=first, options=options))
    return str(tmp_path)


def texts(source) -> list[str]:
    return [row.values["text"] for row in source.rows()]


def test_subsets_of_a_readme(tmp_path):
    path = described_folder(tmp_path)
    assert texts(find_source(path, subset="first")) == ["parts/1", "parts/2", "[more]"]
    assert texts(find_source(path, subset="second")) == ["two/train"]
    assert texts(find_source(path, "test", subset="second")) == ["two/test"]
    assert has_split(path, "test", "second") and not has_split(path, "test", "first")
    for options, message in (
        ({}, r"data.path=.*: has the subsets first, second; choose one with data.subset=NAME"),
        ({"subset": "secnd"}, r"data.subset=secnd: .* has no such subset, it has first, second; did you mean second"),
        ({"subset": "first", "split": "test"}, "the directory has no split test, it has train, rest"),
        ({"subset": "first", "split": "rest"}, r"its README names missing\.jsonl, and no file there matches"),
    ):
        with pytest.raises(UserError, match=message):
            find_source(path, **options)


@pytest.mark.parametrize(("first", "options"), [("default", ""), ("first", "\n  default: true")])
def test_a_default_subset_is_taken_and_said(tmp_path, first, options):
    source = find_source(described_folder(tmp_path, first, options))
    default = "default" if first == "default" else "second"
    assert texts(source) == (["parts/1", "parts/2", "[more]"] if default == "default" else ["two/train"])
    assert source.notes == [f"of the subsets {first}, second the default, {default}, is read (data.subset)"]


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("---\nconfigs: [\n---\n", "README.md: its header can't be read as YAML"),
        ("---\nconfigs: x\n---\n", "configs must be a list of subsets, each with a config_name"),
        ("---\nconfigs: [{data_files: x}]\n---\n", "configs must be a list of subsets, each with a config_name"),
        ("---\nconfigs: [{config_name: a, data_files: {x: y}}]\n---\n", "data_files must be a path, a list"),
        ("---\nconfigs: [{config_name: a, data_files: a.csv, sep: ;}]\n---\n", "subset a sets sep, which changes"),
        ("---\nconfigs: [{config_name: a, data_files: a.xml}]\n---\n", "split train has a.xml, and its files must end"),
    ],
)
def test_readmes_that_can_not_be_followed(tmp_path, readme, message):
    (tmp_path / "a.xml").write_text("<a/>")
    (tmp_path / "README.md").write_text(readme)
    with pytest.raises(UserError, match=message):
        find_source(str(tmp_path))


def test_one_subset_needs_no_choice_and_none_can_not_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a"}]))
    with pytest.raises(UserError, match=r"data.subset=x: .* has no such subset, its README lists none"):
        find_source(str(tmp_path), subset="x")
    with pytest.raises(UserError, match=r"data.subset=x: .*a.jsonl is a file, and only data sets have subsets"):
        find_source(str(tmp_path / "a.jsonl"), subset="x")
    (tmp_path / ".huggingface.yaml").write_text("configs: [{config_name: only, data_files: a.jsonl}]")
    assert texts(find_source(str(tmp_path))) == ["a"]


def test_files_of_a_directory_that_are_not_read_are_named(tmp_path):
    for name in ("a.jsonl", "b.json", "c.csv", "notes.txt", "rest.zip", "README.md", "LICENSE.txt", ".gitattributes"):
        (tmp_path / name).write_text(lines([{"text": "a"}]))
    source = find_source(str(tmp_path))
    assert [file.name for file in source.files] == ["a.jsonl", "b.json"]
    assert source.notes == ["3 files of the directory are not read: c.csv, notes.txt, rest.zip"]


AWKWARD = ["[v2] data", "a (1)", "b?*", "~", "~nobody", "ü 東京 'x' \"y\"", "{c}", "a,b=c", "x" * 200]


@pytest.mark.parametrize("name", AWKWARD)
def test_what_exists_is_read_under_its_name(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.jsonl").write_text(lines([{"text": "a"}]))
    (folder / "z.jsonl").write_text(lines([{"text": "z"}]))
    assert texts(find_source(str(folder / f"{name}.jsonl"))) == ["a"]
    assert texts(find_source(str(folder / "z*.jsonl"))) == ["z"]
    assert sorted(texts(find_source(str(folder)))) == ["a", "z"]
    monkeypatch.chdir(tmp_path)
    assert sorted(texts(find_source(name))) == ["a", "z"]
    datasets.Dataset.from_list([{"text": "s"}]).save_to_disk(folder / "saved [1]")
    assert texts(find_source(f"{name}/saved [1]")) == ["s"]


@pytest.mark.parametrize(
    "path", ["", " ", "~nobody/x.jsonl", "x" * 5000, "y" * 300 + "/[a]*", "a/" + "x" * 5000 + "/b"]
)
def test_what_is_no_path_is_said_so(path):
    with pytest.raises(UserError, match=r"data.path="):
        find_source(path)
