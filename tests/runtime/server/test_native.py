"""POST /completion, llama.cpp's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError

from .conftest import Serve, says

PATH = "/completion"


def test_a_whole_answer(serve: Serve) -> None:
    served = serve(script=says("one\ntwo"))
    found = served.post(PATH, {"prompt": "Hello", "seed": 7, "stop": ["x"], "return_tokens": True}).json
    assert (found["content"], found["stop"], found["stop_type"], found["has_new_line"]) == (
        "one\ntwo",
        True,
        "eos",
        True,
    )
    assert found["tokens"] == served.service.prompts.tokens("one\ntwo")
    assert found["tokens_predicted"] == len(found["tokens"]) == found["timings"]["predicted_n"]
    assert found["tokens_evaluated"] == len(served.core.requests[0].prompt)
    settings = found["generation_settings"]
    assert (settings["seed"], settings["stop"], settings["n_predict"]) == (7, ["x"], -1)
    assert (found["prompt"], found["truncated"]) == ("Hello", False)
    assert served.core.requests[0].is_plain
    assert served.post("/completions", {"prompt": "Hello"}).json["content"] == "one\ntwo"


def test_a_stream_has_an_event_a_token_and_no_done(serve: Serve) -> None:
    served = serve(script=says("one two three"))
    *parts, last = served.post(PATH, {"prompt": "Hello", "stream": True, "timings_per_token": True}).events
    assert "".join(one["content"] for one in parts) == "one two three"
    ids = [token for one in parts for token in one["tokens"]]
    assert ids == served.service.prompts.tokens("one two three")
    assert [one["stop"] for one in parts] == [False] * len(parts)
    assert [one["timings"]["predicted_n"] for one in parts] == list(range(1, len(parts) + 1))
    assert (last["stop"], last["content"], last["tokens"]) == (True, "", [])


@pytest.mark.parametrize(
    ("body", "word", "stop"),
    [({"n_predict": 2}, "limit", ""), ({"stop": ["two"]}, "word", "two")],
)
def test_why_it_ended(serve: Serve, body: dict[str, Any], word: str, stop: str) -> None:
    found = serve(script=says("one two three")).post(PATH, {"prompt": "Hello", **body}).json
    assert (found["stop_type"], found["stopping_word"]) == (word, stop)


def test_prompts_in_all_their_forms(serve: Serve) -> None:
    served = serve()
    ids = served.service.prompts.tokens("Hello")
    forms: list[Any] = ["Hello", ids, {"prompt_string": "Hello"}]
    for form in forms:
        assert served.post(PATH, {"prompt": form}).status == 200
    assert [one.prompt for one in served.core.requests] == [ids] * 3
    found = served.post(PATH, {"prompt": forms}).json
    assert [one["index"] for one in found] == [0, 1, 2]
    served.post(PATH, {"prompt": [5, 6, "Hello", 7]})
    assert served.core.requests[-1].prompt == [5, 6, *ids, 7]


def test_probabilities_and_chosen_fields(serve: Serve) -> None:
    served = serve(script=says("one two"))
    found = served.post(PATH, {"prompt": "Hello", "n_probs": 3}).json["completion_probabilities"]
    assert [one["id"] for one in found] == served.service.prompts.tokens("one two")
    assert all(len(one["top_logprobs"]) == 3 and one["top_logprobs"][0]["id"] >= 0 for one in found)
    events = served.post(PATH, {"prompt": "Hello", "n_probs": 3, "stream": True}).events[:-1]
    assert all(len(one["completion_probabilities"]) == 1 for one in events)
    body = {"prompt": "Hello", "n_probs": 3, "post_sampling_probs": True}
    (first, *_) = served.post(PATH, body).json["completion_probabilities"]
    assert first["prob"] == pytest.approx(np.exp(-0.5))
    assert len(first["top_probs"]) == 3
    assert served.core.requests[-1].sampled_logprobs
    wanted = ["content", "generation_settings/n_predict", "nothing/there"]
    found = served.post(PATH, {"prompt": "Hello", "n_predict": 5, "response_fields": wanted}).json
    assert found == {"content": "one two", "generation_settings/n_predict": 5}


def test_biases_by_text_and_ends_that_are_ignored(serve: Serve) -> None:
    served = serve()
    ids = served.service.prompts.tokens(" the")
    body = {"prompt": "Hello", "logit_bias": [[" the", -100], [5, 2]], "ignore_eos": True, "n_predict": 3}
    settings = served.post(PATH, body).json["generation_settings"]
    assert served.core.requests[-1].logit_bias == {**dict.fromkeys(ids, -100.0), 5: 2.0}
    assert any(one["bias"] is None for one in settings["logit_bias"])
    served.post(PATH, {"prompt": "Hello", "logit_bias": {" the": False}, "cache_prompt": False})
    assert served.core.requests[-1].logit_bias == dict.fromkeys(ids, -1e9)
    assert not served.core.requests[-1].use_cache


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": None},
        {"prompt": {}},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, {}]},
        {"prompt": [-1, "x"]},
        {"prompt": ["x"] * 129},
        {"prompt": ["x"] * 65, "n": 2},
        {"prompt": {"prompt_string": "x", "multimodal_data": ["y"]}},
        {"prompt": "x", "response_fields": [1]},
        {"prompt": "x", "logit_bias": [["x", "y"]]},
        {"prompt": "x", "n_probs": 50},
    ],
)
def test_what_cannot_be_served_is_refused(serve: Serve, body: Any) -> None:
    reply = serve().post(PATH, body)
    assert reply.status == 400, reply.text


def test_an_error_in_the_stream(serve: Serve) -> None:
    reply = serve(script=lambda _: NativeError("it broke")).post(PATH, {"prompt": "Hello", "stream": True})
    assert "it broke" in reply.events[-1]["error"]["message"]


def test_progress_and_timings_of_chat_and_responses(serve: Serve) -> None:
    flags = {"stream": True, "return_progress": True, "timings_per_token": True}
    served = serve(script=says("one two"))
    chat = served.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], **flags}
    ).events[:-1]
    progress = [one["prompt_progress"] for one in chat if "prompt_progress" in one]
    assert progress[0]["processed"] == progress[0]["cache"] == 0
    assert progress[-1]["processed"] == progress[-1]["total"]
    counted = [one["timings"]["predicted_n"] for one in chat if one["choices"][0]["delta"].get("content")]
    assert counted == sorted(counted)
    assert "timings" not in chat[0]
    events = served.post("/v1/responses", {"input": "Hello", **flags}).events
    assert any("prompt_progress" in one and one["type"] == "response.in_progress" for one in events)
    assert events[-1]["type"] == "response.completed"
    assert "timings" in events[-1]
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    assert all("predicted_n" in one["timings"] for one in deltas)
    plain = served.post("/v1/responses", {"input": "Hello", "stream": True}).events
    assert not any("timings" in one or "prompt_progress" in one for one in plain)


def test_what_the_model_was_asked(serve: Serve) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    path = "/v1/chat/completions"
    served = serve()
    assert "__verbose" not in served.post(path, body).json
    shown = served.post(path, {**body, "verbose": True}).json["__verbose"]["prompt"]
    assert shown == served.post("/apply-template", body).json["prompt"]
    assert "__verbose" in serve(serving={"is_verbose": True}).post(path, body).json


def test_figures_under_llama_cpps_names(serve: Serve) -> None:
    served = serve()
    reply = served.get("/metrics")
    assert "# TYPE llamacpp:n_tokens_max counter\nllamacpp:n_tokens_max 0.0\n" in reply.text
    assert int(reply.headers["process-start-time-unix"]) > 0


def test_slots_can_be_hidden(serve: Serve) -> None:
    assert serve().get("/slots").status == 200
    assert serve(serving={"slots": False}).get("/slots").status == 501
