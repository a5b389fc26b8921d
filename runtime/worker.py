"""Worker: one thread that runs tasks in order beside the model, and never keeps the program from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Worker(Generic[Result]):
    """Runs what is submitted on a thread of its own, which a hanging task cannot make the program wait for."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Result], Callable[[], Result]] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name=name).start()

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Queues a call; its result or error is the future's."""
        future: Future[Result] = Future()
        self._tasks.put((future, lambda: function(*args)))
        return future

    def close(self) -> None:
        """Ends the thread once what it is doing is done; does not wait for that."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            try:
                future.set_result(call())
            except BaseException as error:  # handed on to whoever asks for the result
                future.set_exception(error)
