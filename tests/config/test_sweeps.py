"""From ``key=A,B`` to the overrides of each job."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_dist.config import UserError
from lisa_dist.config.loading import group_choices, load
from lisa_dist.config.overrides import write_override
from lisa_dist.config.sweeps import Interval, combinations, read_space, varies


def split_sweep(texts: list[str], config_dir: str | None = None) -> list[list[str]]:
    return combinations(read_space(texts, config_dir))


def varied(texts: list[str]) -> list[list[str]]:
    """Of each job the overrides that differ between the jobs."""
    space = read_space(texts)
    return [[text for text, values in zip(job, space.values()) if varies(values)] for job in combinations(space)]


def test_every_combination_the_last_key_fastest() -> None:
    texts = ["train.seed=1,2", "train.max_steps=5", "sampler=uniform,all"]
    assert split_sweep(texts) == [
        ["train.seed=1", "train.max_steps=5", "sampler=uniform"],
        ["train.seed=1", "train.max_steps=5", "sampler=all"],
        ["train.seed=2", "train.max_steps=5", "sampler=uniform"],
        ["train.seed=2", "train.max_steps=5", "sampler=all"],
    ]
    assert varied(texts)[1] == ["train.seed=1", "sampler=all"]


def test_no_key_is_varied() -> None:
    assert (split_sweep(["train.seed=1"]), varied(["train.seed=1"])) == ([["train.seed=1"]], [[]])


def test_ways_to_write_values(tmp_path: Path) -> None:
    assert varied(["train.seed=range(1,4)"]) == [["train.seed=1"], ["train.seed=2"], ["train.seed=3"]]
    assert varied(["train.seed=choice(7,9)"]) == [["train.seed=7"], ["train.seed=9"]]
    names = [job[0] for job in split_sweep(["sampler=glob(*)"])]
    assert names == [f"sampler={name}" for name in group_choices("sampler")]
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "zebra.yaml").touch()
    assert split_sweep(["sampler=glob(z*)"], str(tmp_path))[0] == ["sampler=zebra"]


@pytest.mark.parametrize("text", ["data.columns={prompt:q,completion:a}", "data.path='a,b.json'", "optimizer.lr=1e-5"])
def test_what_is_no_sweep_stays_as_written(text: str) -> None:
    jobs = split_sweep([text, "train.seed=1,2"])
    assert [job[0] for job in jobs] == [text, text]


def test_texts_with_commas_are_values_in_quotes() -> None:
    assert varied(["run.name='a,b',c"]) == [["run.name='a,b'"], ["run.name=c"]]


def test_paths_are_values_as_they_are_written() -> None:
    jobs = split_sweep(["data.path='/a/x (1) y.jsonl',builtin:demo", "model.path='a,b',c d"])
    chosen = [load(job) for job in jobs]
    assert [config.data.path for config in chosen[::2]] == ["/a/x (1) y.jsonl", "builtin:demo"]
    assert [config.model.path for config in chosen[:2]] == ["a,b", "c d"]


def test_the_last_of_two_overrides_counts() -> None:
    assert split_sweep(["train.seed=1,2", "train.seed=3"]) == [["train.seed=3"]]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed", "train"),
        ("train.seed=1,", "one value or several"),
        ("optimizer.lr=interval(2,1)", "the lower end first"),
        ("optimizer.lr=tag(log,interval(0,1))", "needs ends above 0"),
        ("optimizer.lr=tag(lgo,interval(1,2))", "the only tag is log"),
        ("train.seed=glob(*)", "the names of a group"),
        ("sampler=glob(x*)", "gives no value"),
        ("optimizer.lr=1e-3,1e-4,0.001", "gives 0.001 more than once"),
        ("~sampler", "cannot be removed"),
    ],
)
def test_mistakes(text: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        split_sweep([text, "train.seed=1,2"])
    assert text in str(caught.value) and (named in str(caught.value) or text == "seed")


def test_intervals() -> None:
    texts = ["optimizer.lr=tag(log,interval(1e-5,1e-3))", "sampler.period=int(interval(1,9))"]
    rate, period = read_space(texts).values()
    assert rate == Interval("optimizer.lr", 1e-5, 1e-3, log=True)
    assert period == Interval("sampler.period", 1, 9, log=False)
    assert isinstance(rate, Interval) and rate.override(3.14159e-05) == "optimizer.lr=3.142e-05"
    assert isinstance(period, Interval) and period.override(4) == "sampler.period=4"
    assert varied(texts)[1] == ["optimizer.lr=1e-05", "sampler.period=9"]


@pytest.mark.parametrize("path", ["/runs/a", "/runs/a b", "/runs/a,b=c", "/runs/it's", "/runs/{x}", "/1e3"])
def test_paths_of_every_kind_arrive(path: str) -> None:
    assert load([write_override("run.dir", path)]).run.dir == path
