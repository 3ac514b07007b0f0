"""One far store in front of another: a fast one that forgets, and a large one that keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from promptdb.errors import SharedError
from promptdb.far import Bytes, FarStore, Pieces, joined

logger = logging.getLogger("promptdb")


class FarLayers:
    """Far stores, the fastest first; see :class:`promptdb.far.FarStore` for the contract.

    A value is looked for in order, and what is found behind is put in front too; a layer that fails is passed over, and
    an error only if all do. Writing goes to all: the last layer must take it, those in front may fail.
    """

    def __init__(self, layers: Sequence[FarStore]) -> None:
        self._layers = layers
        self.name = " ".join(layer.name for layer in layers)
        self.first_batch = min(layer.first_batch for layer in layers)  # what is not in front is asked for behind
        self._with_leases = next((layer for layer in layers if layer.has_leases), None)
        self.has_leases = self._with_leases is not None

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
                    logger.debug("%s did not take what was behind it: %s", front.name, error)
            passed.append(layer)

        self._each(ask, found)
        return found

    def _each(self, ask: Callable[[FarStore], None], found: Sequence[object]) -> None:
        """Ask layer by layer until everything is found; raise the last failure if all of them fail."""
        failures: list[SharedError] = []
        for layer in self._layers:
            if all(found):
                return
            try:
                ask(layer)
            except SharedError as error:
                failures.append(error)
        if len(failures) == len(self._layers):
            raise failures[-1]

    def put(self, items: Sequence[tuple[str, Bytes]]) -> list[bool]:
        """Create values in all layers, the last one first: what is in front is then behind it as well."""
        created = self._layers[-1].put(items)
        for layer in reversed(self._layers[:-1]):
            try:
                layer.put(items)
            except SharedError as error:
                logger.debug("%s did not take what is behind it: %s", layer.name, error)
        return created

    def delete(self, keys: Sequence[str]) -> None:
        """Remove values from all layers."""
        for layer in self._layers:
            layer.delete(keys)

    def lease(self, keys: Sequence[str], holder: str, ttl_s: float) -> list[float]:
        """Take keys in the first layer that knows leases."""
        return [0.0] * len(keys) if self._with_leases is None else self._with_leases.lease(keys, holder, ttl_s)

    def release(self, keys: Sequence[str], holder: str) -> None:
        """Give them back there."""
        if self._with_leases is not None:
            self._with_leases.release(keys, holder)

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
