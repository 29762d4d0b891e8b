"""What happens between the layers of a prompt: its caller is told, or it ends."""

from __future__ import annotations

from collections.abc import Callable

from krasis.runtime.backend import LayerProgress
from krasis.runtime.exclusive import Cancellation

# Called with (prompt tokens done, prompt tokens to do) as a prompt is computed.
Progress = Callable[[int, int], None]


def layer_progress(
    cancellation: Cancellation, progress: Progress | None, begin: int, num_tokens: int, total: int
) -> LayerProgress:
    """Between layers: ends a cancelled call, and tells progress of layers as of so many of num_tokens tokens.
    The last layer is left to the end of the pass."""

    def layer_done(done: int, num_layers: int) -> None:
        cancellation.check()
        if progress is not None and done < num_layers:
            progress(begin + num_tokens * done // num_layers, total)

    return layer_done
