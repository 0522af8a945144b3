from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_dist.checkpoint.state import Progress
from lisa_dist.data.batches import GlobalBatches, label_tokens
from lisa_dist.data.sequences import Sequences
from tests.support.rows import make_rows

LENGTHS = [3 + (7 * row) % 11 for row in range(37)]


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return Sequences(make_rows(LENGTHS))


def batches(sequences: Sequences, **changes) -> GlobalBatches:
    options = {
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "sequence_length": 16,
        "seed": 5,
        "rank": 0,
        "num_ranks": 1,
        "pad_token_id": 0,
    }
    return GlobalBatches(sequences=sequences, **{**options, **changes})


def rows_in(micro_batch) -> list[int]:
    """Which rows are in a micro-batch; empty ones hold none."""
    return [] if label_tokens(micro_batch) == 0 else [int(ids[1]) - 1 for ids in micro_batch["input_ids"]]


def test_same_global_batches_at_any_world_size(sequences):
    for step in range(0, 60, 12):
        expected = batches(sequences).global_batch(step)
        for world_size in (1, 2, 3, 4, 8):
            ranks = [batches(sequences, rank=rank, num_ranks=world_size) for rank in range(world_size)]
            parts = [one.micro_batches(step) for one in ranks]
            assert len({len(part) for part in parts}) == 1
            seen = [row for part in parts for micro_batch in part for row in rows_in(micro_batch)]
            assert sorted(seen) == sorted(expected)
            assert sum(label_tokens(m) for part in parts for m in part) == sum(LENGTHS[row] - 1 for row in expected)


def test_micro_batches_are_dealt_in_turn(sequences):
    parts = batches(sequences).micro_batch_indices(3)
    for rank in range(4):
        mine = batches(sequences, rank=rank, num_ranks=4).micro_batches(3)
        assert [rows_in(m) for m in mine] == [parts[rank], parts[rank + 4] if rank + 4 < len(parts) else []]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000), st.integers(1, 6))
def test_each_epoch_holds_every_sequence_once(global_batch_size, seed, epochs):
    mine = batches(Sequences(make_rows([2] * 23)), global_batch_size=global_batch_size, seed=seed)
    steps = mine.steps(epochs)
    stream = [index for step in range(steps) for index in mine.global_batch(step * global_batch_size)]
    assert len(stream) - global_batch_size < 23 * epochs <= len(stream)
    for epoch in range(epochs):
        assert sorted(stream[23 * epoch : 23 * (epoch + 1)]) == list(range(23))


def test_order_follows_the_seed_and_changes_with_the_epoch():
    mine = batches(Sequences(make_rows([2] * 24)))
    assert mine.global_batch(0) != batches(mine.sequences, seed=6).global_batch(0)
    assert mine.global_batch(0) + mine.global_batch(12) != mine.global_batch(24) + mine.global_batch(36)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.integers(0, 40), max_size=3))
def test_other_global_batches_go_on_at_the_next_sequence(sizes, left_out):
    """Whatever the sizes of the steps, every sequence but those left out is seen once an epoch, in one order."""
    rows = Sequences(make_rows([2] * 23))
    places = Progress(left_out=[[start, start + 2] for start in left_out])
    seen, found = 0, []
    for size in sizes:
        found += batches(rows, global_batch_size=size).global_batch(seen, places.place_of)
        seen += size
    whole = batches(rows, global_batch_size=69).global_batch(0)
    skipped = {place for start in left_out for place in (start, start + 1)}
    assert found == [index for place, index in enumerate(whole) if place not in skipped][: len(found)]
    assert len(found) == seen or seen > 69 - len(skipped)


def test_steps_and_epochs(sequences):
    mine = batches(sequences)  # 37 sequences, 12 a step
    assert mine.num_sequences == 37
    assert (mine.steps(1), mine.steps(3), mine.steps(0.1), mine.steps(12)) == (4, 10, 1, 37)
    assert mine.epoch(37 * 12) == pytest.approx(12)


def test_steps_left_follow_from_the_sequences_seen(sequences):
    for epochs in (0.1, 1, 2.5, 3):
        steps = batches(sequences).steps(epochs)
        assert [batches(sequences).steps(epochs, 12 * done) for done in range(steps + 1)] == list(range(steps, -1, -1))
    half = batches(sequences, global_batch_size=6)
    assert half.steps(2, seen=3 * 12) == 7, "38 of 74 sequences are left"
    assert half.steps(1, seen=48) == 0, "the last batch saw some of the next epoch"


