"""krasis-serve's page in a real browser: it sends, streams, stops, folds thoughts, and nothing that a model
writes becomes anything but text.

    apt-get install chromium; pip install 'krasis-bundle[serve]' pytest playwright
    pytest scripts/outside/page

``KRASIS_BROWSER`` names another browser of Chromium's kind, ``KRASIS_SHOTS`` a folder for pictures.
"""

# ruff: noqa: S101  these are tests
from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from .conftest import Serve, is_over, picture, say

Visit = Callable[..., Page]

ANSWER = """<think>
The reader wants an **overview**. I will be brief.
</think>

## Two ways to sort

A *stable* sort keeps equal items in their order. In Python, `sorted` is stable:

```python
def by_length(words: list[str]) -> list[str]:
    return sorted(words, key=len)  # stable, O(n log n)
```

1. **Merge sort** splits the list in halves
   - sorts each of them,
   - and merges what comes out.
2. **Quicksort** chooses a pivot. See [the article](https://en.wikipedia.org/wiki/Quicksort "Quicksort").

| algorithm | worst case | stable |
| :--- | ---: | :---: |
| merge sort | n log n | yes |
| quicksort | n² | no |

> Which one is faster depends on the data.

- [x] explained
- [ ] measured
"""

HOSTILE = """<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 2"> <svg onload="window.pwned = 3">
[one](javascript:window.pwned=4) [two](JaVaScRiPt&#58;alert(1)) [three](java\tscript:alert(1))
[four](data:text/html,<script>window.pwned=5</script>) [five](vbscript:x) [six](//evil.example/x)
[seven](/v1/models) [eight](file:///etc/passwd) [nine](blob:http://127.0.0.1/x) <javascript:window.pwned=6>
![picture](https://evil.example/picture.png) ![picture](javascript:window.pwned=7)
[good](https://good.example/a?b=1&c=2) https://bare.example/path. <https://angle.example/>

```html" onmouseover="window.pwned = 8
</code></pre><script>window.pwned = 9</script>
```

| <b>a</b> | <iframe src="https://evil.example"></iframe> |
|---|---|
| <style>*{display:none}</style> | `<script>window.pwned = 10</script>` |

<form action="https://evil.example"><input name=q></form> <a href="javascript:alert(1)">x</a>
"""


def test_it_sends_streams_and_shows_markdown(serve: Serve, visit: Visit) -> None:
    served = serve(ANSWER, token_s=0.004)
    page = visit(served)
    expect(page.locator("#model")).to_have_text("krasis")
    expect(page.locator("#facts")).to_contain_text("2,048 tokens of context")
    picture(page, "welcome")
    say(page, "Compare two ways to sort.\nBriefly.")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator(".said")).to_have_text("Compare two ways to sort.\nBriefly.")
    is_over(page)
    text = page.locator(".assistant > .text")
    expect(text.locator("h3")).to_have_text("Two ways to sort")
    expect(text.locator("figure.code code")).to_contain_text("return sorted(words, key=len)")
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol > li ul > li")).to_have_count(2)
    expect(text.locator("tbody tr")).to_have_count(2)
    expect(text.locator("td.right").first).to_have_text("n log n")
    expect(text.locator("a")).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(text.locator("input[type=checkbox]")).to_have_count(2)
    thoughts = page.locator("details.thoughts")
    assert thoughts.get_attribute("open") is None
    expect(thoughts.locator("summary")).to_contain_text("Thought")
    thoughts.locator("summary").click()
    expect(thoughts.locator("strong")).to_have_text("overview")
    expect(page.locator(".stats")).to_contain_text("tokens/s")
    page.locator("#scroll").evaluate("node => node.scrollTop = 0")
    picture(page, "answer")
    hosts = {one.url.split("/")[2] for one in served.requests}
    assert hosts == {served.url.split("/")[2]}


