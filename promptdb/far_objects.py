"""Object storage and shared directories as a far store, through obstore: S3 and compatibles, Google, Azure, files.

A value is an object. It is created by one conditional put, so that it shows whole or not at all; its checksum stands in
front of it, because a directory may show a file that is not all there yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from struct import Struct
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from xxhash import xxh3_128

from promptdb.errors import SharedError
from promptdb.far import Bytes, Pieces
from promptdb.shared_options import SharedOptions, without_secrets

Item = TypeVar("Item")
Found = TypeVar("Found")

_HEAD = Struct("<4sQ16s")
_MAGIC = b"pdb1"
# A miss costs a round trip each: a lookup starts with so many keys, and goes on only if they were there.
_LOOKUP_KEYS = 16
_CONNECTIONS = 16
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
# Larger objects are not ours, and would fill the memory.
_MOST_BYTES = 4 << 30


class FarObjects:
    """A bucket, or a directory; see :class:`promptdb.far.FarStore` for the contract.

    Parameters
    ----------
    url : ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``, ``az://CONTAINER/PATH``, ``file:///DIRECTORY``. Its query
        goes to obstore: ``endpoint``, ``region``, ``allow_http``, ... Secrets come from the environment, as the clouds'
        own tools read it.
    """

    def __init__(self, url: str, options: SharedOptions) -> None:
        self._obstore = _import()
        parts = urlsplit(url)
        self._is_local = parts.scheme == "file"
        self._options = options
        self._config = dict(parse_qsl(parts.query))
        self._url = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + "/", "", ""))
        self._lock = threading.Lock()
        self._opened: Any = None
        self._pool: ThreadPoolExecutor | None = None
        self.name = without_secrets(url)
        self.first_batch = _LOOKUP_KEYS
        self.has_leases = False  # objects do not end by themselves, and clocks of machines differ

    # Connections

    def _store(self) -> Any:
        with self._lock:
            if self._opened is None:
                with self._asking():
                    self._opened = self._open()
            return self._opened

    def _open(self) -> Any:
        from obstore import store as stores

        from_url: Any = stores.from_url

        if self._is_local:
            return from_url(self._url, mkdir=True)
        limits = {
            "timeout": timedelta(seconds=self._options.deadline_s),
            "read_timeout": timedelta(seconds=self._options.timeout_s),
            "connect_timeout": timedelta(seconds=self._options.connect_timeout_s),
        }
        config, client = dict(self._config), dict(limits)
        if "allow_http" in config or config.get("endpoint", "").startswith("http://"):
            client["allow_http"] = config.pop("allow_http", "true") != "false"  # type: ignore[assignment]
        # The breaker decides when to try again.
        store = from_url(self._url, config=config, client_options=client, retry_config={"max_retries": 0})
        self._check_bucket(store)
        return store

    def _check_bucket(self, store: Any) -> None:
        """Tell a missing bucket from a missing object: later, both look alike."""
        try:
            next(iter(self._obstore.list(store, chunk_size=1)), None)
        except Exception as error:
            text = str(error)
            if isinstance(error, PermissionError) or "AccessDenied" in text:
                return  # who may not list may still read
            if isinstance(error, FileNotFoundError) or any(each in text for each in _NO_BUCKET):
                raise SharedError(f"{self.name}: there is no such bucket", "create it, or check its name") from error
            raise

    def _each(self, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """Do something for many items, some at a time."""
        with self._asking():
            if len(items) <= 1:
                return [work(item) for item in items]
            with self._lock:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_CONNECTIONS, "promptdb-objects")
            return list(self._pool.map(work, items))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except SharedError:
            raise
        # obstore's own errors derive from Exception, or from the builtin that fits.
        except Exception as error:
            if isinstance(error, (TypeError, AttributeError, AssertionError)):
                raise
            raise _translated(error, self.name) from error

    # The contract

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Return which objects are there: a request each, some at a time."""
        store = self._store()

        def is_there(key: str) -> bool:
            try:
                self._obstore.head(store, _path(key))
            except FileNotFoundError:
                return False
            return True

        return self._each(is_there, keys)

    def get(self, keys: Sequence[str], sizes: Sequence[int] | None = None) -> list[Pieces | None]:
        """Return values: a request each, some at a time."""
        store = self._store()

        def fetch(key: str) -> Pieces | None:
            try:
                answer = self._obstore.get(store, _path(key))
                if answer.meta["size"] > _MOST_BYTES:
                    return None
                return _whole(memoryview(answer.bytes()))
            except FileNotFoundError:
                return None

        return self._each(fetch, keys)

    def put(self, items: Sequence[tuple[str, Bytes]]) -> list[bool]:
        """Create objects, each by one conditional request."""
        store = self._store()

        def create(item: tuple[str, Bytes]) -> bool:
            key, value = item
            view = memoryview(value)
            content = b"".join((_HEAD.pack(_MAGIC, view.nbytes, xxh3_128(view).digest()), view))
            try:
                self._obstore.put(store, _path(key), content, mode="create", use_multipart=False)
            except FileExistsError:
                return False
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

        return self._each(create, items)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects."""
        store = self._store()

        def remove(key: str) -> None:
            try:
                self._obstore.delete(store, _path(key))
            except FileNotFoundError:
                return

        self._each(remove, keys)

    def lease(self, keys: Sequence[str], holder: str, ttl_s: float) -> list[float]:
        """Take nothing: two may compute the same, and the first one's result stays."""
        return [0.0] * len(keys)

    def release(self, keys: Sequence[str], holder: str) -> None:
        """Give nothing back."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield keys, a thousand a request."""
        store = self._store()
        with self._asking():
            for page in self._obstore.list(store, prefix.rstrip("/")):
                for entry in page:
                    yield _key(str(entry["path"]))

    def facts(self) -> dict[str, str | int]:
        """Object stores say nothing of themselves."""
        self._store()
        return {"server": "a directory" if self._is_local else "object storage"}

    def close(self) -> None:
        """Stop the threads."""
        with self._lock:
            pool, self._pool, self._opened = self._pool, None, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _path(key: str) -> str:
    """Return where a key's object is: a directory should not hold all of millions."""
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}{name[:2]}/{name}"


