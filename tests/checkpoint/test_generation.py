"""Which settings of a generation_config.json an export writes, and what is said of the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from transformers import GenerationConfig

from lisa_dist.checkpoint.generation import generation_fields, repaired

ENDS = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}


@pytest.mark.parametrize(
    ("fields", "left_out"),
    [
        (ENDS, {}),
        ({**ENDS, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_return_sequences": 4}, {}),
        ({**ENDS, "their_own_field": {"a": 1}}, {}),
        ({"temperature": 0.9, "top_p": 0.6, **ENDS}, {"temperature": 0.9, "top_p": 0.6}),
        # What allows a setting may follow it.
        ({"temperature": 0.9, "do_sample": True, "max_new_tokens": 0, **ENDS}, {"max_new_tokens": 0}),
        ({**ENDS, "num_return_sequences": 4}, {"num_return_sequences": 4}),
        ({**ENDS, "num_return_sequences": 4, "num_beams": 4}, {}),
        ({**ENDS, "max_new_tokens": 0}, {"max_new_tokens": 0}),
        ({**ENDS, "max_new_tokens": "many"}, {"max_new_tokens": "many"}),
        (
            {**ENDS, "early_stopping": "maybe", "length_penalty": 2.0},
            {"early_stopping": "maybe", "length_penalty": 2.0},
        ),
        ({**ENDS, "cache_implementation": "none_such"}, {"cache_implementation": "none_such"}),
        ({**ENDS, "streamer": "x", "output_scores": True}, {"streamer": "x", "output_scores": True}),
        ({"suppress_tokens": [3], "forced_eos_token_id": 3, **ENDS}, {"forced_eos_token_id": 3}),
    ],
)
def test_only_what_transformers_refuses_is_left_out(
    fields: dict[str, Any], left_out: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    with caplog.at_level(logging.WARNING, "lisa_dist"):
        kept = repaired(fields, "generation_config.json")
    assert list(kept.items()) == [(name, value) for name, value in fields.items() if name not in left_out]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(left_out)
    for name, value in left_out.items():
        assert any(f"{name}={value} is left out" in message for message in said)
    saved = GenerationConfig.from_dict(kept)
    saved.validate(strict=True)
    saved.save_pretrained(tmp_path)


def test_settings_are_found_among_the_fields_of_a_model() -> None:
    fields = {"hidden_size": 48, "temperature": 0.7, "eos_token_id": 2, "pad_token_id": None, "use_cache": False}
    assert generation_fields(fields) == {"temperature": 0.7, "eos_token_id": 2, "use_cache": False}
