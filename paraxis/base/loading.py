"""Modules that are wanted later, loaded while something else is waited for."""

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from importlib import import_module


@contextmanager
def loading(names: Callable[[], Iterable[str]]) -> Generator[None]:
    """Loads the modules `names()` in a thread beside the body, and leaves once they are there. One that cannot be had is left to whoever
    needs it.

    Body and modules must import nothing of each other that is not loaded yet: two threads in one circle of imports see halves of modules.
    """

    def load() -> None:
        with suppress(ImportError):
            for name in names():
                import_module(name)

    thread = threading.Thread(target=load, name="loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
