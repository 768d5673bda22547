"""Threads that run C functions side by side: ctypes lets go of Python's lock while one runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch

Call = Callable[[], object]


class Workers:
    """A fixed number of threads, until `close`, each of which uses torch without threads of its own.

    Only one thread may call `run` at a time.
    """

    def __init__(self, count: int):
        self.count = count
        self._work: list[SimpleQueue] = [SimpleQueue() for _ in range(count)]
        self._done: SimpleQueue = SimpleQueue()
        threads = torch.get_num_threads()
        self._threads = [threading.Thread(target=self._serve, args=(queue,), daemon=True) for queue in self._work]
        for thread in self._threads:
            thread.start()
        # set_num_threads also changes the default, which a thread takes over when it first asks for its number.
        torch.set_num_threads(1)
        self.run([torch.get_num_threads] * count)
        torch.set_num_threads(threads)

    def close(self) -> None:
        """End the threads."""
        for queue in self._work:
            queue.put(None)
        # A thread that still holds C++ objects when Python ends would take the process down.
        for thread in self._threads:
            thread.join()

    def run(self, calls: Sequence[Call]) -> None:
        """Run ``calls[i]`` in thread i, all at once, and wait for the last; fewer calls leave threads idle.

        Raises what a call raised.
        """
        for queue, call in zip(self._work, calls):
            queue.put(call)
        errors = [error for error in [self._done.get() for _ in calls] if error is not None]
        if errors:
            raise errors[0]

    def _serve(self, queue: SimpleQueue) -> None:
        while (call := queue.get()) is not None:
            try:
                call()
                self._done.put(None)
            except BaseException as error:
                self._done.put(error)
