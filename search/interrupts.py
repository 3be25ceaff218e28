"""When an interrupt takes effect, and a limit on how long it may take, whatever hangs."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
# How often it is looked whether an import has ended.
AGAIN_SECONDS = 0.05


def interrupt_after_imports(number: int, frame: FrameType | None) -> None:
    """A signal's handler that raises `KeyboardInterrupt`, but in the middle of an import at its end only.

    Libraries that are interrupted while they are imported swallow it, or are left half there.
    """
    if _importing(frame):
        signal.signal(signal.SIGALRM, interrupt_after_imports)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        return
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def interrupt_the_main_thread() -> None:
    """As Ctrl-C does; as SIGTERM where that is ignored, in the background of a shell script."""
    number = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


def ignore_interrupts() -> None:
    """From now on signals interrupt nothing: what is left is to say how to go on."""
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Signals interrupt nothing in the block: who presses Ctrl-C again must not tear what the first one has to save.

    `InterruptDeadline` limits how long that may take.
    """
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    ignore_interrupts()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                # None: one that was not put in by Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


class RayEndedError(KeyboardInterrupt):
    """Ray's processes on this machine are gone, and all trials with them: as if the search had been interrupted."""


class InterruptDeadline:
    """Ends the process if an interrupt has not ended it in time.

    Where a signal reaches Ray's own processes too (systemd, Slurm and `timeout` signal all of a job), the cluster is
    gone while Tune still waits for it, for a minute or more. The journal has everything by then: what is left is to
    close the MLflow runs. Signals are noticed whatever handler Tune puts in.

    Works in the main thread alone, where Python takes signals; elsewhere there is no limit.

    Args:
        seconds: from the first signal on.
        code: of the process's exit.
        say: tells how to go on.
    """

    def __init__(self, seconds: float, code: int, say: Callable[[], None]) -> None:
        self._seconds, self._code, self._say = seconds, code, say
        # What is done before the process ends; None once it is done or under way.
        self.finish: Callable[[], object] | None = None
        self._left = threading.Event()
        self._signals, self._wakeup = socket.socketpair()
        self._before = -1
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._active:
            self._wakeup.setblocking(False)
            self._before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="interrupt-deadline", daemon=True).start()
        return self

    def begin(self) -> None:
        """The time runs from now on, without a signal."""
        if self._active:
            self._wakeup.send(bytes([signal.SIGINT]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._active:
            signal.set_wakeup_fd(self._before)
        # Ends the watching thread.
        self._wakeup.close()

    def _watch(self) -> None:
        while numbers := self._signals.recv(64):
            if any(number in INTERRUPTS for number in numbers):
                if not self._left.wait(self._seconds):
                    self._end()
                return

    def _end(self) -> None:
        finish, self.finish = self.finish, None
        try:
            if finish is not None:
                finish()
        finally:
            self._say()
            os._exit(self._code)
