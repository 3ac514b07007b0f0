"""Opening a far store by its URL; the client of an engine is imported when a URL asks for it."""

from __future__ import annotations

from urllib.parse import urlsplit

from promptdb.far import FarStore
from promptdb.shared_options import REDIS_SCHEMES, SharedOptions


def open_far(options: SharedOptions) -> FarStore:
    """Return the store of a URL. Connects when it is used first.

    Raises
    ------
    SharedError
        The client is not installed, or the URL cannot be used.
    """
    stores = [_open(url, options) for url in options.url.split()]
    if len(stores) == 1:
        return stores[0]
    from promptdb.far_layers import FarLayers

    return FarLayers(stores)


def _open(url: str, options: SharedOptions) -> FarStore:
    if urlsplit(url).scheme in REDIS_SCHEMES:
        from promptdb.far_redis import FarRedis

        return FarRedis(url, options)
    from promptdb.far_objects import FarObjects

    return FarObjects(url, options)
