"""What holds for every sampler: a state through JSON, and the same draws after a resume."""

import dataclasses
import json

import pytest

from lisa_dist.config.loading import conf_dir, load
from lisa_dist.config.sampling import SAMPLER_CONFIGS
from lisa_dist.method.sampling import SAMPLERS, build_sampler

NUM_BLOCKS = 9
VARIANTS = [
    *[(name, {}) for name in SAMPLER_CONFIGS if name != "fixed"],
    ("fixed", {"blocks": [1, 4]}),
    ("weighted", {"law": "weight_norm"}),
    ("sweep", {"order": "random"}),
    ("outlier", {"reverse": True}),
    ("gradient", {"probe_every": 3}),
    ("bandit", {"active_layers": 1}),
    ("bandit", {"active_layers": 5}),
]


def make(name, settings):
    return build_sampler(SAMPLER_CONFIGS[name](seed=11, **settings), NUM_BLOCKS)


def run(sampler, periods):
    drawn = []
    for period in periods:
        if sampler.wants_probe(period):
            size = len(sampler.request().settings.get("sets", range(NUM_BLOCKS)))
            sampler.observe([1.0 + (7 * index + 3 * period) % 5 for index in range(size)])
        drawn.append((sampler.draw(period), sampler.scores()))
        if sampler.observes_steps:
            sampler.observe_step({block: 1.0 + (5 * block + period) % 3 for block in sampler.active})
    return drawn


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_sampler_draws_as_if_it_had_not_stopped(name, settings, cut):
    whole = run(make(name, settings), range(12))
    first = make(name, settings)
    run(first, range(cut))
    state = json.loads(json.dumps(first.state_dict()))
    resumed = make(name, settings)
    resumed.load_state_dict(state)
    assert run(resumed, range(cut, 12)) == whole[cut:]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_draws_are_sorted_different_and_as_many_as_announced(name, settings):
    sampler = make(name, settings)
    for blocks, _ in run(sampler, range(10)):
        assert blocks == sorted(set(blocks))
        assert len(blocks) == sampler.num_active
        assert set(blocks) <= set(range(NUM_BLOCKS))


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_state_dict_is_a_snapshot(name, settings):
    sampler = make(name, settings)
    run(sampler, range(2))
    state, scores = sampler.state_dict(), sampler.scores()
    before = json.dumps([state, scores])
    run(sampler, range(2, 6))
    if sampler.probe is not None:
        sampler.request()
    assert json.dumps([state, scores]) == before


def test_a_probe_that_nobody_asked_for_is_refused():
    with pytest.raises(TypeError, match="UniformSampler needs no probe"):
        make("uniform", {}).observe([1.0] * NUM_BLOCKS)


def test_a_step_that_nobody_observes_is_refused():
    with pytest.raises(TypeError, match="UniformSampler observes no steps"):
        make("uniform", {}).observe_step({0: 1.0})


def test_every_sampler_has_a_schema_and_a_preset():
    assert set(SAMPLERS) == set(SAMPLER_CONFIGS)
    assert {path.stem for path in (conf_dir() / "sampler").glob("*.yaml")} == set(SAMPLERS)
    for name, schema in SAMPLER_CONFIGS.items():
        assert type(load([f"sampler={name}"]).sampler) is schema
        assert next(field.default for field in dataclasses.fields(schema) if field.name == "name") == name
