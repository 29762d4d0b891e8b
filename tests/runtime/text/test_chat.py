"""Chat templates: equal to transformers' rendering, and bounded whatever the template does."""

from __future__ import annotations

import pytest

from krasis.formats.errors import FormatError, UsageError
from krasis.runtime.text.chat import ChatTemplate, Message

TURNS = [
    Message("system", "Be brief."),
    Message("user", "Grüße <|im_end|> 'quoted' & <b>"),
    Message("assistant", "<think>\nhm\n</think>\n\nHi."),
    Message("user", "And?\n"),
]
# What templates of published models do, in small: namespaces, loop controls, string methods, tojson, tests,
# slices.
LIKE_QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' ~ content ~ '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools is none %}{{- {'a': [1, '<é>']} | tojson }}{%- endif %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%-
endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
BLOCKS = """{% for message in messages %}
  {% if message.role == "user" %}
    [{{ message.content.replace('?', '!') | trim }}]{{ eos_token }}
  {% elif loop.last %}{% break %}{% endif %}
{% endfor %}
{% generation %}{{ '=' * 3 }}{% endgeneration %}
{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice(bos_token) }}"""


@pytest.mark.parametrize("source", [LIKE_QWEN3, BLOCKS], ids=["qwen3", "blocks"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_as_transformers_does(source: str, generation_prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = utils.render_jinja_template(
        [messages],
        chat_template=source,
        add_generation_prompt=generation_prompt,
        enable_thinking=False,
        **tokens,
    )
    ours = ChatTemplate(source, tokens).render(
        TURNS, add_generation_prompt=generation_prompt, variables={"enable_thinking": False}
    )
    assert ours == rendered[0]


def test_the_date_is_offered() -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render(TURNS)) == 10


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('only users speak') }}", "only users speak"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for a in range(10**9) %}{% endfor %}", "too l"),
        ("{{ 'a' * 10**9 }}", "too long"),
        ("{{ 10 ** 10 ** 9 }}", "out of range"),
        (
            "{% set n = namespace(x='aaaa') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "long",
        ),
        (
            "{% set n = namespace(x='aaaa') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "long",
        ),
        ("{{ 'a'.ljust(10**12) }}", "too large"),
        ("{{ '{:>1000000000}'.format(1) }}", "format"),
        ("{{ '%1000000000d' % 1 }}", "formatting"),
        ("{{ ('a' * 100000).replace('a', 'b' * 10000) }}", "too long"),
        ("{{ ('a' * 100000) | replace('a', 'b' * 10000) }}", "too long"),
        ("{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}", "too much"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ [].extend([1]) }}", "unsafe"),
        ("{{ {}.clear() }}", "unsafe"),
        ("{{ '{0.__class__}'.format(1) }}", "format"),
        ("{{ '{!r}'.format(1) }}", "format"),
        ("{{ '{0[x]}'.format({'x': 1}) }}", "format"),
        ("{{ '{}{}'.format(1) }}", "no value"),
        ("{{ '{}'.format_map({}) }}", "format"),
        ("{{ 'a' | indent(10000) }}", "indent"),
        ("{{ '[1' | from_json }}", "refused"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ nothing.attribute }}", "undefined"),
        ("{{ messages[0].content + 1 }}", "refused"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_cannot_escape_or_exhaust(source: str, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        ChatTemplate(source, {}).render(TURNS)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% set q = [] %}{{ q.append(1) or '' }}{{ q.append('x') or '' }}{{ q.pop(0) }}{{ q }}", "1['x']"),
        ("{% set d = {'a': 1} %}{% set _ = d.update({'a': 2}) %}{{ d.a }}", "2"),
        ("{{ '<a{}>{x}{0}'.format(':o', x=3) }}{{ '{{}}'.format() }}", "<a:o>3:o{}"),
        ("{{ ('a\n' ~ 'b') | indent(2, true) }}", "  a\n  b"),
        ("{{ ('{\"a\": [1]}' | from_json).a[0] + 1 }}", "2"),
    ],
)
def test_what_templates_of_released_models_need(source: str, text: str) -> None:
    assert ChatTemplate(source, {}).render(TURNS) == text


@pytest.mark.parametrize(
    "source",
    ["{% for", "{{ 'a' | center(10) }}", "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", "x" * 300_000],
    ids=["cut", "center", "deep", "large"],
)
def test_a_broken_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(FormatError, match="chat template"):
        ChatTemplate(source, {})


def test_the_budget_is_per_rendering() -> None:
    template = ChatTemplate(
        "{% for a in range(9999) %}{% for b in range(15) %}{% endfor %}{% endfor %}ok", {}
    )
    assert [template.render(TURNS) for _ in range(3)] == ["ok"] * 3


def test_unknown_roles_are_refused() -> None:
    with pytest.raises(UsageError, match="role"):
        Message("root", "x")
