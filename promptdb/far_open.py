"""Opening a far store by its URL; the client of an engine is imported when a URL asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from promptdb.far import FarStore
from promptdb.shared_options import REDIS_SCHEMES, SharedOptions


def open_far(options: SharedOptions) -> FarStore:
    """Return the store of a URL. Connects when it is used first.

    Raises
    ------
    SharedError
        The client is not installed, or the URL cannot be used.
    MissingLibraryError
        There is a key, and the library for encryption is not installed.
    """
    stores = [_open(url, options) for url in options.url.split()]
    found = stores[0] if len(stores) == 1 else _layers(stores)
    if not options.key:
        return found
    from promptdb.far_sealed import FarSealed

    return FarSealed(found, options.key)


def _layers(stores: Sequence[FarStore]) -> FarStore:
    from promptdb.far_layers import FarLayers

    return FarLayers(stores)


def _open(url: str, options: SharedOptions) -> FarStore:
    if urlsplit(url).scheme in REDIS_SCHEMES:
        from promptdb.far_redis import FarRedis

        return FarRedis(url, options)
    from promptdb.far_objects import FarObjects

    return FarObjects(url, options)
