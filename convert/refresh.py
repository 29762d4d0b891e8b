"""``krasis-convert --refresh-text``: other text files for a finished bundle, its weights as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krasis.convert.inputs import GGUF_MAGIC
from krasis.convert.progress import Reporter
from krasis.convert.text_assets import MAX_ASSET_BYTES, assets_from_folder, assets_from_gguf
from krasis.convert.text_check import unreadable_problems
from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.refresh import replace_assets
from krasis.formats.checkpoints.gguf import GgufCheckpoint
from krasis.formats.errors import FormatError, KrasisError, MismatchError, UsageError
from krasis.formats.files.file_ops import FileOps
from krasis.formats.files.regular_file import read_small_file
from krasis.formats.names import shown
from krasis.runtime.text.assets import TEMPLATE_FILE, TOKENIZER, TOKENIZER_CONFIG, parse_text_json
from krasis.runtime.text.check import TEXT_FILES, check_text, vocabulary

# Of one piece with tokenizer.json: a new one makes the old ones of these stale.
WITH_TOKENIZER = (TOKENIZER_CONFIG, TEMPLATE_FILE, "special_tokens_map.json", "added_tokens.json")
Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Refreshed:
    """Names of text files that the bundle has anew, has no longer, and has as before."""

    replaced: tuple[str, ...]
    removed: tuple[str, ...]
    kept: tuple[str, ...]


def refresh_text(
    source: Path,
    path: Path,
    reporter: Reporter,
    *,
    force: bool = False,
    plan_only: bool = False,
    io: FileOps | None = None,
) -> Refreshed:
    """Puts the text files of source (a checkpoint's folder, a GGUF, or one text file) into a bundle.

    What source lacks stays as it is, apart from files that belong to a tokenizer or template that is
    replaced. force: a tokenizer that numbers tokens otherwise is no error. Raises KrasisError, also for text
    that cannot be used, and then the bundle is as before.
    """
    given, unreadable = _gather(source)
    if not given and not unreadable:
        raise UsageError(
            "there is no text file in the source", where=str(source), limit=", ".join(TEXT_FILES)
        )
    with Bundle.open(path) as bundle:
        names = {asset.name for asset in bundle.manifest.assets} & set(TEXT_FILES)
        rows = bundle.spec.vocab
        held = {name: data for name in sorted(names) if (data := _held(bundle, name)) is not None}
    stale = _stale(given) & names
    merged = {name: data for name, data in held.items() if name not in stale} | given
    for problem in [*unreadable_problems(unreadable), *check_text(merged, str(source), rows)]:
        if problem.error is not None and problem.name in {*given, *unreadable}:
            raise problem.error
        reporter.warn(str(problem))  # what the bundle had before may be mended another time
    if TOKENIZER in given and not force:
        _check_numbers(held, given, source)
    changed = {name: data for name, data in given.items() if held.get(name) != data}
    removed = names - set(merged)
    if (changed or removed) and not plan_only:
        replace_assets(path, changed, removed=removed, io=io)
    return Refreshed(
        tuple(sorted(changed)), tuple(sorted(removed)), tuple(sorted(set(merged) - set(changed)))
    )


def _held(bundle: Bundle, name: str) -> bytes | None:
    """A text file of the bundle; None for a damaged one, which may be what is to be mended."""
    try:
        return bundle.asset(name)
    except KrasisError:
        return None


def _gather(source: Path) -> tuple[Files, dict[str, KrasisError]]:
    """The text files of the source, and those that cannot be read."""
    if source.is_dir():
        if (source / "manifest.json").is_file():
            with Bundle.open(source) as bundle:
                wanted = [item.name for item in bundle.manifest.assets if item.name in TEXT_FILES]
                return {name: bundle.asset(name) for name in wanted}, {}
        files, unreadable = assets_from_folder(source)
        return (
            {name: data for name, data in files.items() if name in TEXT_FILES},
            {name: error for name, error in unreadable.items() if name in TEXT_FILES},
        )
    if not source.is_file():
        raise UsageError("no such file or folder", where=str(source))
    with source.open("rb") as file:
        is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    if is_gguf:
        return dict(assets_from_gguf(GgufCheckpoint.open(source).metadata, str(source))), {}
    name = TEMPLATE_FILE if source.suffix.lower() in (".jinja", ".jinja2", ".j2") else source.name
    if name not in TEXT_FILES:
        raise UsageError(
            "not a text file of a model",
            where=str(source),
            limit=", ".join((*TEXT_FILES, "*.jinja", "a GGUF")),
        )
    return {name: read_small_file(source, MAX_ASSET_BYTES, follow_links=True)}, {}


def _stale(given: Files) -> set[str]:
    """Names of the bundle's files that would go on to speak for what is replaced."""
    stale = set(WITH_TOKENIZER) if TOKENIZER in given else set()
    if TOKENIZER_CONFIG in given and TEMPLATE_FILE not in given:
        try:
            config = parse_text_json(given[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
        except FormatError:  # the check says so
            return stale
        if config.get("chat_template"):
            stale.add(TEMPLATE_FILE)  # which would go before the one in the new file
    return stale - set(given)


def _check_numbers(held: Files, given: Files, source: Path) -> None:
    """MismatchError if tokens that both tokenizers have are numbered otherwise: another model's tokenizer."""
    if TOKENIZER not in held:
        return
    try:
        before = vocabulary(held[TOKENIZER], "the bundle")
    except FormatError:  # then it is what is to be mended
        return
    now = vocabulary(given[TOKENIZER], str(source))
    by_number = {number: token for token, number in now.items()}
    other = [token for token, number in before.items() if by_number.get(number, token) != token]
    if other:
        raise MismatchError(
            "the tokenizer numbers tokens otherwise than the bundle's: it is another model's",
            where=f"{source}: {TOKENIZER}",
            got=f"{len(other)} of {len(before)} tokens differ, such as {shown(other[0])}",
            hint="--force-text takes it all the same",
        )