def test_it_stops_and_goes_on_and_keeps_conversations(serve: Serve, visit: Visit) -> None:
    served = serve("word " * 2000, token_s=0.02)
    page = visit(served)
    say(page, "Count <b>for</b> ever")
    expect(page.locator(".assistant > .text")).to_contain_text("word word")
    page.keyboard.press("Escape")
    is_over(page)
    expect(page.locator(".stats")).to_contain_text("Stopped")
    ends = time.monotonic() + 5
    while not served.core.tickets[0].cancelled.is_set():
        assert time.monotonic() < ends
        time.sleep(0.02)
    before = page.locator(".assistant > .text").inner_text()
    page.reload()
    expect(page.locator("#chats li")).to_have_text(["Count <b>for</b> ever✕"])
    page.locator("#chats .chat").click()
    expect(page.locator(".assistant > .text")).to_have_text(before)
    served.core.script = lambda _: " and on."
    page.get_by_role("button", name="Continue").click()
    is_over(page)
    expect(page.locator(".assistant > .text")).to_have_text(before.rstrip() + " and on.", use_inner_text=True)
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#chats li").hover()
    page.get_by_role("button", name="Delete “Count <b>for</b> ever”").click()
    expect(page.locator("#chats li")).to_have_count(0)
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('chat'))") == []


def test_an_answer_that_its_window_ends_can_be_gone_on_with(serve: Serve, visit: Visit) -> None:
    page = visit(serve("word " * 2000, token_s=0.02))
    say(page, "Count")
    expect(page.locator(".assistant > .text")).to_contain_text("word word")
    page.reload()
    page.locator("#chats .chat").click()
    expect(page.locator(".stats")).to_contain_text("Stopped")
    expect(page.locator(".assistant > .text")).to_contain_text("word word")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_answers_go_on_in_other_conversations(serve: Serve, visit: Visit) -> None:
    served = serve("one " * 60, token_s=0.02)
    page = visit(served)
    say(page, "First")
    expect(page.locator(".assistant > .text")).to_contain_text("one one")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    served.core.script = lambda _: "two"
    say(page, "Second")
    is_over(page)
    page.locator("#chats .chat", has_text="First").click()
    is_over(page)
    assert page.locator(".assistant > .text").inner_text().split() == ["one"] * 60


def test_edited_and_repeated_questions(serve: Serve, visit: Visit) -> None:
    served = serve("Yes.")
    page = visit(served)
    for words in ("First", "Second"):
        say(page, words)
        is_over(page)
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.locator(".edit").fill("Other")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".said")).to_have_text(["Other"])
    is_over(page)
    page.get_by_role("button", name="Again").click()
    is_over(page)
    decode = served.core.assets.tokenizer.decode
    third, last = (decode(list(one.prompt), skip_special=False) for one in served.core.requests[2:])
    assert third == last
    assert "Other" in last
    assert "First" not in last


def test_settings_reach_the_server(serve: Serve, visit: Visit) -> None:
    served = serve("<think>\nHm.\n</think>\n\n" + "word " * 50)
    page = visit(served)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be terse.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Longest answer, in tokens").fill("12")
    page.get_by_label("Thinking").select_option("on")
    page.get_by_label("Colours").select_option("dark")
    picture(page, "settings")
    page.get_by_role("button", name="Save").click()
    say(page, "Hello")
    is_over(page)
    request = served.core.requests[-1]
    prompt = served.core.assets.tokenizer.decode(list(request.prompt), skip_special=False)
    assert "<|im_start|>system\nBe terse." in prompt
    assert prompt.rstrip().endswith("<think>")
    assert (request.sampling.temperature, request.max_tokens) == (0.25, 12)
    expect(page.locator(".stats")).to_contain_text("Cut at its longest")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_nothing_a_model_writes_is_more_than_text(serve: Serve, visit: Visit) -> None:
    served = serve("<think>\n" + HOSTILE + "</think>\n\n" + HOSTILE, context=4096)
    page = visit(served)
    say(page, HOSTILE)
    is_over(page)
    page.locator("details.thoughts summary").click()
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    messages = page.locator("#messages")
    for name in ("script", "img", "svg", "iframe", "style", "form", "b", "object", "embed", "link", "base"):
        expect(messages.locator(name)).to_have_count(0)
    links = [one.get_attribute("href") for one in page.locator(".assistant > .text a").all()]
    assert links == [
        "https://evil.example/picture.png",
        "https://good.example/a?b=1&c=2",
        "https://bare.example/path",
        "https://angle.example/",
        "https://evil.example/",  # inside what would be a frame, and a form: words
        "https://evil.example/",
    ]
    attributes = page.evaluate("""() => [...new Set([...document.querySelectorAll("#messages *")]
        .flatMap((node) => node.getAttributeNames()))]
        .filter((name) => name.startsWith("on") || ["style", "id", "name", "src"].includes(name))""")
    assert attributes == []
    assert all(one.url.startswith(served.url) for one in served.requests)
    picture(page, "hostile")


