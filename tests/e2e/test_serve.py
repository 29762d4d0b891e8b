"""krasis-serve on the trained model: answers like krasis-run's, prefixes that outlive it, errors in a
sentence."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from krasis.runtime.engine import Engine
from krasis.runtime.settings import SamplingSettings
from tests.support.patience import PATIENCE_S

COMMAND = [
    sys.executable,
    "-c",
    "from krasis.runtime.server.command import main; main(prog_name='krasis-serve')",
]
HELLO = [{"role": "user", "content": "What does json.dumps do, and how is it not json.dump? " * 3}]


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[int]:
    """The port of a server, which is ended in order."""
    command = [*COMMAND, str(bundle), "--port", "0", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)):
                assert line, "the server ended"
                line = process.stderr.readline()
            yield int(found[1])
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def post(port: int, path: str, body: Any) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("POST", path, json.dumps(body))
    reply = connection.getresponse()
    found = json.loads(reply.read())
    connection.close()
    assert reply.status == 200, found
    return found


def test_answers_and_perplexity_are_the_engines_and_prefixes_outlive_it(
    trained_bundle: Path, tmp_path: Path
) -> None:
    greedy = SamplingSettings()
    with Engine.open(trained_bundle) as engine:
        answer = "".join(piece.text for piece in engine.generate(HELLO, greedy, max_tokens=40))
        ids = engine.encode("import json\nprint(json.dumps({}))\n")
        engine.reset()
        logits = engine.prefill(ids, all_logits=True).astype(np.float64)
    expected = [row[token] - np.logaddexp.reduce(row) for row, token in zip(logits, ids[1:], strict=False)]
    chat = {"messages": HELLO, "temperature": 0, "max_tokens": 40}
    with served(trained_bundle, "--prefix-dir", str(tmp_path / "prefixes")) as port:
        first = post(port, "/v1/chat/completions", chat)
        body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        scores = post(port, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    assert first["choices"][0]["message"]["content"] == answer
    assert scores[0] is None
    np.testing.assert_allclose(scores[1 : len(ids)], expected, rtol=0, atol=1e-6)
    with served(trained_bundle, "--prefix-dir", str(tmp_path / "prefixes")) as port:
        again = post(port, "/v1/chat/completions", chat)
    assert again["choices"][0]["message"]["content"] == answer
    usage = again["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 1
