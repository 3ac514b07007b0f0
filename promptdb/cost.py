"""Load or compute, whichever is faster: measured rates, and the decision."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

_WEIGHT = 0.3
# Measurements of less than this say more about call overhead than about rates.
_FEWEST_TOKENS = 32
_FEWEST_BYTES = 1 << 20
_FEWEST_LOADS = 3
_RETRY_EVERY = 20


@dataclass(frozen=True)
class Estimate:
    """What it would take to have some tokens' keys and values, in seconds; None where nothing was measured yet."""

    load_s: float | None
    compute_s: float | None

    @property
    def load_wins(self) -> bool:
        """Whether loading is the better way; also when one of the two is not known."""
        return self.load_s is None or self.compute_s is None or self.load_s <= self.compute_s


class CostModel:
    """Moving averages of how fast this machine computes and loads. Thread safe.

    Parameters
    ----------
    rates : what earlier runs measured: ``compute_tokens_per_s``, ``load_bytes_per_s``, ``kv_bytes_per_token``.
    """

    NAMES = ("compute_tokens_per_s", "load_bytes_per_s", "kv_bytes_per_token")

    def __init__(self, rates: Mapping[str, object] | None = None) -> None:
        self._lock = threading.Lock()
        self.rates: dict[str, float] = {}
        for name in self.NAMES:
            value = (rates or {}).get(name)
            if isinstance(value, (int, float)) and value > 0:
                self.rates[name] = float(value)
        self.measured: dict[str, float] = {}
        self._num_loads = self._num_skipped = 0

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Note a computation."""
        if num_tokens >= _FEWEST_TOKENS:
            self._fold("compute_tokens_per_s", num_tokens / max(seconds, 1e-9))

    def loaded(self, size_bytes: int, seconds: float) -> None:
        """Note a load."""
        self._num_loads += 1
        if size_bytes >= _FEWEST_BYTES:
            self._fold("load_bytes_per_s", size_bytes / max(seconds, 1e-9))

    def sized(self, kv_bytes_per_token: int) -> None:
        """Note how large a token's keys and values are."""
        with self._lock:
            self.rates["kv_bytes_per_token"] = self.measured["kv_bytes_per_token"] = float(kv_bytes_per_token)

    def _fold(self, name: str, rate: float) -> None:
        with self._lock:
            before = self.rates.get(name)
            self.rates[name] = rate if before is None else (1 - _WEIGHT) * before + _WEIGHT * rate
            self.measured[name] = self.rates[name]

    def should_load(self, num_tokens: int) -> bool:
        """Return whether to load ``num_tokens`` that are stored rather than compute them.

        One slow load (a cold disk, a busy one) must not end loading for good: a verdict against it takes several loads
        by this process, and is put to the test again from time to time.
        """
        if self.estimate(num_tokens).load_wins:
            return True
        self._num_skipped += 1
        return self._num_loads < _FEWEST_LOADS or self._num_skipped % _RETRY_EVERY == 0

    def estimate(self, num_tokens: int) -> Estimate:
        """Return what loading or computing ``num_tokens`` would take."""
        with self._lock:
            rates = dict(self.rates)
        load = compute = None
        if "load_bytes_per_s" in rates and "kv_bytes_per_token" in rates:
            load = num_tokens * rates["kv_bytes_per_token"] / rates["load_bytes_per_s"]
        if "compute_tokens_per_s" in rates:
            compute = num_tokens / rates["compute_tokens_per_s"]
        return Estimate(load, compute)