def test_grouping_by_length_saves_the_padding_that_it_counts():
    lengths = [3 + (17 * row) % 61 for row in range(700)]
    sequences = Sequences(make_rows(lengths))
    grouped = batches(sequences, sequence_length=64, group_by_length=True)
    plain = batches(sequences, sequence_length=64)

    def padding(mine: GlobalBatches) -> int:
        """By what an epoch's tensors hold, the step in which it ends left out of both."""
        steps = range(0, 12 * (len(lengths) // 12), 12)
        tokens = sum(m["input_ids"].numel() for step in steps for m in mine.micro_batches(step))
        return tokens - sum(int(mine.lengths(step).sum()) for step in steps)

    last = 700 % 12  # sequences of the step that is left out, which are padded to a multiple of 8 at least
    assert padding(grouped) <= grouped.padding_of_epoch(0) <= padding(grouped) + last * 64
    assert padding(plain) <= plain.padding_of_epoch(0) <= padding(plain) + last * 64
    assert grouped.padding_of_epoch(0) < 0.7 * grouped.padding_of_epoch(0, grouped=False)
    assert grouped.padding_of_epoch(0, grouped=False) == plain.padding_of_epoch(0)


def test_grouped_sequences_keep_their_order_whatever_a_resume_changes():
    sequences = Sequences(make_rows([3 + (7 * row) % 50 for row in range(300)]))
    mine = batches(sequences, group_by_length=True)
    stream = [index for step in range(0, 600, 12) for index in mine.global_batch(step)]
    assert sorted(stream[:300]) == sorted(stream[300:600]) == list(range(300))
    assert stream[:300] != stream[300:600], "another epoch has another order"
    other = batches(sequences, group_by_length=True, global_batch_size=20, micro_batch_size=5, num_ranks=2)
    assert [index for step in range(0, 600, 20) for index in other.global_batch(step)] == stream
    first = [sequences.lengths[index] for index in stream[:300]]
    assert sorted(first) != first != sorted(first, reverse=True), "groups come in random order"


def test_padding(sequences):
    mine = batches(sequences)
    batch = mine.collate([0, 1])  # 3 and 10 tokens, so 16 with the multiple of 8
    assert all(tensor.shape == (2, 16) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert set(batch) == {"input_ids", "labels", "position_ids"}  # a mask would switch packing off
    assert batch["position_ids"].tolist() == [list(range(16))] * 2
    assert batch["labels"][0, 3:].tolist() == [-100] * 13
    assert label_tokens(batch) == 2 + 9
    assert mine.collate([0])["input_ids"].shape == (1, 8)
    short = batches(sequences, sequence_length=10)
    assert short.collate([0, 1])["input_ids"].shape == (2, 10)  # never above data.sequence_length
    fixed = batches(sequences, fixed_length=True)
    assert fixed.collate([0, 1])["input_ids"].shape == (2, 16)
    assert fixed.empty_micro_batch()["labels"].shape == (2, 16)
    assert label_tokens(fixed.empty_micro_batch()) == label_tokens(mine.empty_micro_batch()) == 0


def test_longest_micro_batch(sequences):
    longest = batches(sequences, micro_batch_size=5).longest_micro_batch()
    lengths = (longest["labels"][:, 1:] != -100).sum(dim=1) + 1
    assert sorted(lengths.tolist()) == sorted(LENGTHS)[-5:]


def test_iterate_goes_on_at_any_step(sequences):
    mine = batches(sequences, num_ranks=2, rank=1)
    for seen, steps in ((0, 5), (36, 1), (17, 7), (4, 0)):
        got = list(mine.iterate(seen, steps))
        assert len(got) == steps
        for step, micro_batches in enumerate(got):
            for ours, expected in zip(micro_batches, mine.micro_batches(seen + 12 * step), strict=True):
                assert all(ours[name].equal(expected[name]) for name in expected)


def test_iterate_hands_errors_on(sequences, monkeypatch):
    mine = batches(sequences)
    monkeypatch.setattr(mine, "collate", lambda indices: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(mine.iterate(0, 3))


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_validation_goes_once_over_everything(sequences, world_size):
    ranks = [batches(sequences, rank=rank, num_ranks=world_size, micro_batch_size=4) for rank in range(world_size)]
    parts = [list(one.validation_batches()) for one in ranks]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for m in part for row in rows_in(m)) == list(range(37))
    assert [len(list(one.validation_batches(limit=1))) for one in ranks] == [1] * world_size
