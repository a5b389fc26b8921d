"""BufferTable: which expert is in which buffer of a tier, and which buffer is to be evicted next."""

from collections.abc import Container

import numpy as np

from runtime.offload.memory import BufferPool, ExpertBuffer, Key


class BufferTable:
    """The experts in the buffers of a pool, and when each is needed next; its user holds a lock.

    Args:
        pool: The buffers.

    Attributes:
        next_use_LE: Layers that will run until each expert's next use, `[L, E]` as lists, which are read one number at
            a time; None before the first plan.
    """

    def __init__(self, pool: BufferPool) -> None:
        self.next_use_LE: list[list[float]] | None = None
        self._buffers = pool.buffers
        self._buffer_of: dict[Key, ExpertBuffer] = {}

    def __len__(self) -> int:
        """Number of experts that are resident or being loaded."""
        return len(self._buffer_of)

    def get(self, key: Key) -> ExpertBuffer | None:
        """The buffer in which an expert is, or into which it is being loaded."""
        return self._buffer_of.get(key)

    def has(self, key: Key) -> bool:
        """Whether an expert is resident."""
        buffer = self._buffer_of.get(key)
        return buffer is not None and buffer.ready

    def next_use(self, key: Key | None) -> float:
        """Layers until an expert's next use; infinite for None, an empty buffer."""
        if key is None:
            return float(np.inf)
        return 0.0 if self.next_use_LE is None else self.next_use_LE[key[0]][key[1]]

    @property
    def farthest(self) -> float:
        """The largest next use of all buffers: no prefetch of a later one can replace anything."""
        if len(self) < len(self._buffers):
            return float(np.inf)
        return max(map(self.next_use, self._buffer_of))

    def victim(self, pinned: Container[Key]) -> ExpertBuffer | None:
        """An empty buffer, else the unpinned one with the largest next use; None if all are pinned or loading."""
        best, largest = None, -np.inf
        for buffer in self._buffers:
            if buffer.key is None:
                return buffer
            if buffer.ready and buffer.key not in pinned and (next_use := self.next_use(buffer.key)) >= largest:
                best, largest = buffer, next_use
        return best

    def assign(self, buffer: ExpertBuffer, key: Key) -> None:
        """Gives an empty buffer to an expert that will be loaded into it."""
        assert buffer.key is None, f"the buffer still holds {buffer.key}"
        buffer.key, self._buffer_of[key] = key, buffer

    def clear(self, buffer: ExpertBuffer) -> None:
        """Empties a buffer."""
        if buffer.key is not None:
            del self._buffer_of[buffer.key]
        buffer.key, buffer.ready, buffer.unused = None, False, False
