"""The worker that runs the text side of bundles: chat templates and tokenizers (its owner: sandbox).

Templates and tokenizers are kept by number. What is imported here is imported by no process that holds a
model: neither Jinja nor the tokenizers library can take it down.
"""

from __future__ import annotations

import json
from array import array
from typing import Any

from krasis.formats.process.worker_main import Handler
from krasis.formats.process.worker_protocol import pack_parts, unpack_parts
from krasis.runtime.text.library_tokenizer import LibraryTokenizer
from krasis.runtime.text.template_sandbox import SandboxedTemplate

_kept: dict[int, Any] = {}


def _load_template(payload: bytes) -> bytes:
    head, (source,) = unpack_parts(payload)
    _kept[head["number"]] = SandboxedTemplate(str(source, "utf-8", "surrogatepass"))
    return b""


def _load_names(payload: bytes) -> bytes:
    from krasis.runtime.text.template_variables import names_in  # few bundles are asked for them

    _, (source,) = unpack_parts(payload)
    return pack_parts(names_in(str(source, "utf-8", "surrogatepass")))


def _render(payload: bytes) -> bytes:
    head, (values,) = unpack_parts(payload)
    text = _kept[head["number"]].render(json.loads(str(values, "ascii")), head["max_characters"])
    return str(text).encode("utf-8", "surrogatepass")


def _load_tokenizer(payload: bytes) -> bytes:
    head, (data,) = unpack_parts(payload)
    tokenizer = LibraryTokenizer(bytes(data), **head["options"])
    _kept[head["number"]] = tokenizer
    facts = {
        "num_tokens": tokenizer.num_tokens,
        "is_byte_level": tokenizer.is_byte_level,
        "added": tokenizer.added_tokens(),
        "notes": tokenizer.notes,
    }
    return pack_parts(facts)


def _spell(payload: bytes) -> bytes:
    head, _ = unpack_parts(payload)
    return pack_parts(None, *_kept[head["number"]].spelled(head["begin"], head["end"]))


def _encode(payload: bytes) -> bytes:
    head, (text,) = unpack_parts(payload)
    ids = _kept[head["number"]].encode(str(text, "utf-8"), special=head["special"])
    return array("I", ids).tobytes()


def _decode(payload: bytes) -> bytes:
    head, (ids,) = unpack_parts(payload)
    text = _kept[head["number"]].decode(array("I", bytes(ids)).tolist(), skip_special=head["skip_special"])
    return str(text).encode("utf-8", "surrogatepass")


def _token_id(payload: bytes) -> bytes:
    head, (token,) = unpack_parts(payload)
    return pack_parts(_kept[head["number"]].token_id(str(token, "utf-8", "surrogatepass")))


def _longest_token(payload: bytes) -> bytes:
    head, _ = unpack_parts(payload)
    return pack_parts(_kept[head["number"]].longest_token())


def _drop(payload: bytes) -> bytes:
    head, _ = unpack_parts(payload)
    _kept.pop(head["number"], None)
    return b""


HANDLERS: dict[str, Handler] = {
    "load_template": _load_template,
    "load_names": _load_names,
    "render": _render,
    "load_tokenizer": _load_tokenizer,
    "spell": _spell,
    "encode": _encode,
    "decode": _decode,
    "token_id": _token_id,
    "longest_token": _longest_token,
    "drop": _drop,
}
