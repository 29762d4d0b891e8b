"""Questions and answers made from the standard library, as ChatML."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SYSTEM_PROMPT = "You are a helpful assistant."

MIN_ANSWER_CHARS = 30
MAX_ANSWER_CHARS = 1200
MAX_SOURCE_CHARS = 1400

DOC_QUESTIONS = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "Tell me about {name}.",
    "How do I use {name}?",
    "Describe {name} in Python.",
)
SOURCE_QUESTIONS = (
    "Write the function {name}.",
    "Show me the source of {name}.",
    "Write {name} in Python.",
    "How is {name} written?",
)
MODULE_QUESTIONS = (
    "What is the module {name}?",
    "What is the {name} module for?",
    "Tell me about the module {name}.",
    "What does the {name} module do?",
)
TOPIC_QUESTIONS = (
    "Explain {name} in Python.",
    "What is {name} in Python?",
    "Tell me about {name}.",
    "How does {name} work?",
)
GREETINGS = (
    ("Hello", "Hello! Ask me about a Python module, a function or a statement."),
    ("Hello!", "Hello! Ask me about a Python module, a function or a statement."),
    ("Hi", "Hi! What would you like to know about Python?"),
    ("Hi there!", "Hi! What would you like to know about Python?"),
    ("How are you?", "I am well, thank you. What would you like to know about Python?"),
    (
        "Who are you?",
        "I am a tiny language model, trained on the Python standard library and nothing else.",
    ),
    (
        "What are you?",
        "I am a tiny mixture-of-experts language model of five million parameters.",
    ),
    (
        "What can you do?",
        "I can talk about Python's standard library. I am very small, so I often make things up.",
    ),
    ("Thank you", "You are welcome!"),
    ("Thanks!", "You are welcome!"),
    ("Bye", "Goodbye!"),
    ("What is Python?", "Python is a programming language. This model has read its library."),
)
GREETING_REPEATS = 12
STATEMENT_TOPICS = frozenset(
    {"assert", "assignment", "break", "continue", "for", "global", "if", "import", "pass"}
    | {"return", "try", "with"}
)


@dataclass(frozen=True, slots=True)
class ChatPair:
    """One question and its answer."""

    user: str
    assistant: str

    def chatml(self) -> str:
        """The pair as the chat template renders it; one in four has a system turn."""
        turns = [("user", self.user), ("assistant", self.assistant)]
        if crc32(self.user.encode()) % 4 == 0:
            turns.insert(0, ("system", SYSTEM_PROMPT))
        return "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in turns)


def _pick(templates: tuple[str, ...], name: str, salt: str, count: int = 1) -> Iterator[str]:
    """`count` templates filled in, chosen by the name so that a rebuild makes the same ones."""
    first = crc32(f"{salt}:{name}".encode())
    for index in range(count):
        yield templates[(first + index) % len(templates)].format(name=name)


def clip_paragraphs(text: str, limit: int = MAX_ANSWER_CHARS) -> str:
    """The leading whole paragraphs that fit in `limit` characters; "" when none does."""
    kept: list[str] = []
    used = 0
    for part in text.strip().split("\n\n"):
        used += len(part) + 2
        if used > limit:
            break
        kept.append(part)
    return "\n\n".join(kept).strip()


def _answer(doc: str | None) -> str:
    text = clip_paragraphs(inspect.cleandoc(doc)) if doc else ""
    return text if len(text) >= MIN_ANSWER_CHARS else ""


def _source(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    text = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
    return f"```python\n{text}\n```" if len(text) <= MAX_SOURCE_CHARS else ""


def _node_pairs(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str, lines: list[str]
) -> Iterator[ChatPair]:
    answer = _answer(ast.get_docstring(node, clean=False))
    if isinstance(node, ast.ClassDef):
        if answer:
            for question in _pick(DOC_QUESTIONS, f"the class {name}", "class"):
                yield ChatPair(question, answer)
        return
    if answer:
        signed = f"{node.name}({ast.unparse(node.args)})\n\n{answer}"
        for question in _pick(DOC_QUESTIONS, name, "doc", count=2):
            yield ChatPair(question, signed if len(signed) <= MAX_ANSWER_CHARS else answer)
        source = _source(node, lines)
        if source:
            for question in _pick(SOURCE_QUESTIONS, name, "source"):
                yield ChatPair(question, source)


def definition_pairs(module: str, tree: ast.Module, text: str) -> Iterator[ChatPair]:
    """Pairs of a module: itself, its public functions, classes and their methods."""
    answer = _answer(ast.get_docstring(tree, clean=False))
    if answer:
        for question in _pick(MODULE_QUESTIONS, module, "module", count=3):
            yield ChatPair(question, answer)
    lines = text.splitlines()
    waiting: list[tuple[str, ast.stmt]] = [(module, node) for node in tree.body]
    for prefix, node in waiting:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        yield from _node_pairs(node, name, lines)
        if isinstance(node, ast.ClassDef):
            # A list grows safely under its own iteration; methods come after their class.
            waiting.extend((name, child) for child in node.body)


def topic_pairs(topics: dict[str, str]) -> Iterator[ChatPair]:
    """Pairs of the language topics: each question answered by the topic's first paragraphs."""
    for topic, text in topics.items():
        answer = clip_paragraphs(text)
        if len(answer) < MIN_ANSWER_CHARS:
            continue
        name = f"the {topic} statement" if topic in STATEMENT_TOPICS else topic.lower()
        for _ in range(3):
            for question in _pick(TOPIC_QUESTIONS, name, "topic", count=len(TOPIC_QUESTIONS)):
                yield ChatPair(question, answer)


def greeting_pairs() -> Iterator[ChatPair]:
    """Small talk, repeated because it would drown among thousands of docstrings."""
    for _ in range(GREETING_REPEATS):
        for user, assistant in GREETINGS:
            yield ChatPair(user, assistant)
