"""The smaller endpoints, keys, and who may ask from where."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import TOOLS, Serve


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_models_with_their_context(serve: Serve, path: str) -> None:
    first, second = serve().get(path).json["data"]
    assert (first["id"], second["id"]) == ("tiny", "other")
    assert first["max_model_len"] == first["context_length"] == first["meta"]["n_ctx"] == 2048
    assert serve().get("/v1/models/tiny").json["id"] == "tiny"
    assert serve().get("/v1/models/none").status == 404


def test_health_and_root(serve: Serve) -> None:
    served = serve()
    assert served.get("/health").json == {"status": "ok"}
    assert served.ask("HEAD", "/").status == 200
    served.service.close()
    assert served.get("/health").status == 503


def test_tokens_there_and_back(serve: Serve) -> None:
    served = serve()
    tokens = served.post("/tokenize", {"content": "Grüße, 世界"}).json["tokens"]
    assert served.post("/detokenize", {"tokens": tokens}).json["content"] == "Grüße, 世界"
    pieces = served.post("/tokenize", {"content": "Hello world", "with_pieces": True}).json["tokens"]
    assert "".join(one["piece"] for one in pieces) == "Hello world"
    assert served.post("/detokenize", {"tokens": [99999]}).status == 400
    assert served.post("/tokenize", {}).status == 400


def test_a_template_is_shown(serve: Serve, qwen3_template: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    text = serve(template=qwen3_template).post("/apply-template", body).json["prompt"]
    assert "get_weather" in text
    assert text.endswith("<|im_start|>assistant")


def test_properties_and_slots(serve: Serve) -> None:
    found = serve().get("/props").json
    assert found["default_generation_settings"]["n_ctx"] == 2048
    assert found["total_slots"] == 1
    assert "im_start" in found["chat_template"]
    assert serve().get("/slots").json[0]["is_processing"] is False


def test_metrics_have_vllms_names(serve: Serve) -> None:
    served = serve()
    served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    text = served.get("/metrics").text
    for line in (
        "krasis_num_requests_running 0.0",
        'krasis_request_success_total{finished_reason="end",model_name="tiny"} 1.0',
        'krasis_time_to_first_token_seconds_count{model_name="tiny"} 1.0',
        "krasis_passes_total 0.0",
        "krasis_prefix_cache_hits_total 0.0",
    ):
        assert line in text
    assert serve(serving={"metrics": False}).get("/metrics").status == 501


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer other"}, 200),
        ({"x-api-key": "secret"}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic secret"}, 401),
        ({"x-api-key": "secret "}, 401),
        ({"x-api-key": "sécret"}, 401),
        ({}, 401),
    ],
)
def test_keys(serve: Serve, headers: dict[str, str], status: int) -> None:
    served = serve(serving={"api_keys": ("secret", "other")})
    reply = served.ask("GET", "/v1/models", None, headers)
    assert reply.status == status
    if status == 401:
        assert reply.json["error"]["type"] == "authentication_error"
    assert served.get("/health").status == 200


@pytest.mark.parametrize(
    ("origin", "origins", "status"),
    [
        ("http://localhost:3000", (), 200),
        ("http://127.0.0.1", (), 200),
        ("http://[::1]:5000", (), 200),
        ("https://evil.example", (), 403),
        ("http://localhost.evil.example", (), 403),
        ("null", (), 403),
        ("http://[", (), 403),
        ("https://app.example", ("https://app.example/",), 200),
        ("https://any.example", ("*",), 200),
    ],
)
def test_scripts_of_other_origins(serve: Serve, origin: str, origins: tuple[str, ...], status: int) -> None:
    served = serve(serving={"cors_origins": origins, "api_keys": ("k",)})
    found = served.ask(
        "OPTIONS", "/v1/chat/completions", None, {"origin": origin, "access-control-request-headers": "x-a"}
    )
    assert found.status == 200
    assert ("access-control-allow-origin" in found.headers) == (status == 200)
    if status == 200:
        assert found.headers["access-control-allow-origin"] == origin
        assert found.headers["access-control-allow-headers"] == "x-a"
    assert served.ask("GET", "/v1/models", None, {"origin": origin, "x-api-key": "k"}).status == status


def test_the_requests_id_comes_back(serve: Serve) -> None:
    assert serve().get("/health", x_request_id="abc").headers["x-request-id"] == "abc"
    assert "x-request-id" not in serve().get("/health").headers


def test_what_is_not_there(serve: Serve) -> None:
    served = serve()
    assert served.get("/nothing").json["error"]["message"]
    assert served.get("/nothing").status == 404
    assert served.get("/v1/chat/completions").status == 405
    assert served.post("/v1/embeddings", {}).json["error"]["type"] == "not_supported_error"


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize"]
)
@pytest.mark.parametrize("value", [None, 5, "x", [], {}, [[]], [{}], {"a": {}}, True, 1e300])
def test_no_field_of_any_kind_breaks_anything(serve: Serve, path: str, value: Any) -> None:
    names = (
        *(
            "messages",
            "prompt",
            "input",
            "tools",
            "tool_choice",
            "stop",
            "stop_sequences",
            "system",
            "max_tokens",
        ),
        *(
            "temperature",
            "logit_bias",
            "response_format",
            "stream_options",
            "chat_template_kwargs",
            "reasoning",
        ),
        *(
            "thinking",
            "text",
            "content",
            "tokens",
            "seed",
            "user",
            "metadata",
            "logprobs",
            "instructions",
            "model",
        ),
    )
    served = serve()
    good = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "input": "Hi", "max_tokens": 3}
    for name in names:
        assert served.post(path, {**good, name: value}).status in (200, 400), name


def test_the_servers_sampling_stands_in_for_what_requests_leave_out(serve: Serve) -> None:
    served = serve(serving={"sampling": {"temperature": 0.0, "seed": 7}})
    hello = [{"role": "user", "content": "Hello"}]
    bodies = {"/v1/chat/completions": "messages", "/v1/messages": "messages", "/v1/responses": "input"}
    for path, name in bodies.items():
        served.post(path, {name: hello, "max_tokens": 2})
        served.post(path, {name: hello, "max_tokens": 2, "temperature": 0.5, "seed": 8})
    for path in ("/v1/completions", "/completion"):
        served.post(path, {"prompt": "Hello"})
        served.post(path, {"prompt": "Hello", "temperature": 0.5, "seed": 8})
    found = [
        (one.sampling.temperature, one.sampling.seed, one.sampling.top_k) for one in served.core.requests
    ]
    assert found == [(0.0, 7, 20), (0.5, 8, 20)] * 5
    params = served.get("/props").json["default_generation_settings"]["params"]
    assert (params["temperature"], params["seed"]) == (0.0, 7)
