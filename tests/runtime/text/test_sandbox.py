"""Templates and tokenizers survive the loss of their worker, and the failures of one are its alone."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from krasis.formats.errors import FormatError, ResourceError, UsageError
from krasis.formats.process import worker_process
from krasis.runtime.text.chat import ChatTemplate, Message
from krasis.runtime.text.sandbox import TextSandbox, shared_sandbox
from krasis.runtime.text.template_variables import names_offered
from krasis.runtime.text.tokenizer import Tokenizer
from tests.support.patience import PATIENCE_S

HI = [Message("user", "hi")]
NEST = "{% set a = ['x'] %}" + "{% set a = [a,a,a,a,a,a,a,a,a,a] %}" * 9
REBOUND = (
    "{% with krasis_step = dict %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}"
    "{% endfor %}{% endwith %}"
)


def sound() -> ChatTemplate:
    return ChatTemplate("{{ messages[0].content }}!", {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NEST + "{{ a|tojson }}", "takes more than"),
        (NEST + "{{ a }}", "takes more than"),
        ("{{ ('a' * 10000).translate({97: 'a' * 16000000})|length }}", "MiB of memory"),
        (REBOUND, "more than 250000 steps"),
        ("{{ 'x' * 70000 }}", "writes too much"),
    ],
)
def test_a_failure_is_one_files_alone(source: str, reason: str) -> None:
    other = sound()
    hostile = ChatTemplate(source, {})
    for _ in range(2):
        with pytest.raises(FormatError, match=f"refused the conversation.*{reason}"):
            hostile.render(HI)
        assert other.render(HI) == "hi!"


def test_a_worker_that_was_killed_is_started_anew(tokenizer_json: bytes) -> None:
    template, tokenizer = sound(), Tokenizer(tokenizer_json, 4096)
    ids = tokenizer.encode("the quick")
    pid = shared_sandbox().worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # reaped already: subprocess looks after dropped children
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a signal takes its time
    assert template.render(HI) == "hi!"
    assert tokenizer.encode("the quick") == ids
    assert shared_sandbox().worker_pid != pid


def test_what_is_let_go_is_dropped() -> None:
    sandbox = shared_sandbox()
    template = sound()
    number = template._resident.number
    assert number in sandbox._loaded
    del template
    gc.collect()
    assert sound().render(HI) == "hi!"
    assert number not in sandbox._loaded


def test_many_threads_share_a_worker(tokenizer_json: bytes) -> None:
    template, tokenizer = sound(), Tokenizer(tokenizer_json, 4096)

    def use(number: int) -> bool:
        text = template.render([Message("user", str(number))])
        return tokenizer.decode(tokenizer.encode(text)) == f"{number}!"

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(200)))


def test_the_child_of_a_fork_has_its_own(tokenizer_json: bytes) -> None:
    template = sound()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 17 if template.render(HI) == "hi!" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17
    assert template.render(HI) == "hi!"


def test_a_system_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    template = sound()
    shared_sandbox().close()

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(worker_process.subprocess, "Popen", refuse)
        shared_sandbox().start()  # says nothing yet
        with pytest.raises(ResourceError, match="no worker process can be started"):
            template.render(HI)
    assert template.render(HI) == "hi!"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"[]",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x01\0\0\0\0\0\0\0\xff",
        b"\xff" * 40,
    ],
)
def test_garbage_of_a_worker_is_a_sentence(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, tokenizer_json: bytes
) -> None:
    monkeypatch.setattr(TextSandbox, "load", lambda *_: answer)
    with pytest.raises(FormatError, match="the tokenizer cannot be read"):
        Tokenizer(tokenizer_json, 4096)


def test_variables_must_be_json() -> None:
    with pytest.raises(UsageError, match="JSON"):
        sound().render(HI, variables={"x": object()})  # type: ignore[dict-item]


def test_text_that_is_no_text(tokenizer_json: bytes) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        sound().render([Message("user", "a\udcff")])
    with pytest.raises(UsageError, match="not UTF-8"):
        Tokenizer(tokenizer_json, 4096).encode("a\udcff")


def test_a_tokenizer_that_waits_for_its_text(tokenizer_json: bytes) -> None:
    """Harmless on any probe; ten thousand times the text where it finds its word."""
    record = json.loads(tokenizer_json)
    step = {"type": "Replace", "pattern": {"String": "zq"}, "content": "zqzq"}
    record["normalizer"] = {"type": "Sequence", "normalizers": [step] * 40}
    tokenizer = Tokenizer(json.dumps(record).encode(), 4096)
    assert tokenizer.encode("the quick brown fox")
    with pytest.raises(FormatError, match="fails on this text"):
        tokenizer.encode("zq")
    assert tokenizer.encode("the quick brown fox")


def test_no_threads_are_left(tokenizer_json: bytes) -> None:
    tokenizer = Tokenizer(tokenizer_json, 4096)
    tokenizer.encode("a")
    assert tokenizer._learner is not None
    tokenizer._learner.join(PATIENCE_S)
    assert not tokenizer._learner.is_alive()
    assert tokenizer._byte_level is not None
    assert tokenizer._byte_level.is_complete
    assert threading.active_count() < 20


@pytest.mark.parametrize("source", ["{{ " + "1+" * 90_000 + "x }}", "{{ " + "[" * 50_000, "{% for"])
def test_the_names_of_a_template_that_exhausts_the_parser(source: str) -> None:
    assert names_offered(source) == ()


def test_the_names_of_a_template() -> None:
    source = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ messages }}"
    assert names_offered(source) == ("enable_thinking",)
