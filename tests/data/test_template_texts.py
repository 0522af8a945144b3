from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_dist.data.template_texts import TemplateTexts, common_length
from tests.data.templates import TEMPLATES, tokenizer_with


@given(st.text(), st.text(), st.text())
def test_common_length(shared, one, other):
    length = common_length(shared + one, shared + other)
    assert length >= len(shared)
    assert (shared + one)[:length] == (shared + other)[:length]
    assert (shared + one)[length : length + 1] != (shared + other)[
        length : length + 1
    ] or shared + one == shared + other


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("a<|im_end|>", "a<|im_start|>", "a"),
        ("a<|im_end|>\n", "a<|im_end|>b", "a<|im_end|>"),
        ("a<think>\n", "a<tool_call>", "a"),
        ("a<think>\n", "a<b>bold", "a"),
        ("a < b", "a < c", "a < "),
    ],
)
def test_texts_agree_in_whole_tokens_and_tags(one, other, shared):
    texts = TemplateTexts(tokenizer_with(TEMPLATES["chatml"]))
    assert one[: texts.agreement(one, other)] == shared
    assert texts.agreement(other, one) == len(shared)
