"""Threads that read images ahead of the training step."""

from __future__ import annotations

import os
import queue
import threading
from concurrent.futures import Future

_PATIENCE = 5.0  # seconds per thread


class Workers:
    """`count` threads that run functions in the order they were given.

    Threads, because Pillow decodes and resamples outside Python's global lock, and a forked process
    of a program that has computed with threads may hang. After `close` nothing runs any more; what
    has not begun by then is cancelled.
    """

    def __init__(self, count: int):
        self.pid = os.getpid()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._closing = threading.Event()
        about = {"target": _serve, "args": (self._jobs, self._closing), "daemon": True}
        self._threads = [threading.Thread(name=f"data {i}", **about) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function, *arguments) -> Future:
        """A Future of function(*arguments)."""
        future: Future = Future()
        self._jobs.put((future, function, arguments))
        return future

    def close(self):
        """Stops after the jobs that are running, one per thread."""
        if os.getpid() != self.pid:
            return  # a forked child has no threads to stop
        self._closing.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_PATIENCE)  # a read that hangs must not keep the program


def _serve(jobs, closing):
    while (job := jobs.get()) is not None:
        future, function, arguments = job
        if closing.is_set():
            future.cancel()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = function(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        del job, future, function, arguments
