"""Chat templates come with a model and are programs: they end, stay small, touch nothing, or are refused in a line."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.errors import BadPrompt
from workbench.models import load
from workbench.models.chat_template import render

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hi there \n"},
    {"role": "assistant", "content": "<think>so</think> yes"},
    {"role": "user", "content": "e\u0301 <b>&amp;</b> 🙂"},
]
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STATEFUL = """
{%- set ns = namespace(found=false, text='') -%}
{%- for m in messages if m.role != 'system' -%}
    {%- generation -%}{{ m.content.split('</think>')[-1].strip() ~ '|' ~ loop.index }}{%- endgeneration -%}
    {%- set ns.found = true -%}{%- if loop.last %}{{ bos_token }}{% break %}{% endif -%}
{%- else -%}none{%- endfor -%}
{{ ns.found }} {{ messages | tojson(indent=2) }} {{ tools is none }} {{ '%s-%d' % ('a', 3) }}
"""
FUNCTIONAL = (
    "{% macro f(x, n=2) %}<{{ x | upper | trim }}{{ n * 3 + 1 }}>{% endmacro %}{{ f(messages[0].content) }}"
    "{% for a, b in messages[0].items() %}{{ a }}={{ b }};{% endfor %}"
    "{{ messages | map(attribute='role') | join(', ') }}"
    "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.length }}{% endfor %}{{ range(3) | list }}"
    "{{ messages[::-1] | length }}{{ 'ab' * 3 }}{{ 'aba' | replace('a', 'cc') }}{{ '{} {}'.format(1, 'b') }}"
    "{{ {'a': [1]} }}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load("workbench-tiny", device="cpu").tokenizer


def rendered(tokenizer: Any, template: str) -> str:
    return render(tokenizer, TALK, generate=True, chat_template=template)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("template", [None, CHATML, STATEFUL, FUNCTIONAL, "plain", "{{ messages[9] }}"])
def test_the_text_is_the_one_transformers_makes(tokenizer: Any, template: str | None, generate: bool) -> None:
    options = {} if template is None else {"chat_template": template}
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate, **options)
    assert render(tokenizer, TALK, generate=generate, **options) == expected


LOOP = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(70) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x | length }}"
)


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{{ range(99999) | map('string') | sort | length }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(BadPrompt, match="did not end"):
        rendered(tokenizer, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ ['x'] * 10 ** 10 }}",
        "{{ ['x' * 1000000] * 1000000 }}",
        "{{ (['x' * 1000000] * 1000000) | join }}",
        "{{ range(99999) | join('x' * 10000) }}",
        "{{ range(99999) | map('string') | join('x' * 10000) }}",
        "{{ ('x' * 10000).join(range(99999) | map('string')) }}",
        DOUBLED % ("'aa'", "ns.x ~ ns.x"),
        DOUBLED % ("'aa'", "ns.x + ns.x"),
        DOUBLED % ("['a']", "ns.x + ns.x"),
        DOUBLED % ("['a']", "[ns.x, ns.x]"),
        DOUBLED % ("['a']", "(ns.x, ns.x)"),
        DOUBLED % ("3", "ns.x * ns.x"),
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 9999999999) }}",
        "{{ 'x'.center(10 ** 10) }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ ('a' * 10000) | replace('a', 'b' * 10000) }}",
        "{{ ('a' * 10000).replace('', 'b' * 10000) }}",
        "{{ ('\t' * 100000).expandtabs(100000) }}",
        "{{ ('a\n' * 100000) | indent(100000) }}",
        "{{ messages | tojson(indent=999999999) }}",
        "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        "x" * (1 << 21),
    ],
)
def test_a_template_that_makes_something_huge_is_refused_before_it_is_made(tokenizer: Any, template: str) -> None:
    with pytest.raises(BadPrompt, match=r"characters"):
        rendered(tokenizer, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ nothing.there }}",
        "{% if %}",
        "{% for x in messages %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% include 'x' %}",
        "{{ 1 // 0 }}",
        "{{ messages | nosuchfilter }}",
    ],
)
def test_a_template_that_fails_is_one_line(tokenizer: Any, template: str) -> None:
    with pytest.raises(BadPrompt) as caught:
        rendered(tokenizer, template)
    assert "\n" not in str(caught.value)
    assert "chat=False" in str(caught.value)


def test_a_tokenizer_without_a_template_is_a_bad_prompt() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(BadPrompt, match="template"):
        render(bare, TALK, generate=False)
