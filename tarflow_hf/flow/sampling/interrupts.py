"""Which of the calls that run at the same time are to stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident


class Interruptible:
    """An object whose running calls are stopped one by one, by the attribute `_interrupt` that users of diffusers set.

    Calls run in threads, and one may run inside another's callback. Set in a thread that runs a call, it stops that
    call alone; set in a thread that runs none, it stops all.

    Example:
        >>> pipe = Interruptible()
        >>> with pipe.interruptible():
        ...     pipe._interrupt = True
        ...     with pipe.interruptible():
        ...         pipe.interrupt
        ...     pipe.interrupt
        False
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._flags: dict[int, list[bool]] = {}  # of each thread's running calls, the outermost first
        self._last = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A call of this thread, which nothing has interrupted yet."""
        thread = get_ident()
        flags = self._flags.setdefault(thread, [])
        flags.append(False)
        try:
            yield
        finally:
            self._last = flags.pop()
            if not flags:
                del self._flags[thread]

    @property
    def interrupt(self) -> bool:
        """Whether this thread's call is to stop after its present step; where none runs, whether the last one was."""
        flags = self._flags.get(get_ident())
        return flags[-1] if flags else self._last

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        if own := self._flags.get(get_ident()):
            own[-1] = value
            return
        self._last = value
        for flags in list(self._flags.values()):
            flags[:] = [value] * len(flags)


__all__ = ["Interruptible"]
