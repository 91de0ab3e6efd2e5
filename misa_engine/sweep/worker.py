"""One trial's process: a command of ``misa`` that ends when the process that started it is gone.

    python -m misa_engine.sweep.worker PARENT train --config run.yaml

Killing a sweep would otherwise leave its training alone on the GPU, beside the next sweep's.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

#: Seconds between looks at the parent.
EVERY = 1.0


def end_with(parent: int) -> None:
    """Kill this process as soon as ``parent`` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(EVERY)
        os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    from misa_engine.cli.main import main

    sys.exit(main(sys.argv[2:]))
