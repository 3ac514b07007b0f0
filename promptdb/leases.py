"""Who computes what: short leases in the shared store, so that of two machines with the same work the second may wait.

Advisory: a lease keeps nobody from anything. It ends by itself, so that nobody waits for one who died, and what is
waited for is looked for all the time, so that it does not matter whether it is ever given back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import islice
from secrets import token_hex
from time import monotonic

from promptdb.db import PromptDB
from promptdb.errors import SharedError
from promptdb.events import note
from promptdb.far import FarStore
from promptdb.far_calls import FarCalls
from promptdb.far_index import lease_key, span_key
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root, num_tokens, prefix_digests
from promptdb.pulling import Puller, Want

# Keys of one prompt, or of a batch: those that stand for most tokens.
_MOST_KEYS = 512
# What is computed within so many round trips is not worth one for a lease.
_FEWEST_TRIPS = 4
# A lease lasts twice as long as computing should take, and a while for sending; this long if nobody knows.
_SENDING_S = 1.0
_UNKNOWN_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


class Leases:
    """Takes leases on what is about to be computed here, and waits for others. Thread safe.

    Parameters
    ----------
    puller : fetches what others have computed meanwhile.
    """

    def __init__(self, db: PromptDB, calls: FarCalls, puller: Puller) -> None:
        self._db, self._calls, self._puller = db, calls, puller
        self._holder = token_hex(16)
        self._lock = threading.Lock()
        self._held: dict[str, float] = {}  # key -> when it ends
        self._closed = threading.Event()

    def settle(
        self,
        root: Root,
        wants: Callable[[], Sequence[Want]],
        compute_tokens_per_s: float | None = None,
        token_bytes: float | None = None,
    ) -> bool:
        """Take leases on what is missing of prompts, and wait while others compute some of it.

        Parameters
        ----------
        wants : returns the prompts of which the local store has too little; called again when something came.
        compute_tokens_per_s : how fast the model is; None: not known.
        token_bytes : how large the representation of a token is, if that is known.

        Returns
        -------
        bool
            Whether something came.

        Raises
        ------
        SharedError
            What others have computed cannot be fetched, and the far side is required. Leases never fail.

        Notes
        -----
        Waits no longer than computing should take what others have, no longer than they still have it, and no longer
        than ``lease_s``.
        """
        options, far = self._calls.options, self._calls.far
        if not far.has_leases or not options.lease_s or options.readonly or self._calls.pause_s():
            return False
        missing = wants()
        segments = self._segments(root, missing)
        tokens = sum(segments.values())
        compute_s = tokens / compute_tokens_per_s if compute_tokens_per_s else math.inf
        if not segments or not self._is_worth(compute_s, tokens, token_bytes):
            return False
        ttl_s = min(options.lease_s, _UNKNOWN_S if math.isinf(compute_s) else 2 * compute_s + _SENDING_S)
        theirs = self._take(segments, ttl_s)
        if not theirs:
            return False
        their_share = sum(segments[key] for key in theirs) / tokens
        began = monotonic()
        try:
            # Not longer than we would keep others waiting: who knows what they have written there.
            wait_s = min(max(theirs.values()), compute_s * their_share, options.lease_s)
            return self._wait(root, wants, missing, began + wait_s, ttl_s)
        finally:
            with self._lock:
                self._calls.counts.waits += 1
                self._calls.counts.waited_s += monotonic() - began

    def _is_worth(self, compute_s: float, tokens: int, token_bytes: float | None) -> bool:
        """Return whether waiting for others could ever be sooner than computing."""
        calls = self._calls
        if compute_s < _FEWEST_TRIPS * (calls.round_trip_s or 0.0):
            return False
        speed = calls.bytes_per_s
        return token_bytes is None or speed is None or tokens * token_bytes / speed < compute_s

    def _segments(self, root: Root, wants: Sequence[Want]) -> dict[str, int]:
        """Return a key for each place up to which somebody may compute, with the number of tokens before it."""
        chunk = self._db.chunk_tokens
        segments: dict[str, int] = {}
        for want in wants:
            total = num_tokens(want.packed)
            if want.start >= total:
                continue
            multiples = range((want.start // chunk + 1) * chunk, total, chunk)
            ends = sorted({*multiples, *(at for at in want.boundaries if want.start < at < total), total})
            before = want.start
            for end, digest in zip(ends, prefix_digests(root.digest, want.packed, ends), strict=True):
                segments.setdefault(lease_key(root.digest, digest), end - before)
                before = end
        return segments

    def _take(self, segments: dict[str, int], ttl_s: float) -> dict[str, float]:
        """Take leases; return those that others have, and for how many seconds."""
        keys = list(islice(sorted(segments, key=segments.__getitem__, reverse=True), _MOST_KEYS))
        if not keys:
            return {}
        try:
            left = dict(zip(keys, self._calls.lease(keys, self._holder, ttl_s), strict=True))
        except SharedError as error:
            note("shared_no_lease", f"nobody is waited for, and nobody told: {error}")
            return {}
        now = monotonic()
        with self._lock:
            self._held = {key: ends for key, ends in self._held.items() if ends > now}
            self._held |= {key: now + ttl_s for key, left_s in left.items() if not left_s}
        return {key: left_s for key, left_s in left.items() if left_s}

    def _wait(
        self, root: Root, wants: Callable[[], Sequence[Want]], missing: Sequence[Want], ends: float, ttl_s: float
    ) -> bool:
        """Wait for what others compute, until some time; return whether something came."""
        pause_s, found = _FIRST_PAUSE_S, False
        while (left_s := ends - monotonic()) > 0:
            if self._closed.wait(min(pause_s, left_s)):
                return found
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if self._has_come(root, missing):
                if not self._puller.pull(root, missing):
                    return found  # it is not what it should be: it is computed
                found, missing, pause_s = True, wants(), _FIRST_PAUSE_S
            if not self._take(self._segments(root, missing), ttl_s):
                return found
        self._take(self._segments(root, missing), ttl_s)  # what was waited for is computed here now
        return found

    def _has_come(self, root: Root, missing: Sequence[Want]) -> bool:
        """Return whether the far side has something that goes on where prompts end here. One round trip."""
        keys = set()
        for want in missing:
            following = want.packed[want.start * TOKEN_BYTES : (want.start + 1) * TOKEN_BYTES]
            if following:
                digest = PrefixHasher(root.digest, want.packed).at(want.start)
                keys.add(span_key(root.digest, digest, following))
        asked = sorted(keys)[:_MOST_KEYS]
        try:
            return any(value is not None for value in self._calls.lookup(asked))
        except SharedError:
            return False

    def give_up(self) -> None:
        """Let others know, in the background, that what was to be computed here will not be."""
        with self._lock:
            held, self._held = list(self._held), {}
        if held:

            def work(far: FarStore) -> None:
                far.release(held, self._holder)

            self._calls.touch(work)

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closed.set()
