"""Templates and tokenizers used by several threads at once."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from krasis.runtime.text.chat import ChatTemplate, Message
from krasis.runtime.text.tokenizer import Tokenizer
from tests.support.patience import PATIENCE_S


def test_each_rendering_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four at a time that take 1,000 steps each, of 2,500 that one may take."""
    monkeypatch.setattr("krasis.runtime.text.template_sandbox.MAX_STEPS", 2500)
    loop = "{% for i in range(1000) %}{% set x = i * 2 %}{% endfor %}"
    template = ChatTemplate(loop + "{{ messages[0].content }}", {})
    begin = threading.Barrier(4)

    def render(number: int) -> list[str]:
        texts = []
        for _ in range(20):
            begin.wait(PATIENCE_S)
            texts.append(template.render([Message("user", f"question {number}")]))
        return texts

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(render, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert found == [[f"question {number}"] * 20 for number in range(4)]


def test_threads_get_the_tokens_of_their_own_text(tokenizer: Tokenizer) -> None:
    texts = [f"the quick brown fox {n} 🦉 jumps" * 20 for n in range(8)]

    def there_and_back(text: str) -> tuple[list[int], str]:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        return ids, "".join(map(stream.push, ids)) + stream.finish()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(there_and_back, texts * 3))
    assert found == [there_and_back(text) for text in texts * 3]
    assert [text for _, text in found] == texts * 3
