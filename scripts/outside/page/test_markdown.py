"""What Markdown means on the page, whole and in pieces, and how long it takes."""

# ruff: noqa: S101  these are tests
from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page

from .conftest import Serve

Visit = Callable[..., Page]

MARKDOWN = {
    "*a* **b** ***c*** ~~d~~ `e`": (
        "<p><em>a</em> <strong>b</strong> <strong><em>c</em></strong> <del>d</del> <code>e</code></p>"
    ),
    "snake_case_name 2 * 3 * 4 and __init__": ("<p>snake_case_name 2 * 3 * 4 and <strong>init</strong></p>"),
    "**bold with `**` inside**": "<p><strong>bold with <code>**</code> inside</strong></p>",
    r"\*no\* \[x\] \(y\) a\\b": r"<p>*no* \[x\] \(y\) a\b</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A #\n###### F\n#no": "<h2>A</h2><h6>F</h6><p>#no</p>",
    "a\n---\nb": "<p>a</p><hr><p>b</p>",
    "- a\n- b\n\n  more\n- c": "<ul><li><p>a</p></li><li><p>b</p><p>more</p></li><li><p>c</p></li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n  - b\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "It was in\n1984. That year": "<p>It was in<br>1984. That year</p>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "a|b\n-|-\n1|`x\\|y`": (
        '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td><code>x|y</code></td></tr></tbody></table></div>"
    ),
    "x &lt;b&gt; &copy; <b>": "<p>x &lt;b&gt; &amp;copy; &lt;b&gt;</p>",
    "a<br>b<BR/>c": "<p>a<br>b<br>c</p>",
    "`` a`b ``": "<p><code>a`b</code></p>",
    "`open and **bold**": "<p>`open and <strong>bold</strong></p>",
    "[[a]](http://x.example/(b)) [c](<http://y.example>)": (
        '<p><a href="http://x.example/(b)" title="http://x.example/(b)" target="_blank" '
        'rel="noopener noreferrer nofollow">[a]</a> <a href="http://y.example/" title="http://y.example/" '
        'target="_blank" rel="noopener noreferrer nofollow">c</a></p>'
    ),
    "[*](javascript:alert(1))": "<p>[*](javascript:alert(1))</p>",
}


def test_markdown_of_any_kind_takes_linear_time(serve: Serve, visit: Visit) -> None:
    page = visit(serve("Hi."))
    slow = page.evaluate("""async () => {
        const { parseBlocks } = await import("./markdown.js");
        const pieces = ["*", "**", "_", "*a ", "**a ", "_a_b ", "[", "[a](", "![", "](", "`", "`` ` ", "<",
            "<a ", "~~", "> ", "- ", "1. ", "|", "|-", "\\\\", "&amp", "# ", "#", "```\\n", "http://",
            "https://a)", "***a", "a|b\\n-|-\\n", "\\t", " ", "*a**b", "[a][b]", "()", "- a\\n  ", "> - ",
            "-\\n\\n", "((((", "[x](http://a(", "*a `b` "];
        const slow = [];
        for (const piece of pieces) for (const end of ["", "\\n", "x"]) {
            const text = (piece + end).repeat(Math.ceil(100000 / (piece + end).length));
            const begin = performance.now();
            parseBlocks(text);
            const ms = performance.now() - begin;
            if (ms > 3000) slow.push([piece + end, ms]);
        }
        return slow;
    }""")
    assert slow == []


def test_what_markdown_means(serve: Serve, visit: Visit) -> None:
    page = visit(serve("Hi."))
    shown = page.evaluate(
        """async (texts) => {
        const { renderText } = await import("./render.js");
        return texts.map((text) => {
            const node = document.createElement("div");
            for (let at = 1; at < text.length; at++) renderText(node, text.slice(0, at));
            renderText(node, text);
            const whole = document.createElement("div");
            renderText(whole, text);
            return [node.innerHTML.replaceAll(' dir="auto"', ""), node.innerHTML === whole.innerHTML];
        });
    }""",
        list(MARKDOWN),
    )
    for (text, wanted), (found, is_same) in zip(MARKDOWN.items(), shown, strict=True):
        assert found == wanted, text
        assert is_same, f"{text!r} looks otherwise if it comes in pieces"
