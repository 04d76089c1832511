"""A thread beside the body of a `with`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(action: Callable[[threading.Event], None], seconds: float) -> Iterator[None]:
    """Another thread calls the action every so many seconds, with an event that is set once the body is left.

    Python aborts if it ends while a thread is inside of torch.
    """
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(seconds):
            action(is_over)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(10)
