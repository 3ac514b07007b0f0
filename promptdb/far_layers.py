"""One far store in front of another: a fast one that forgets, and a large one that keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from promptdb.breaker import Breaker
from promptdb.errors import SharedError
from promptdb.events import note
from promptdb.far import Bytes, FarStore, Pieces, TooLargeError, joined


class FarLayers:
    """Far stores, the fastest first; see :class:`promptdb.far.FarStore` for the contract.

    A value is looked for in order, and what is found behind is put in front too; a layer that fails is passed over, and
    then left alone for a while, and it is an error only if all fail. Writing goes to all: the last layer must take it,
    those in front may fail.
    """

    def __init__(self, layers: Sequence[FarStore]) -> None:
        self._layers = layers
        # Who is full can still be read.
        self._reading = [Breaker(f"reading from {layer.name}, a layer of the shared store,") for layer in layers]
        self._writing = [Breaker(f"writing to {layer.name}, a layer of the shared store,") for layer in layers]
        self.name = " ".join(layer.name for layer in layers)
        self.first_batch = min(layer.first_batch for layer in layers)  # what is not in front is asked for behind
        self._with_leases = next((at for at, layer in enumerate(layers) if layer.has_leases), -1)
        self.has_leases = self._with_leases >= 0

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Return which values are in any layer."""
        found = [False] * len(keys)

        def ask(layer: FarStore) -> None:
            missing = [at for at, there in enumerate(found) if not there]
            for at, there in zip(missing, layer.exists([keys[at] for at in missing]), strict=True):
                found[at] = there

        self._each(ask, found)
        return found

    def get(self, keys: Sequence[str], sizes: Sequence[int] | None = None) -> list[Pieces | None]:
        """Return values from the first layer that has them."""
        found: list[Pieces | None] = [None] * len(keys)
        passed: list[FarStore] = []

        def ask(layer: FarStore) -> None:
            missing = [at for at, value in enumerate(found) if value is None]
            known = None if sizes is None else [sizes[at] for at in missing]
            new = []
            for at, value in zip(missing, layer.get([keys[at] for at in missing], known), strict=True):
                if value is not None:
                    found[at] = value
                    new.append((keys[at], value))
            for front in passed if new else ():
                try:
                    front.put([(key, joined(value)) for key, value in new])
                except SharedError as error:
                    note("shared_not_in_front", f"{front.name} did not take what was behind it: {error}")
            passed.append(layer)

        self._each(ask, found)
        return found

    def _each(self, ask: Callable[[FarStore], None], found: Sequence[object]) -> None:
        """Ask layer by layer until everything is found; raise the last failure if all of them fail."""
        failures: list[SharedError] = []
        for at, layer in enumerate(self._layers):
            if all(found):
                return
            failure = self._try(self._reading[at], partial(ask, layer))
            if failure is not None:
                failures.append(failure)
        if len(failures) == len(self._layers):
            raise failures[-1]

    @staticmethod
    def _try(breaker: Breaker, work: Callable[[], object]) -> SharedError | None:
        """Do something with a layer unless it has failed just now; return what went wrong."""
        if not breaker.allows():
            return SharedError(f"it is left alone for a while: {breaker.last_failure}")
        try:
            work()
        except TooLargeError as error:  # that it said so shows that it works
            breaker.succeeded()
            return error
        except SharedError as error:
            breaker.failed(str(error))
            return error
        except BaseException as error:
            breaker.failed(repr(error))
            raise
        breaker.succeeded()
        return None

    def put(self, items: Sequence[tuple[str, Bytes]]) -> list[bool]:
        """Create values in all layers, the last one first: what is in front is then behind it as well."""
        created = self._layers[-1].put(items)
        for at in reversed(range(len(self._layers) - 1)):
            failure = self._try(self._writing[at], partial(self._layers[at].put, items))
            if failure is not None:
                note("shared_not_in_front", f"{self._layers[at].name} did not take what is behind it: {failure}")
        return created

    def delete(self, keys: Sequence[str]) -> None:
        """Remove values from all layers."""
        for at, layer in enumerate(self._layers[:-1]):
            self._try(self._writing[at], partial(layer.delete, keys))
        self._layers[-1].delete(keys)

    def lease(self, keys: Sequence[str], holder: str, ttl_s: float) -> list[float]:
        """Take keys in the first layer that knows leases."""
        left_s = [0.0] * len(keys)

        def ask() -> None:
            left_s[:] = self._layers[self._with_leases].lease(keys, holder, ttl_s)

        if self.has_leases:
            self._try(self._writing[self._with_leases], ask)
        return left_s

    def release(self, keys: Sequence[str], holder: str) -> None:
        """Give them back there."""
        if self.has_leases:
            self._try(self._writing[self._with_leases], partial(self._layers[self._with_leases].release, keys, holder))

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys of the last layer, which keeps most."""
        return self._layers[-1].list(prefix)

    def facts(self) -> dict[str, str | int]:
        """Return what all layers say, each with its number."""
        return {
            f"{number} {name}": value
            for number, layer in enumerate(self._layers, 1)
            for name, value in layer.facts().items()
        }

    def close(self) -> None:
        """Release all."""
        for layer in self._layers:
            layer.close()
