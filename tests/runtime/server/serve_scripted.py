"""A program for tests: krasis-serve's server on a free port, with a scripted core that is ready after a
while.

Arguments: seconds of loading, seconds of a token. Prints the port, and at the end whether prefixes were
saved.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[2]


def main() -> None:
    sys.path.insert(0, str(TESTS.parent))
    from krasis.runtime.server.running import listen, run
    from krasis.runtime.server.service import ServeSettings, Service
    from krasis.runtime.text.assets import TextAssets
    from tests.support.scripted_core import ScriptedCore

    tiny = TESTS / "assets" / "tiny-qwen3-moe"
    files = {name: (tiny / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    core = ScriptedCore(
        TextAssets.of_files(files, "tiny", 4096), lambda _: "word " * 400, token_s=float(sys.argv[2])
    )
    listener = listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)

    def load() -> Service:
        time.sleep(float(sys.argv[1]))
        if sys.argv[3:] == ["fails"]:
            raise ValueError("it cannot be loaded")
        settings = ServeSettings(ping_interval_s=0.2, body_timeout_s=0.5)
        return Service(core, core.assets, settings, lambda: files["tokenizer.json"])

    run([listener], load, core.close, header_timeout_s=0.5)
    print("saved" if core.saved else "not saved", flush=True)


if __name__ == "__main__":
    main()
