"""Several answers to one request: to several prompts, or to the same one (``n``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from krasis.runtime.server.ask import Ask
from krasis.runtime.server.errors import refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.turn import End, Step, Turn

MAX_ANSWERS = 128  # OpenAI's


def read_num_answers(fields: Fields) -> int:
    """How many answers to each prompt: ``n``. Raises ApiError, also where ``best_of`` wants more than these,
    of which some would be thrown away."""
    count = fields.integer("n", 1, MAX_ANSWERS) or 1
    best_of = fields.integer("best_of", 1, MAX_ANSWERS)
    if best_of is not None and best_of not in (1, count):
        raise refused(f"'best_of' must be as large as 'n', {count} (got {best_of}).", "best_of")
    return count


def repeated(ask: Ask, count: int) -> list[Ask]:
    """The same request count times. With a seed, each answer has one of its own, the first that seed."""
    seed = ask.sampling.seed
    if seed is None:
        return [ask] * count
    return [
        replace(ask, sampling=replace(ask.sampling, seed=(seed + number) % 2**64)) for number in range(count)
    ]


async def merged(turns: Sequence[Turn]) -> AsyncGenerator[tuple[int, Step]]:
    """The steps of all turns as they come, each with its turn's number. Raises ApiError for the first that an
    error ends; the caller closes the turns."""
    if len(turns) == 1:
        async with aclosing(turns[0].steps()) as steps:
            async for step in steps:
                yield 0, step
        return
    queue: asyncio.Queue[tuple[int, Step | None, Exception | None]] = asyncio.Queue(4 * len(turns))

    async def follow(number: int, turn: Turn) -> None:
        try:
            async with aclosing(turn.steps()) as steps:
                async for step in steps:
                    await queue.put((number, step, None))
        except Exception as error:  # noqa: BLE001  the reader raises it
            await queue.put((number, None, error))

    tasks = [asyncio.ensure_future(follow(number, turn)) for number, turn in enumerate(turns)]
    num_open = len(tasks)
    try:
        while num_open:
            number, one, failure = await queue.get()
            if failure is not None:
                raise failure
            if one is not None:
                num_open -= isinstance(one, End)
                yield number, one
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


def joined(ends: Sequence[End]) -> End:
    """The end of several answers to one prompt: it counts once, and so does its pass."""
    first = ends[0]
    if len(ends) == 1:
        return first
    return replace(
        first,
        num_generated_tokens=sum(one.num_generated_tokens for one in ends),
        num_reasoning_tokens=sum(one.num_reasoning_tokens for one in ends),
        num_drafted_tokens=sum(one.num_drafted_tokens for one in ends),
        num_accepted_tokens=sum(one.num_accepted_tokens for one in ends),
        num_cached_tokens=min(one.num_cached_tokens for one in ends),
        prefill_s=max(one.prefill_s for one in ends),
        decode_s=max(one.decode_s for one in ends),
    )
