"""What a chat template of each format of calls writes for an assistant's turn: own, minimal ones, after what
the families document."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jinja2 import Environment, Template

SIGN = "]<]minimax[>["
_LOOP = "{% for c in calls %}"
_JSON = "{{ c.arguments | tojson }}"
_OBJECT = '{"name": "{{ c.name }}", "arguments": ' + _JSON + "}"
_LIST = _LOOP + _OBJECT + "{% if not loop.last %}, {% endif %}{% endfor %}"
_VALUE = "{{ v if v is string else v | tojson }}"
_ITEMS = "{% for k, v in c.arguments.items() %}"


def _dsml(section: str, space: str) -> str:
    mark = "\uff5cDSML\uff5c"
    kind = "{{ 'true' if v is string else 'false' }}"
    return (
        f'<{mark}{section}>\n{_LOOP}<{mark}{space}invoke name="{{{{ c.name }}}}">\n{_ITEMS}'
        f'<{mark}{space}parameter name="{{{{ k }}}}" string="{kind}">{_VALUE}</{mark}{space}parameter>\n'
        f"{{% endfor %}}</{mark}{space}invoke>\n{{% endfor %}}</{mark}{section}>"
    )


_GEMMA = (
    "{% macro value(v) %}{% if v is string %}<|\"|>{{ v }}<|\"|>{% elif v is mapping %}{{ '{' }}"
    "{% for k, w in v.items() %}{{ k }}:{{ value(w) }}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}"
    "{% elif v is sequence %}[{% for w in v %}{{ value(w) }}{% if not loop.last %},{% endif %}{% endfor %}]"
    "{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
    + _LOOP
    + "<|tool_call>call:{{ c.name }}{{ value(c.arguments) }}<tool_call|>{% endfor %}"
)
_NESTED = (
    "{% macro value(v) %}{% if v is mapping %}{% for k, w in v.items() %}S<{{ k }}>{{ value(w) }}S</{{ k }}>"
    "{% endfor %}{% elif v is string %}{{ v }}{% elif v is sequence %}{% for w in v %}S<item>{{ value(w) }}"
    "S</item>{% endfor %}{% else %}{{ v | tojson }}{% endif %}{% endmacro %}S<tool_call>\n"
    + _LOOP
    + 'S<invoke name="{{ c.name }}">{{ value(c.arguments) }}S</invoke>\n{% endfor %}S</tool_call>'
)
_HY = (
    "<tool_callsO>\n"
    + _LOOP
    + "<tool_callO>{{ c.name }}<tool_sepO>\n"
    + _ITEMS
    + "<arg_keyO>{{ k }}</arg_keyO>\n"
    "<arg_valueO>" + _VALUE + "</arg_valueO>\n{% endfor %}</tool_callO>\n{% endfor %}</tool_callsO>"
)
_DEEP = "<\uff5ctool\u2581{}\uff5c>"
_BEGIN, _END = _DEEP.format("calls\u2581begin"), _DEEP.format("calls\u2581end")
_CALL, _CALLED, _SEP = (_DEEP.format(one) for one in ("call\u2581begin", "call\u2581end", "sep"))

TEMPLATES = {
    "hermes": _LOOP + "<tool_call>\n" + _OBJECT + "\n</tool_call>\n{% endfor %}",
    "xml": _LOOP
    + "<tool_call>\n<function={{ c.name }}>\n"
    + _ITEMS
    + "<parameter={{ k }}>\n"
    + _VALUE
    + "\n</parameter>\n{% endfor %}</function>\n</tool_call>\n{% endfor %}",
    "arg_keys": _LOOP
    + "<tool_call>{{ c.name }}\n"
    + _ITEMS
    + "<arg_key>{{ k }}</arg_key>\n<arg_value>"
    + _VALUE
    + "</arg_value>\n{% endfor %}</tool_call>\n{% endfor %}",
    "hy3": _HY.replace("O>", ":opensource>"),
    "minimax": "<minimax:tool_call>\n"
    + _LOOP
    + '<invoke name="{{ c.name }}">\n'
    + _ITEMS
    + '<parameter name="{{ k }}">'
    + _VALUE
    + "</parameter>\n{% endfor %}</invoke>\n{% endfor %}</minimax:tool_call>",
    "minimax_m3": _NESTED.replace("S<", f"{SIGN}<"),
    "dsml": _dsml("function_calls", ""),
    "dsml_v4": _dsml("tool_calls", ""),
    "dsml_v41": _dsml(" calls", " "),
    "kimi": "<|tool_calls_section_begin|>"
    + _LOOP
    + "<|tool_call_begin|>functions.{{ c.name }}:{{ loop.index0 }}"
    "<|tool_call_argument_begin|>" + _JSON + "<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>",
    "deepseek": _BEGIN
    + _LOOP
    + f"{_CALL}function{_SEP}{{{{ c.name }}}}\n```json\n{_JSON}\n```{_CALLED}"
    + "{% if not loop.last %}\n{% endif %}{% endfor %}"
    + _END,
    "deepseek_v31": _BEGIN + _LOOP + f"{_CALL}{{{{ c.name }}}}{_SEP}{_JSON}{_CALLED}" + "{% endfor %}" + _END,
    "gemma": _GEMMA,
    "lfm2": "<|tool_call_start|>[" + _LOOP + "{{ c.name }}(" + _ITEMS + "{{ k }}={{ v | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]"
    "<|tool_call_end|>",
    "cohere": "<|START_ACTION|>[\n"
    + _LOOP
    + '    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.name }}", '
    '"parameters": ' + _JSON + "}{% if not loop.last %},\n{% endif %}{% endfor %}\n]<|END_ACTION|>",
    "mistral": _LOOP + "[TOOL_CALLS]{{ c.name }}[ARGS]" + _JSON + "{% endfor %}",
    "mistral_list": "[TOOL_CALLS][" + _LIST + "]",
    "hunyuan": "<tool_calls>[" + _LIST + "]</tool_calls>",
    "nemotron": "<TOOLCALL>[" + _LIST + "]</TOOLCALL>",
    "granite": "<|tool_call|>[" + _LIST + "]",
    "gigachat": "{# function call<|role_sep|> #}"
    + _LOOP
    + "<|function_call|>"
    + _OBJECT
    + "<|message_sep|>{% endfor %}",
    "llama": "{# <|eot|> #}"
    + _LOOP
    + '{"name": "{{ c.name }}", "parameters": '
    + _JSON
    + "}{% if not loop.last %}; {% endif %}{% endfor %}",
    "harmony": _LOOP
    + " to=functions.{{ c.name }}<|channel|>commentary json<|message|>"
    + _JSON
    + "{% endfor %}",
}
"""Name of a format -> Jinja, of ``calls``. """


@cache
def _compiled(name: str) -> Template:
    environment = Environment(autoescape=False, keep_trailing_newline=True)  # noqa: S701  no HTML
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATES[name])


def written(name: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """What a model writes for calls (name, arguments)."""
    return _compiled(name).render(calls=[{"name": one, "arguments": values} for one, values in calls])
