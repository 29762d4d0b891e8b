"""What experts of models that people run weigh in 4 bits (4.5 with scales), counted by hand, in GB."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from krasis.formats.checkpoints.hf_config import read_hf_config
from krasis.runtime.planning import sizes_of_shape

CONFIGS = Path(__file__).parents[2] / "formats" / "models" / "configs"
GB = {
    "qwen3.5-35b-a3b": 18, "qwen3.5-122b-a10b": 65, "qwen3.5-397b-a17b": 217, "qwen3-next-80b-a3b": 43,
    "glm-4.5-air": 56, "glm-4.6": 189, "minimax-m2": 126, "gpt-oss-120b": 64, "gpt-oss-20b": 11,
    "gemma-4-26b-a4b": 13, "qwen3.8-flash-next": 68, "deepseek-v3": 368, "kimi-k2.5": 571,
    "glm-4.7-flash": 16, "mistral-small-4": 65, "glm-5": 408, "glm-5.3-flash": 171, "deepseek-v4-flash": 156,
    "deepseek-v4-pro": 870, "step-3.7-flash": 107,
}  # fmt: skip


@pytest.mark.parametrize("name", GB)
def test_a_plan_weighs_the_experts(name: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    sizes = sizes_of_shape(read_hf_config(config, name), None, "cpu-i4-r32-b32")
    assert sizes.cpu_experts_bytes == pytest.approx(GB[name] * 1e9, rel=0.05)
