from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_dist.data.template_texts import TemplateTexts, common_length, opens_by_a_constant
from tests.support.templates import TEMPLATES, tokenizer_with


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


@pytest.mark.parametrize(
    ("template", "constant"),
    [
        ("{% if add_generation_prompt %}a{{ bos_token }}{% elif messages %}b{% endif %}", True),
        ("{% for m in messages %}{% if loop.last and add_generation_prompt %}a{% endif %}{% endfor %}", True),
        ("{% if add_generation_prompt %}{% if enable_thinking is defined %}a{% endif %}{% endif %}", True),
        ("{% for m in messages %}{% generation %}{{ m.content }}{%- endgeneration -%}{% endfor %}", True),
        ("{% if add_generation_prompt and messages | length > 3 %}a{% endif %}", False),
        ("{% if not add_generation_prompt %}a{% endif %}", False),
        ("{{ 'a' if add_generation_prompt }}", False),
        ("{% if add_generation_prompt %}{{ messages[0].role }}{% endif %}", False),
        ("{% set n = namespace(x=1) %}{% if add_generation_prompt %}{{ n.x }}{% endif %}", False),
        ("{% set x = 'a' %}{% if add_generation_prompt %}{% if x %}a{% endif %}{% endif %}", False),
        ("{% macro x() %}{{ tools }}{% endmacro %}{% if add_generation_prompt %}{{ x() }}{% endif %}", False),
        ("{% if add_generation_prompt %}", False),
    ],
)
def test_what_opens_an_answer_is_a_constant_where_no_variable_has_a_part_in_it(template, constant):
    assert opens_by_a_constant(template) == constant
