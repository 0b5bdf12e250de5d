"""A process that dies, unflushed, right before one of its changes of the file system."""

import os
import signal
import sys
from collections.abc import Callable

CHANGING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "tempfile.mkstemp")


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Run `act` in a child that is killed right before its `number`th change; False when it ended before that.

    Python reports every open, rename, mkdir and remove to audit hooks before doing it, so every point is reached.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
            if event in CHANGING or writes:
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)
