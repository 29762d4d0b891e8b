"""GET /openapi.json."""

from __future__ import annotations

from typing import Any

from starlette.routing import Route

from krasis.runtime.server.app import make_app

from .conftest import Serve

# What a schema's fields can be, to make a body of.
EXAMPLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 4,
    "prompt": "Hello",
    "input": "Hello",
    "content": "Hello",
    "tokens": [5],
    "filename": "a",
}


def test_it_describes_the_paths_that_there_are(serve: Serve) -> None:
    served = serve()
    found = served.get("/openapi.json").json
    assert found["openapi"].startswith("3.1")
    gate: Any = make_app(served.service)
    known = {
        (route.path.replace(":path", ""), method.lower())
        for route in gate._app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    described = {(path, method) for path, one in found["paths"].items() for method in one}
    assert described <= known
    assert ("/v1/chat/completions", "post") in described


def test_what_it_requires_is_enough(serve: Serve) -> None:
    served = serve()
    for path, one in served.get("/openapi.json").json["paths"].items():
        if "post" not in one or "{" in path:
            continue
        schema = one["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = {name: EXAMPLES[name] for name in schema["required"]}
        assert served.post(path, body).status == 200, path
        for name in schema["required"]:
            if name != "max_tokens":  # Anthropic's, which is not insisted on here
                left = {key: value for key, value in body.items() if key != name}
                assert served.post(path, left).status == 400, (path, name)


def test_keys(serve: Serve) -> None:
    served = serve(serving={"api_keys": ("k",)})
    assert served.get("/openapi.json").status == 401
    assert served.get("/openapi.json", x_api_key="k").json["security"] == [{"bearer": []}]


def test_what_is_switched_off_is_not_described(serve: Serve) -> None:
    paths = serve(serving={"slots": False, "metrics": False}).get("/openapi.json").json["paths"]
    assert not {"/slots", "/slots/{number}", "/metrics"} & set(paths)
