# ruff: noqa: E501  one case, one line
"""Chat templates that try to spend without bound, to break out, or to break the parser: by kind, and random
ones."""

from __future__ import annotations

import random

# A list of 10^n references to one element: cheap to hold, dear to write, compare or sort.
_NEST = "{% set a = ['x'] %}" + "{% set a = [a,a,a,a,a,a,a,a,a,a] %}" * 9
_LONG = "{% set s = 'a' * 16000000 %}"
_MANY = "{% set m = ['x', 'y', 'z', 'w'] * 4000000 %}"

_OF_NEST = [
    "a",
    "a|tojson",
    "a|tojson(indent=4)",
    "a ~ ''",
    "a|string|length",
    "a|pprint",
    "a|join(',')",
    "a|escape",
    "a|forceescape",
    "a|trim",
    "a|upper",
    "a|replace('x', 'y')",
    "a|urlencode",
    "a|wordcount",
    "a|striptags",
    "a|map('string')|list|length",
    "a|map('tojson')|join",
    "[a, a]|sort",
    "[a, a]|unique|list",
    "a in [a|list, 1]",
    "{'k': a}|tojson",
    "{'k': a}|string",
    "'%s' % a",
    "'' ~ [a, {'b': a}]",
]
_OF_LONG = [
    "(s, s, s, s, s, s, s, s)|join|length",
    "[s, s, s, s, s, s, s, s, s]|tojson",
    "s|tojson|tojson|tojson|tojson|tojson",
    "[s] * 1000000",
    "([s] * 100)|join(s)",
    "s.join(s)|length",
    "s|list|length",
    "s|upper|lower|title|capitalize|reverse",
    "s|escape ~ s|e",
    "s|urlencode|urlencode|urlencode",
    "s|urlize",
    "s|wordcount",
    "s|striptags",
    "s|truncate(10, leeway=10000000)",
    "s|batch(1)|list|length",
    "s|map('upper')|list|length",
    "s|sort|length",
    "s|unique|list",
    "s|groupby(0)|list",
    "s.split('a')|length",
    "s.encode()|list|length",
    "s.encode() * 100",
    "s.expandtabs(16000000)",
    "('\\t' * 10000).expandtabs(16000000)|length",
    "s.translate({97: s})|length",
    "s.ljust(16000000) ~ s",
    "s.zfill(16777215)",
    "s.replace('', s)|length",
    "s|replace('', s)|length",
    "s.splitlines()|length",
    "s.partition('b')",
    "s.title().swapcase().casefold()",
    "s.count('aa' * 100000)",
    "s.find('a' * 8000000 ~ 'b')",
    "s.isidentifier()",
    "s|int",
    "('9' * 4000000)|int",
    "('9' * 4000000)|float",
    "s.maketrans(s, s)",
    "(s ~ s)|xmlattr",
    "{s: s, 'b': s}|urlencode",
]
_OF_MANY = [
    "m|sort|length",
    "m|unique|list|length",
    "m|groupby(0)|list|length",
    "m|reverse|list|length",
    "m|batch(2)|list|length",
    "m|slice(2000000)|list|length",
    "m|tojson|length",
    "m|join(', ')|length",
    "m|map('upper')|join|length",
    "m|select('string')|list|length",
    "m|reject('none')|list|length",
    "m|list|list|list|length",
    "m + m + m + m + m",
    "m[::-1][::-1][1:][1:]|length",
    "m == m + []",
    "(m, m, m)|sum(start=[])|length",
    "dict(a=m, b=m)|dictsort",
    "m.index('nothing')",
    "m.count('x')",
    "m|max ~ m|min",
]
_SINGLE = {
    "round_ceil": "{{ 1.5|round(1000000000, 'ceil') }}",
    "round_floor": "{{ 1.5|round(400, 'floor') }}{{ 1|round(16000000, 'floor') }}",
    "slices": "{{ [1]|slice(1000000000)|list|length }}",
    "slices_fill": "{{ [1]|slice(10000000, 'x')|list|length }}",
    "batch_fill": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "range": "{{ range(10**12)|list }}",
    "range_sum": "{{ range(9999)|sum }}{{ range(-10**18, 10**18)|length }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "power_chain": "{{ 2 ** 62 ** 62 }}",
    "power_negative": "{{ 2 ** -1000000000 }}",
    "shifted": "{% set n = namespace(x=2) %}{% for i in range(9999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "bytes_format": "{{ ('%9000000000d'.encode() % 1)|length }}",
    "bytes_format_star": "{{ ('%*d'.encode() % (16000000, 1)) * 1000 }}",
    "format_method": "{{ '{:>1000000000}'.format(1) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "format_attribute": "{{ '{0.__class__}'.format(1) }}",
    "format_percent": "{{ '%1000000000d' % 1 }}",
    "format_filter": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "center_filter": "{{ 'a'|center(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big')|length }}",
    "to_bytes_below": "{{ (1).to_bytes(16000000, 'big') * 1000 }}",
    "int_base": "{{ ('f' * 4000000)|int(0, 16) }}",
    "translate": "{{ ('a' * 10000).translate({97: 'a' * 16000000})|length }}",
    "sum_lists": "{% set a = ['x'] * 16000000 %}{{ ([a,a,a,a,a,a,a,a,a,a]*100)|sum(start=[])|length }}",
    "strftime": "{{ strftime_now('%Y' * 4000000)|length }}{{ strftime_now('%c' * 8000000) }}",
    "steps_of_16_mb": (
        "{% for i in range(25) %}{% for j in range(9999) %}{% set x = 'a' * 16000000 %}{% endfor %}{% endfor %}"
    ),
    "strings_add_up": (
        "{% set n = namespace(a=[]) %}{% for i in range(2000) %}"
        "{% set n.a = n.a + [('a' * 16000000) ~ i] %}{% endfor %}"
    ),
    "lists_double": "{% set n = namespace(a=[1]) %}{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "dict_grows": (
        "{% set n = namespace(d={}) %}{% for i in range(9999) %}"
        "{% set n.d = dict(n.d, **{'k' ~ i: i}) %}{% endfor %}{{ n.d|length }}"
    ),
    "join_doubles": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(64) %}{% set n.x = [n.x, n.x]|join %}{% endfor %}"
    ),
    "tojson_doubles": (
        "{% set n = namespace(x='\"') %}{% for i in range(64) %}{% set n.x = n.x|tojson %}{% endfor %}"
    ),
    "escape_grows": "{% set n = namespace(x='&') %}{% for i in range(9999) %}{% set n.x = n.x|forceescape %}{% endfor %}",
    "urlencode_grows": (
        "{% set n = namespace(x='%') %}{% for i in range(9999) %}{% set n.x = n.x|urlencode %}{% endfor %}{{ n.x }}"
    ),
    "nest_deep": "{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = [n.a] %}{% endfor %}{{ n.a }}",
    "nest_deep_json": (
        "{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = [n.a] %}{% endfor %}{{ n.a|tojson }}"
    ),
    "nest_deep_equal": (
        "{% set n = namespace(a=[], b=[]) %}{% for i in range(9999) %}{% set n.a = [n.a] %}"
        "{% set n.b = [n.b] %}{% endfor %}{{ n.a == n.b }}"
    ),
    "nest_deep_hash": (
        "{% set n = namespace(a=()) %}{% for i in range(9999) %}{% set n.a = (n.a,) %}{% endfor %}{{ {n.a: 1} }}"
    ),
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loops_filtered": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "loop_over_text": "{% for c in 'a' * 16000000 %}{% endfor %}",
    "loop_recursive": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "loop_recursive_wide": "{% for i in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
    "loop_cycle": "{% for i in range(9999) %}{{ loop.cycle(*range(9999)) }}{% endfor %}",
    "loop_changed": "{% for i in range(9999) %}{{ loop.changed('a' * 16000000) }}{% endfor %}",
    "macro_recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro_wide": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macro_pair": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro_caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 24
    + "x"
    + "{% endcall %}" * 24,
    "macro_arguments": "{% macro f() %}{{ varargs|length }}{% endmacro %}{{ f(*('a' * 16000000)) }}",
    "block_capture": "{% set x %}"
    + "{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}"
    + "{% endset %}{{ x }}",
    "filter_block": "{% filter upper %}{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}{% endfilter %}",
    "output": "{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}",
    "output_wide": "{% for i in range(9000) %}{{ '\U0001f642' * 10000 }}{% endfor %}",
    "counter_by_with": (
        "{% with krasis_step = dict %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}"
        "{% endfor %}{% endwith %}"
    ),
    "counter_by_set": (
        "{% set krasis_step = dict %}{% set environment = dict %}{% set context = dict %}"
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    ),
    "counter_by_macro": (
        "{% macro krasis_step() %}{% endmacro %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}"
        "{% endfor %}"
    ),
    "counter_by_loop": (
        "{% for krasis_step in [dict] %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}"
        "{% endfor %}{% endfor %}"
    ),
    "range_by_set": "{% set range = dict %}{% macro range(n) %}{% endmacro %}{{ range(10**9) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class_by_attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "class_by_item": "{{ ''['__class__']['__mro__'] }}",
    "class_by_map": "{{ ['']|map(attribute='__class__')|list }}",
    "class_by_groupby": "{{ ['']|groupby('__class__')|list }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals_of_function": "{{ raise_exception.__globals__ }}{{ strftime_now.__globals__ }}",
    "self": "{{ self._TemplateReference__context.environment }}{{ self.__init__ }}",
    "frames": "{{ (messages|map('string')).gi_frame.f_back }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'a': 1}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "extends": "{% extends messages %}",
    "raise": "{{ raise_exception('a' * 16000000) }}",
    "raise_control": "{{ raise_exception('\x1b]0;owned\x07\u202e') }}",
    "undefined": "{{ nothing.attribute.attribute }}",
    "division": "{{ 1 / 0 }}{{ 1 % 0 }}{{ 1 // 0 }}",
    "half_characters": "{{ '\\ud800' }}{{ '\\udcff' * 1000 }}",
    "nothing": "",
    "zeros": "\0" * 100_000,
    "large": "x" * 300_000,
    "cut": "{% for",
    "parentheses": "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}",
    "brackets": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "nots": "{{ " + "not " * 60_000 + "1 }}",
    "minuses": "{{ " + "-" * 90_000 + "1 }}",
    "sum_long": "{{ " + "1+" * 90_000 + "1 }}",
    "tilde_long": "{{ " + "'a'~" * 50_000 + "'b' }}",
    "filters_long": "{{ 'a'" + "|upper" * 40_000 + " }}",
    "attributes_long": "{{ messages" + ".a" * 100_000 + " }}",
    "ifs_deep": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "fors_deep": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "conditions_deep": "{{ " + "1 if 1 else (" * 4000 + "1" + ")" * 4000 + " }}",
    "macros_many": "{% macro f() %}{% endmacro %}" * 8000,
    "name_long": "{{ " + "a" * 250_000 + " }}",
    "outputs_many": "{{ a }}" * 36_000,
    "folded_product": "{{ " + "*".join(["'aaaaaaaaaa'", *["10"] * 12]) + " }}",
    "folded_list": "{{ [0] * 10 * 10 * 10 * 10 * 10 * 10 * 10 * 10 * 10 * 10 * 10 }}",
}
_VALUES = (
    "s",
    "m",
    "a",
    "[s, s, s]",
    "{'k': s}",
    "(m, m)",
    "a|string",
    "'\\t' * 10000",
    "range(9999)",
    "10 ** 15",
)
_STEPS = (
    "|list", "|tojson", "|string", "|join(s)", "|sort", "|unique|list", "|reverse", "|upper", "|map('string')|list",
    "|map('list')|list", "|batch(3)|list", "|slice(999)|list", "|escape", "|urlencode", "|replace('a', 'bbbb')",
    " * 100", " ~ s", " + m", "|sum(start=[])", "|pprint", "|wordcount", "|trim", "|first", "|length",
)  # fmt: skip


def named_templates() -> dict[str, str]:
    """The known kinds."""
    cases = {f"nest: {text}": f"{_NEST}{{{{ {text} }}}}" for text in _OF_NEST}
    cases |= {f"long: {text}": f"{_LONG}{{{{ {text} }}}}" for text in _OF_LONG}
    cases |= {f"many: {text}": f"{_MANY}{{{{ {text} }}}}" for text in _OF_MANY}
    return cases | _SINGLE


def random_templates(count: int, seed: int) -> dict[str, str]:
    """Chains of filters and operators over large values."""
    rng = random.Random(seed)
    cases = {}
    for number in range(count):
        expression = rng.choice(_VALUES)
        for _ in range(rng.randint(1, 6)):
            expression = f"({expression}){rng.choice(_STEPS)}"
        loop = f"{{% for i in range({rng.choice((1, 1, 30, 9999))}) %}}"
        cases[f"random {number}"] = f"{_NEST}{_LONG}{_MANY}{loop}{{{{ {expression} }}}}{{% endfor %}}"
    return cases
