"""Programs' own clients against a scripted server: answers, streams, usage, forced calls, errors, retries.

They check what they get by their own types. Those that are not installed (extra ``[clients]``) are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KEY = "secret"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": CITY},
}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
LONG: list[Any] = [{"role": "user", "content": "word " * 3000}]
BUSY: list[Any] = [{"role": "user", "content": "Is 4712 a prime number?"}]
ANSWER = "Hello there."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where the server listens, without a path."""
    command = [sys.executable, "-m", "scripts.outside.scripted_server", "--api-key", KEY, "--context", "2048"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def test_openai_chat(url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    create = client.chat.completions.create
    whole = create(model="any", messages=HELLO)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (ANSWER, "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 4
    *chunks, last = create(model="any", messages=HELLO, stream=True, stream_options={"include_usage": True})
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == ANSWER
    assert last.usage.prompt_tokens_details.cached_tokens > 0
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        called = create(model="any", messages=WEATHER, tools=[TOOL], tool_choice=choice).choices[0]
        assert called.finish_reason == "tool_calls"
        (call,) = called.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="any", messages=HELLO, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
        create(model="any", messages=LONG)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.RateLimitError) as limited:
        client.with_options(max_retries=0).chat.completions.create(model="any", messages=BUSY)
    assert limited.value.response.headers["retry-after"] == "1"
    again = [{"role": "user", "content": "Is 4712 even?"}]
    assert create(model="any", messages=again).choices[0].message.content == ANSWER


def test_openai_responses_and_completions(url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    found = client.responses.create(model="any", input="Hello")
    assert (found.output_text, found.status) == (ANSWER, "completed")
    with client.responses.stream(model="any", input="Hello") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == ANSWER
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    tool = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": False}
    found = client.responses.create(model="any", input=WEATHER, tools=[tool], tool_choice="required")
    assert found.output[-1].type == "function_call"
    assert json.loads(found.output[-1].arguments) == {"city": "Paris"}
    assert client.completions.create(model="any", prompt="Hello").choices[0].text == ANSWER


def test_anthropic(url: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=url, api_key=KEY)
    create = client.messages.create
    whole = create(model="any", max_tokens=50, messages=HELLO)
    assert (whole.content[0].text, whole.stop_reason) == (ANSWER, "end_turn")
    with client.messages.stream(model="any", max_tokens=50, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == ANSWER
        usage = stream.get_final_message().usage
    assert usage.cache_read_input_tokens > 0
    assert usage.output_tokens == whole.usage.output_tokens
    tool = {"name": "get_weather", "input_schema": CITY}
    called = create(model="any", max_tokens=99, messages=WEATHER, tools=[tool], tool_choice={"type": "any"})
    assert (called.stop_reason, called.content[-1].input) == ("tool_use", {"city": "Paris"})
    assert client.messages.count_tokens(model="any", messages=HELLO).input_tokens > 4
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        create(model="any", max_tokens=50, messages=LONG)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="wrong").messages.create(
            model="any", max_tokens=50, messages=HELLO
        )
    busy = [{"role": "user", "content": "Is 4712 odd?"}]
    with pytest.raises(anthropic.RateLimitError):
        client.with_options(max_retries=0).messages.create(model="any", max_tokens=50, messages=busy)
    assert create(model="any", max_tokens=50, messages=busy).content[0].text == ANSWER


def test_langchain(url: str) -> None:
    module = pytest.importorskip("langchain_openai")
    openai = pytest.importorskip("openai")
    model = module.ChatOpenAI(base_url=f"{url}/v1", api_key=KEY, model="any", stream_usage=True)
    whole = model.invoke("Hello")
    assert whole.content == ANSWER
    assert whole.usage_metadata["total_tokens"] > 4
    chunks = list(model.stream("Hello"))
    assert "".join(str(one.content) for one in chunks) == ANSWER
    assert any(one.usage_metadata for one in chunks)
    called = model.bind_tools([TOOL], tool_choice="get_weather").invoke("How is the weather in Paris?")
    assert [(one["name"], one["args"]) for one in called.tool_calls] == [("get_weather", {"city": "Paris"})]
    with pytest.raises(openai.BadRequestError):
        model.invoke("word " * 3000)
    with pytest.raises(openai.AuthenticationError):
        module.ChatOpenAI(base_url=f"{url}/v1", api_key="wrong", model="any").invoke("Hello")


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the internet for prices
    litellm = pytest.importorskip("litellm")
    shared = {"model": "openai/any", "api_base": f"{url}/v1", "api_key": KEY}
    whole = litellm.completion(messages=HELLO, **shared)
    assert whole.choices[0].message.content == ANSWER
    assert whole.usage.total_tokens > 4
    chunks = list(
        litellm.completion(messages=HELLO, stream=True, stream_options={"include_usage": True}, **shared)
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == ANSWER
    called = litellm.completion(messages=WEATHER, tools=[TOOL], tool_choice="required", **shared)
    assert called.choices[0].message.tool_calls[0].function.name == "get_weather"
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=LONG, **shared)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=HELLO, **{**shared, "api_key": "wrong"})
    busy = [{"role": "user", "content": "Is 4712 large?"}]
    assert litellm.completion(messages=busy, num_retries=2, **shared).choices[0].message.content == ANSWER


def test_llm(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    llm = pytest.importorskip("llm")
    entry = {
        "model_id": "served",
        "model_name": "any",
        "api_base": f"{url}/v1",
        "supports_tools": True,
        "api_key_name": "served",
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]), "utf-8")  # JSON is YAML
    model = llm.get_model("served")
    whole = model.prompt("Hello", stream=False, key=KEY)
    assert whole.text() == ANSWER
    assert whole.usage().input > 4
    assert "".join(model.prompt("Hello", stream=True, key=KEY)) == ANSWER
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.AuthenticationError):
        model.prompt("Hello", stream=False, key="wrong").text()
