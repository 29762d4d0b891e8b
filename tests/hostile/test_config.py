"""config.json files that lie: parsed strictly, and no size goes unbounded."""

import json

import pytest
from format_builders import hf_config

from krasis.formats.architecture import from_hf_config
from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.limits import MAX_CONFIG_BYTES
from krasis.formats.strict_json import parse_json_object


def config(**changes):
    return json.dumps(hf_config(**changes)).encode()


CASES = {
    "config_of_billions_of_layers": (
        config(num_hidden_layers=10**12),
        FormatError,
        ["num_hidden_layers", "1..10000"],
    ),
    "config_with_a_size_beyond_64_bits": (config(hidden_size=10**30), FormatError, ["64 bits"]),
    "config_with_negative_heads": (config(num_attention_heads=-4), FormatError, ["num_attention_heads"]),
    "config_with_zero_heads_and_no_head_size": (
        config(num_attention_heads=0, head_dim=...),
        FormatError,
        ["num_attention_heads"],
    ),
    "config_with_infinite_theta": (config(rope_theta=1e300 * 1e300), FormatError, ["Infinity is not JSON"]),
    "config_with_text_for_a_size": (config(vocab_size="100"), FormatError, ["vocab_size", "integer"]),
    "config_with_an_object_for_a_size": (
        config(vocab_size={"a": [1] * 1000}),
        FormatError,
        ["vocab_size", "integer"],
    ),
    "config_with_keys_twice": (
        b'{"model_type": "qwen3_moe", "model_type": "x"}',
        FormatError,
        ["'model_type' occurs twice"],
    ),
    "config_of_an_unknown_model": (
        config(model_type="evil\x1b[2J" + "x" * 10_000),
        UnsupportedModelError,
        ["qwen3_moe", "\\x1b"],
    ),
    "config_with_remote_code": (
        b'{"auto_map": {"AutoConfig": "evil.py--Config"}}',
        UnsupportedModelError,
        ["model_type"],
    ),
    "config_nested_too_deeply": (b'{"a":' * 50_000, FormatError, ["nested too deeply"]),
    "config_with_nested_rope_bomb": (
        config(rope_scaling={"rope_type": "yarn", "factor": 1e308}),
        FormatError,
        ["rope_scaling", "factor"],
    ),
    "config_larger_than_any_config": (
        b'{"a": "' + b"x" * MAX_CONFIG_BYTES + b'"}',
        FormatError,
        ["too long"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_lying_configs(case, refuses):
    data, error, parts = CASES[case]

    def read():
        record = parse_json_object(data, "dir/config.json", max_bytes=MAX_CONFIG_BYTES)
        from_hf_config(record, "dir/config.json")

    refuses(read, *parts, header_bytes=len(data), error=error, where="dir/config.json")
