"""What the hub, or the way to it, refuses, as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors

from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.files.file_ops import way_out

# httpx's, whichever package of that name the hub's library uses.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (errors.HTTPError, OSError)  # type: ignore[attr-defined]


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turns what the hub's library raises inside the block into a KrasisError. where: the model's name.

    UsageError for a name that there is not; ResourceError where access or the network is missing.
    """
    try:
        yield
    except errors.GatedRepoError as error:
        raise ResourceError(
            "the model's publisher gives it only to people who agreed to its terms",
            where=where,
            hint=f"agree at {constants.ENDPOINT}/{where.partition('@')[0]}, then set HF_TOKEN "
            "(or 'hf auth login')",
        ) from error
    except errors.RevisionNotFoundError as error:
        hint = "name a branch, tag or commit"
        raise UsageError("the model has no such revision", where=where, hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            "there is no such model on the hub",
            where=where,
            hint="check the name; one that is private needs HF_TOKEN (or 'hf auth login')",
        ) from error
    except errors.EntryNotFoundError as error:
        raise _missing(where, error) from error
    except errors.OfflineModeIsEnabled as error:
        raise ResourceError(
            "the hub is not asked because HF_HUB_OFFLINE is set, and what is needed is not in the cache",
            where=where,
            got=constants.HF_HUB_CACHE,
            hint="unset it, or give a folder",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError("this is no name of a model on the hub", where=where, got=str(error)) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise ResourceError(
                "the hub does not give this model with this token",
                where=where,
                got=f"status {status}",
                hint="set HF_TOKEN to one that may read it (or 'hf auth login')",
            ) from error
        raise ResourceError(
            "the hub answers with an error",
            where=where,
            got=f"status {status}",
            hint="run the same command again later; it goes on where it was",
        ) from error
    except TRANSPORT_ERRORS as error:
        raise _refused(where, error) from error


def _missing(where: str, error: Exception) -> UsageError | ResourceError:
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ResourceError(
            "the hub cannot be reached, and a file that is needed is not in the cache",
            where=where,
            got=str(error.__cause__ or error).splitlines()[0],
            hint="see to the network, then run the same command again; it goes on where it was",
        )
    return UsageError("the model lacks a file that is needed", where=where, got=str(error).splitlines()[0])


def _refused(where: str, error: Exception) -> ResourceError:
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        reason = error.strerror or str(error)
        return ResourceError(
            f"the download cannot be kept: {reason}", where=str(error.filename), hint=way_out(error)
        )
    return ResourceError(
        "the hub cannot be reached",
        where=where,
        got=f"{constants.ENDPOINT}: {error}",
        hint="see to the network, then run the same command again; it goes on where it was",
    )
