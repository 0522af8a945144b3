from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lisa_dist.data.batches import GlobalBatches, label_tokens
from lisa_dist.data.sequences import Sequences, pack
from tests.support.rows import make_rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64), st.integers(0, 3))
def test_every_sample_once_and_no_sequence_too_full(lengths, capacity, seed):
    sequences = pack(lengths, capacity, seed)
    assert sorted(sample for members in sequences for sample in members) == list(range(len(lengths)))
    loads = [sum(lengths[sample] for sample in members) for members in sequences]
    assert all(0 < load <= capacity for load in loads)
    # Best fit opens a sequence only for what fits in none: no two are together at most one full.
    assert all(a + b > capacity for i, a in enumerate(loads) for b in loads[:i])
    assert sequences == pack(lengths, capacity, seed)


def test_best_fit_takes_the_fullest_sequence_that_has_room():
    # 7 and 6 open sequences with 3 and 4 free; 3 goes where exactly 3 is free, 4 to the other.
    assert sorted(sorted(members) for members in pack([7, 6, 4, 3], 10, seed=0)) == [[0, 3], [1, 2]]


def test_the_seed_decides_which_equally_long_samples_meet():
    assert pack([5] * 40, 10, seed=0) != pack([5] * 40, 10, seed=1)


def test_too_long_a_sample_is_our_own_fault():
    with pytest.raises(ValueError, match="sample 1 has 11 tokens"):
        pack([3, 11], 10, seed=0)


def test_no_token_of_a_packed_sequence_sees_another_sample():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.3, use_cache=False,
        )
    ).eval()  # fmt: skip
    rows = make_rows([9, 4, 7, 12, 3, 5], vocabulary=60)
    packed = Sequences.packed(rows, 16, seed=0)
    alone = Sequences(rows)
    assert any(len(members) > 1 for members in packed.packing)
    options = {
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "sequence_length": 16,
        "seed": 0,
        "rank": 0,
        "num_ranks": 1,
        "pad_token_id": 0,
    }
    packed_batches = GlobalBatches(sequences=packed, **options, fixed_length=True)
    alone_batches = GlobalBatches(sequences=alone, **options)
    labels_packed = labels_alone = 0
    with torch.no_grad():
        for index, members in enumerate(packed.packing):
            batch = packed_batches.collate([index])
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
            labels_packed += label_tokens(batch)
            at = 0
            for member in members:
                single = alone_batches.collate([member])
                length = int(alone.lengths[member])
                expected = model(input_ids=single["input_ids"]).logits[0, :length]
                torch.testing.assert_close(logits[at : at + length], expected, rtol=1e-4, atol=1e-4)
                assert batch["labels"][0, at] == -100
                assert batch["labels"][0, at + 1 : at + length].equal(single["labels"][0, 1:length])
                labels_alone += label_tokens(single)
                at += length
    assert labels_packed == labels_alone == sum([9, 4, 7, 12, 3, 5]) - 6


def test_a_step_counts_the_tokens_of_samples_that_attend_to_each_other():
    """Operations of attention grow with their squares: packed samples cost no more than alone."""
    rows = make_rows([9, 4, 7, 12, 3, 5], vocabulary=60)
    options = {"micro_batch_size": 1, "sequence_length": 16, "seed": 0, "pad_token_id": 0, "rank": 0, "num_ranks": 1}
    for sequences in (Sequences(rows), Sequences.packed(rows, 16, seed=0)):
        mine = GlobalBatches(sequences=sequences, **options, global_batch_size=len(sequences))
        assert sorted(mine.lengths(0).tolist()) == [3, 4, 5, 7, 9, 12]


def test_borders_of_packed_samples_are_as_many_in_every_micro_batch():
    rows = make_rows([9, 4, 7, 12, 3, 5], vocabulary=60)
    packed = Sequences.packed(rows, 16, seed=0)
    options = {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 16, "seed": 0, "pad_token_id": 0}
    mine = GlobalBatches(sequences=packed, **options, rank=0, num_ranks=1, fixed_length=True)
    most = max(len(members) for members in packed.packing)
    for indices in ([0, 1], [1, 2], [2]):
        borders = mine.collate(indices)["cu_seqlens"]
        assert borders.dtype == torch.int32 and borders.shape == (2 * most + 1,)
        sizes = [int(Sequences(rows).lengths[member]) for index in indices for member in packed.packing[index]]
        found = borders.diff()[borders.diff() > 0].tolist()
        assert len(found) == len(sizes) and sum(found) == borders[-1] == 16 * len(indices), (
            "padding is the last sample's"
        )
        assert all(size >= own for size, own in zip(found, sizes))
    assert mine.empty_micro_batch()["cu_seqlens"].diff()[:2].tolist() == [16, 16]
    unpacked = GlobalBatches(sequences=Sequences(rows), **options, rank=0, num_ranks=1)
    assert "cu_seqlens" not in unpacked.collate([0])
