"""What a store was good for: prompts served, tokens loaded and computed, by model. Counted in memory, written now and
then with other things; a crash loses the last counts, nothing else."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

from promptdb.errors import CorruptDataError
from promptdb.format import META, pack_record, unpack_record
from promptdb.tables import Reader, Writer

SERVED_KEY = b"served:"

# Counts wait no longer for something else to be written with.
LONGEST_WAIT_S = 60.0


@dataclass
class Served:
    """Sums over the prompts that engines were asked for, since the store was created.

    Attributes
    ----------
    num_prompts, num_complete : prompts, and those of which nothing had to be computed.
    tokens_loaded, tokens_computed : of all prompts.
    load_s, compute_s : seconds spent on finding and loading, and on computing.
    num_quarantined : spans and logits that were damaged, and taken out to be computed again.
    """

    num_prompts: int = 0
    num_complete: int = 0
    tokens_loaded: int = 0
    tokens_computed: int = 0
    load_s: float = 0.0
    compute_s: float = 0.0
    num_quarantined: int = 0

    def add(self, other: Served) -> None:
        """Add the sums of others to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def saved_s(self, compute_tokens_per_s: float | None) -> float | None:
        """Return the seconds that loading has saved; None if nobody knows how fast this model computes.

        Parameters
        ----------
        compute_tokens_per_s : measured rate, for a model of which too little was computed here.
        """
        seconds_per_token = 0.0
        if self.tokens_computed >= 32 and self.compute_s > 0:
            seconds_per_token = self.compute_s / self.tokens_computed
        elif compute_tokens_per_s is not None and compute_tokens_per_s > 0:
            seconds_per_token = 1 / compute_tokens_per_s
        elif self.tokens_loaded:
            return None
        return max(0.0, self.tokens_loaded * seconds_per_token - self.load_s)


class Tally:
    """Counts that wait to be written, by weights ID. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, Served] = {}
        self._since_unix_s = 0.0

    def add(self, weights_id: str, served: Served, now: float) -> bool:
        """Count something; return whether counts have waited for so long that they should be written."""
        with self._lock:
            if not self._waiting:
                self._since_unix_s = now
            self._waiting.setdefault(weights_id, Served()).add(served)
            return now - self._since_unix_s > LONGEST_WAIT_S

    def take(self) -> dict[str, Served]:
        """Return what waits; it no longer does."""
        with self._lock:
            taken, self._waiting = self._waiting, {}
        return taken

    def put_back(self, taken: Mapping[str, Served]) -> None:
        """Let counts wait again that could not be written."""
        with self._lock:
            for weights_id, served in taken.items():
                self._waiting.setdefault(weights_id, Served()).add(served)


def write_served(writer: Writer, counts: Mapping[str, Served]) -> None:
    """Add counts to those that are stored. What is stored and does not hold is begun anew."""
    for weights_id, served in counts.items():
        key = SERVED_KEY + bytes.fromhex(weights_id)
        data = writer.get(META, key)
        total = Served()
        if data is not None:
            with suppress(CorruptDataError):
                total = unpack_served(key, data)
        total.add(served)
        writer.put(META, key, pack_record(key, asdict(total)))


def unpack_served(key: bytes, data: memoryview | bytes) -> Served:
    """Return the counts under a key. Raises :class:`~promptdb.errors.CorruptDataError`."""
    found = unpack_record(key, data)
    served = Served()
    for field in fields(Served):
        amount = found.get(field.name, 0)
        if type(amount) not in (int, float) or not amount >= 0:
            raise CorruptDataError(f"the count {field.name} is {amount!r}", "`promptdb verify --fix`")
        setattr(served, field.name, type(getattr(served, field.name))(amount))
    return served


def read_served(reader: Reader) -> dict[str, Served]:
    """Return what is stored, by weights ID. Counts that do not hold are left out: they are hints."""
    found = {}
    for key, data in reader.scan(META, prefix=SERVED_KEY):
        try:
            found[key[len(SERVED_KEY) :].hex()] = unpack_served(key, data)
        except CorruptDataError:
            continue
    return found
