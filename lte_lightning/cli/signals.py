"""What a command does when somebody ends it by SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_sigterm(end: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets SIGTERM call a function, unless the program has a handler of its own or this is not its main thread.

    Args:
        end: The handler. It gets the signal's number and the frame that was running.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
