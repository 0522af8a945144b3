"""Which weights a checkpoint writes, and which earlier ones it depends on; without tensors, ranks or files."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lisa_dist.checkpoint.changes import ChangedWeights, CheckpointPlan, plan_of_checkpoint

WEIGHTS = ["embeddings", "block 0", "block 1", "block 2"]


def save(changes: ChangedWeights, name: str, *trained: str) -> CheckpointPlan:
    """Begin a checkpoint that is complete at once."""
    plan = changes.begin(name, WEIGHTS, trained)
    changes.complete(plan)
    return plan


def test_the_first_and_every_nth_are_full() -> None:
    changes = ChangedWeights(full_every=3)
    plans = [save(changes, f"step {step}", "block 0") for step in range(7)]
    assert [plan.written == set(WEIGHTS) for plan in plans] == [step % 3 == 0 for step in range(7)]
    assert [plan.since_full for plan in plans] == [0, 1, 2, 0, 1, 2, 0]
    assert all(save(ChangedWeights(1), f"step {step}").depends_on == [] for step in range(2))


def test_between_are_those_that_trained_since_the_one_before() -> None:
    changes = ChangedWeights(full_every=9)
    changes.note_trained(["block 0"])
    save(changes, "a", "block 0")
    changes.note_trained(["block 1"])
    after_a_switch = save(changes, "b", "block 1")
    assert after_a_switch.written == {"block 0", "block 1"}, "block 0 trained on after a was written"
    assert after_a_switch.external == {"a": ["embeddings", "block 2"]}
    later = save(changes, "c", "block 1")
    assert later.written == {"block 1"}
    assert later.external == {"a": ["embeddings", "block 2"], "b": ["block 0"]}
    assert later.depends_on == ["a", "b"]


def test_after_one_that_failed_the_next_holds_what_it_would_have_held() -> None:
    changes = ChangedWeights(full_every=9)
    save(changes, "a")
    changes.note_trained(["block 0"])
    assert changes.begin("b", WEIGHTS, ["block 0"]).written == {"block 0"}  # and is never complete
    changes.note_trained(["block 1"])
    plan = save(changes, "c", "block 1")
    assert plan.written == {"block 0", "block 1"} and plan.depends_on == ["a"]


def test_after_a_first_one_that_failed_the_next_is_full() -> None:
    changes = ChangedWeights(full_every=9)
    changes.begin("a", WEIGHTS, [])
    assert save(changes, "b").written == set(WEIGHTS)


def test_what_is_switched_while_one_is_written_is_in_the_next() -> None:
    changes = ChangedWeights(full_every=9)
    save(changes, "a")
    changes.note_trained(["block 0"])
    written = changes.begin("b", WEIGHTS, ["block 0"])
    changes.note_trained(["block 1"])
    changes.complete(written)
    changes.note_trained(["block 2"])
    assert save(changes, "c", "block 2").written == {"block 0", "block 1", "block 2"}


def test_a_weight_that_no_checkpoint_holds_is_written() -> None:
    changes = ChangedWeights(full_every=9)
    changes.complete(changes.begin("a", WEIGHTS[:2], []))
    assert save(changes, "b").written == set(WEIGHTS[2:])


def test_one_that_is_replaced_is_no_base() -> None:
    """A run that was taken back to an earlier step writes a later one anew: its old files will not be there."""
    changes = ChangedWeights(full_every=9)
    save(changes, "a")
    save(changes, "b", "block 0")
    assert save(changes, "b").written == {"block 0"}
    full = ChangedWeights(full_every=9)
    save(full, "a")
    assert save(full, "a").written == set(WEIGHTS)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.sets(st.sampled_from(WEIGHTS))),
        st.tuples(st.sampled_from(["begin", "complete", "fail", "resume"]), st.just(set())),
    ),
    max_size=40,
)


@given(full_every=st.integers(1, 4), events=EVENTS)
def test_every_complete_checkpoint_gives_the_weights_back(full_every: int, events: list[tuple[str, set[str]]]) -> None:
    """Blocks are switched, checkpoints fail or end late, runs are cut off and resumed, in any order."""
    changes, trained = ChangedWeights(full_every), set[str]()
    now = dict.fromkeys(WEIGHTS, 0)  # how often each weight changed
    files: dict[str, dict[str, int]] = {}  # of complete checkpoints: what their own files hold
    newest: tuple[CheckpointPlan, dict[str, int], set[str]] | None = None  # as it was begun
    writing: tuple[CheckpointPlan, dict[str, int], set[str]] | None = None

    def let_train() -> None:
        now.update({weight: now[weight] + 1 for weight in trained})

    for number, (event, blocks) in enumerate(events):
        if event == "train":
            trained = blocks
            changes.note_trained(trained)
        elif event == "begin":
            plan = changes.begin(f"{number}", WEIGHTS, trained)
            writing = plan, dict(now), set(trained)
        elif event == "complete" and writing is not None:
            newest, writing = writing, None
            plan, then, _ = newest
            changes.complete(plan)
            files[plan.name] = {weight: then[weight] for weight in plan.written}
            assert {weight: files[base][weight] for weight, base in plan.base_checkpoint_of.items()} == then
        elif event == "fail":
            writing = None
        elif event == "resume" and newest is not None:
            plan, then, trained = newest
            now, writing, changes = dict(then), None, ChangedWeights(full_every)
            again = plan_of_checkpoint(plan.name, WEIGHTS, plan.external, plan.since_full)
            assert again == plan
            changes.continue_from(again, trained)
        let_train()