def _key(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder.rpartition('/')[0]}/{name}".lstrip("/")


def _whole(content: memoryview) -> Pieces | None:
    """Return a value's bytes, or None if they are cut off, or another program's."""
    if len(content) < _HEAD.size:
        return None
    magic, size, checksum = _HEAD.unpack_from(content)
    value = content[_HEAD.size :]
    is_sound = magic == _MAGIC and size == len(value) and xxh3_128(value).digest() == checksum
    return [value] if is_sound else None


def _import() -> Any:
    try:
        import obstore
        import obstore.exceptions
    except ImportError as error:
        raise SharedError(
            "the client for object storage is not installed", "pip install 'promptdb[objects]'"
        ) from error
    return obstore


def _translated(error: Exception, name: str) -> SharedError:
    text = " ".join(str(error).partition("Debug source:")[0].split())[:300]
    kind = type(error).__name__
    lower = text.lower()
    if "certificate" in lower:
        return SharedError(f"{name}: TLS fails: {text}", "check the certificate's dates and name, and SSL_CERT_FILE")
    if (
        isinstance(error, PermissionError)
        or kind in ("PermissionDeniedError", "UnauthenticatedError")
        or "403 Forbidden" in text
    ):
        return SharedError(
            f"{name}: access denied: {text}",
            "check the credentials (AWS_ACCESS_KEY_ID, ...) and their rights; a full quota looks the same",
        )
    if "timed out" in lower or "timeout" in lower or isinstance(error, TimeoutError):
        return SharedError(f"{name}: no answer in time: {text}", "timeout_s=SECONDS in the URL waits longer")
    if kind == "NotSupportedError" or "NotImplemented" in text:
        return SharedError(
            f"{name}: it cannot create objects conditionally: {text}", "use a store that can: S3, GCS, Azure"
        )
    if getattr(error, "errno", None) == 28 or "no space" in lower:
        return SharedError(f"{name}: it is full: {text}", "free space there")
    return SharedError(f"{name}: {text or kind}", "check the URL of the shared store, its endpoint and the network")
