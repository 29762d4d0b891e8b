"""What krasis-info says about a bundle's text side: ends, sampling, template variables, thinking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError
from krasis.formats.names import shown
from krasis.formats.printable import printable
from krasis.formats.text_tables import text_fields, text_paragraphs
from krasis.runtime.generation_defaults import describe
from krasis.runtime.text.assets import TOKENIZER, TextAssets
from krasis.runtime.text.end_tokens import added_note
from krasis.runtime.text.template_variables import names_offered


def text_to_json(bundle: Bundle) -> dict[str, Any]:
    """Plain JSON types; ``problem`` has the sentence if the text files cannot be read. Empty without a
    tokenizer."""
    if TOKENIZER not in {asset.name for asset in bundle.manifest.assets}:
        return {}
    assets = TextAssets(bundle)
    try:
        return _read(assets)
    except KrasisError as error:
        return {"problem": " ".join(str(error).split())}


def _read(assets: TextAssets) -> dict[str, Any]:
    ends, defaults, template = assets.end_tokens, assets.defaults, assets.template
    tokenizer = assets.tokenizer
    notes = [*([added_note(ends)] if ends.added else []), *defaults.notes]
    return {
        "has_chat_template": template is not None,
        "end_tokens": _spelled(assets.named_ends, tokenizer),
        "added_end_tokens": list(ends.added),
        "stop_strings": list(defaults.stops),
        "sampling": asdict(defaults.sampling),
        "sampling_recommended": defaults.recommended,
        "sampling_text": describe(defaults.sampling),
        "template_variables": [] if template is None else list(names_offered(template.source)),
        "thinking": [one.opens for one in assets.thinking if _is_known(one.opens, assets)],
        "notes": notes,
    }


def _spelled(ids: frozenset[int], tokenizer: Any) -> list[str]:
    return [tokenizer.decode([number], skip_special=False) for number in sorted(ids)]


def _is_known(marker: str, assets: TextAssets) -> bool:
    source = "" if assets.template is None else assets.template.source
    return marker in source or assets.tokenizer.token_id(marker) is not None


def text_to_text(record: Mapping[str, Any]) -> str:
    """The human form, a line a fact; notes wrapped."""
    if not record:
        return "Text\n  (none: this bundle has no tokenizer)"
    if "problem" in record:
        return "Text\n" + _wrapped([record["problem"]])
    ends = " ".join(_visible(one) for one in record["end_tokens"]) or "none named"
    if record["added_end_tokens"]:
        ends += "; in a chat also " + " ".join(_visible(one) for one in record["added_end_tokens"])
    sampling = record["sampling_text"]
    if not record["sampling_recommended"]:
        sampling += " (the model's files recommend none)"
    rows = [("answers end at", ends), ("sampling", sampling)]
    if record["stop_strings"]:
        rows.append(("stop texts", " ".join(shown(one) for one in record["stop_strings"])))
    if not record["has_chat_template"]:
        rows.append(("chat template", "none: --raw continues plain text"))
    if record["template_variables"]:
        rows.append(("template variables", ", ".join(record["template_variables"])))
    if record["thinking"]:
        rows.append(("thinking", " ".join(_visible(one) for one in record["thinking"])))
    return "\n".join(["Text", text_fields(rows), *([_wrapped(record["notes"])] if record["notes"] else [])])


def _wrapped(sentences: Iterable[str]) -> str:
    return text_paragraphs(printable(one) for one in sentences)


def _visible(token: str) -> str:
    """A token as it is, unless it would drive the terminal."""
    return token if token.isprintable() and token else shown(token)