def test_the_policy_holds_in_the_browser(serve: Serve, visit: Visit) -> None:
    served = serve("Hi.")
    page = visit(served)
    refused = page.evaluate("""async () => {
        const refused = [];
        const tries = {
            markup: () => { document.createElement("div").innerHTML = "<b>x</b>"; },
            outside: () => fetch("https://evil.example/"),
        };
        for (const [name, act] of Object.entries(tries)) {
            try { await act(); } catch { refused.push(name); }
        }
        return refused;
    }""")
    assert refused == ["markup", "outside"]
    served.faults.clear()  # the console has them


def test_a_key_is_asked_for(serve: Serve, visit: Visit) -> None:
    page = visit(serve("Hi.", api_keys=("secret",)))
    expect(page.locator("#notice")).to_have_text("The server asks for an API key.")
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_have_text("The server does not know this API key.")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#notice")).to_be_hidden()
    say(page, "Hello")
    expect(page.locator(".assistant > .text")).to_have_text("Hi.")


def test_it_waits_while_the_model_is_loading(serve: Serve, visit: Visit) -> None:
    served = serve("Hi.", loading=True)
    page = visit(served)
    expect(page.locator("#notice")).to_have_text("The model is loading.")
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text("The model is loading.")
    served.ready()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("krasis")
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".assistant > .text")).to_have_text("Hi.")


def test_a_long_prompt_shows_how_far_it_is(serve: Serve, visit: Visit) -> None:
    page = visit(serve("Done.", prefill_s=2.0, ping_interval_s=0.2))
    say(page, "word " * 300)
    expect(page.locator(".progress")).to_contain_text("Reading the prompt: 0 of")
    page.wait_for_timeout(1100)
    picture(page, "progress")
    expect(page.locator(".assistant > .text")).to_have_text("Done.")
    expect(page.locator(".progress")).to_be_hidden()


def test_what_the_server_refuses_is_shown(serve: Serve, visit: Visit) -> None:
    served = serve("Hi.")
    page = visit(served)
    served.core.context = 64
    served.core.script = lambda _: (_ for _ in ()).throw(ValueError("no such luck"))
    say(page, "Hello")
    expect(page.get_by_role("alert")).not_to_be_empty()
    expect(page.get_by_role("button", name="Again")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(serve: Serve, visit: Visit, scheme: str) -> None:
    page = visit(
        serve(ANSWER),
        viewport={"width": 390, "height": 780},
        color_scheme=scheme,
        has_touch=True,
        is_mobile=True,
    )
    say(page, "Compare two ways to sort.")
    is_over(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, f"phone-{scheme}")
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    page.wait_for_timeout(300)
    picture(page, f"phone-list-{scheme}")
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_have_js_property("inert", True)


def test_with_the_keyboard_alone(serve: Serve, visit: Visit) -> None:
    page = visit(serve("Hi."))
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    is_over(page)
    expect(page.locator(".said")).to_have_text("Hello\nthere")
    seen = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"new-chat", "open-settings", "Copy", "Edit", "Again", "input", "send"} <= seen


def test_storage_in_any_state(serve: Serve, visit: Visit) -> None:
    served = serve("Hi.")
    page = visit(served)
    page.evaluate("""() => {
        const odd = ["", "{", "null", "5", "[]", '{"messages": 5}', '{"messages": [null, 5, {"role": "x"}]}',
            '{"messages": [{"role": "assistant", "content": 5, "stats": {"a": "x"}}], "changed": "x"}'];
        odd.forEach((text, at) => localStorage.setItem(`krasis.chat.${at}`, text));
        localStorage.setItem("krasis.settings", '{"temperature": {}, "theme": "x\\\\"y", "system": 7}');
        localStorage.setItem("other", "another program's");
    }""")
    page.reload()
    say(page, "Hello")
    is_over(page)
    page.evaluate("""() => {
        for (const size of [100000, 100]) {
            const text = "x".repeat(size);
            try { for (let at = 0; ; at++) localStorage.setItem(`${size} ${at}`, text); } catch { }
        }
    }""")
    say(page, "Again " * 100)
    is_over(page)
    expect(page.locator("#storage-note")).to_contain_text("full")
    expect(page.locator(".said")).to_have_count(2)
