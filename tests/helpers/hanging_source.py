"""Pictures that stop coming, as on a network mount that no longer answers."""

import threading

from fvq_jax.data.record import Record, Source


class HangingSource:
    """`source`, of which picture `index` does not come before `release`, or a minute: a test then fails, and ends."""

    def __init__(self, source: Source, index: int):
        self._source, self._index = source, index
        self._released = threading.Event()
        self.release = self._released.set
        self.name, self.fingerprint = source.name, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        if index == self._index:
            self._released.wait(60)
        return self._source[index]
