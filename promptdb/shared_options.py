"""Where the shared store is and how it is used: what a URL, the environment or the store's own setting say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from promptdb.errors import CorruptDataError, InputTypeError, SharedError
from promptdb.format import META, pack_record, unpack_record
from promptdb.tables import Reader, Writer
from promptdb.userkey import KEY_BYTES, find_key

SHARED_VARIABLE = "PROMPTDB_SHARED"
SIGN_VARIABLE = "PROMPTDB_SHARED_SIGN"
TRUST_VARIABLE = "PROMPTDB_SHARED_TRUST"
PASSWORD_VARIABLE = "PROMPTDB_SHARED_PASSWORD"
SHARED_KEY_VARIABLES = ("PROMPTDB_SHARED_KEY", "PROMPTDB_SHARED_KEY_FILE")
NONE = "none"

_KEY = b"shared"
REDIS_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster")
OBJECT_SCHEMES = ("s3", "s3a", "gs", "az", "file")
_SECONDS = ("timeout_s", "connect_timeout_s", "deadline_s", "ttl_s", "lease_s")
_FLAGS = ("readonly",)


@dataclass(frozen=True)
class SharedOptions:
    """How a shared store is used. Settings may stand in the query of its first URL: ``redis://host?timeout_s=2``.

    Attributes
    ----------
    url : where it is; several, separated by blanks, are layers, the fastest first.
    required : a failure of the far side is an error of the call that met it; otherwise it is a miss.
    timeout_s : how long one operation may wait for more from the far side.
    connect_timeout_s : how long connecting may take.
    deadline_s : how long a call may wait for everything that it fetches.
    ttl_s : how long what is written lives there, if the engine can tell (Redis can).
    lease_s : for how long at most others are told what is computed here, so that they may wait for it; 0: they are not,
        and nobody is waited for. Object stores and directories do without.
    concurrency : how many values are fetched or sent at once.
    readonly : nothing is written there.
    sign_with : file with the private key that values are signed with; see :mod:`promptdb.signing`.
    trust : file with the public keys of those whose values are used; without it, values need no signature.
    key : 32 bytes that a team shares; what lies in the shared store is then encrypted. See
        :class:`promptdb.far_sealed.FarSealed`.
    """

    url: str
    required: bool = False
    timeout_s: float = 1.0
    connect_timeout_s: float = 1.0
    deadline_s: float = 30.0
    ttl_s: float | None = None
    lease_s: float = 60.0
    concurrency: int = 4
    readonly: bool = False
    sign_with: str = ""
    trust: str = ""
    key: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.split():
            raise InputTypeError(f"the URL of a shared store is {self.url!r}", "redis://HOST:PORT, s3://BUCKET/PATH")
        for url in self.url.split():
            if urlsplit(url).scheme not in (*REDIS_SCHEMES, *OBJECT_SCHEMES):
                known = ", ".join(f"{scheme}://" for scheme in (*REDIS_SCHEMES, *OBJECT_SCHEMES))
                raise SharedError(f"{without_secrets(url)!r} is no URL of a shared store", f"known are {known}")
        for name in _SECONDS:
            value = getattr(self, name)
            is_off = name == "lease_s" and value == 0
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not is_off and not (is_number and value > 0):
                raise SharedError(f"{name} of the shared store is {value!r}", "give a number of seconds above zero")
        if not isinstance(self.key, bytes) or len(self.key) not in (0, KEY_BYTES):
            raise InputTypeError(
                f"the key of a shared store is not {KEY_BYTES} bytes", "`openssl rand -hex 32` makes one"
            )
        if type(self.concurrency) is not int or not 1 <= self.concurrency <= 64:
            raise SharedError(f"concurrency of the shared store is {self.concurrency!r}", "give a number from 1 to 64")

    @classmethod
    def of_url(cls, url: str, *, required: bool = False, environment: Mapping[str, str] = os.environ) -> SharedOptions:
        """Return the options that URLs give; what is not ours in their queries stays there, for the client.

        Keys come from the environment: ``PROMPTDB_SHARED_SIGN``, ``PROMPTDB_SHARED_TRUST``, and ``PROMPTDB_SHARED_KEY``
        or ``PROMPTDB_SHARED_KEY_FILE``.
        """
        options = cls(
            url,
            required=required,
            sign_with=environment.get(SIGN_VARIABLE, ""),
            trust=environment.get(TRUST_VARIABLE, ""),
            key=find_key(None, SHARED_KEY_VARIABLES, environment) or b"",
        )
        kept: list[str] = []
        found: dict[str, Any] = {}
        for each in url.split():
            parts = urlsplit(each)
            rest = []
            for name, value in parse_qsl(parts.query, keep_blank_values=True):
                if name not in (*_SECONDS, *_FLAGS, "concurrency"):
                    rest.append((name, value))
                elif not kept:
                    found[name] = _read(name, value)
            kept.append(urlunsplit(parts._replace(query=urlencode(rest))))
        return replace(options, url=" ".join(kept), **found)


def _read(name: str, value: str) -> float | int | bool:
    try:
        if name in _FLAGS:
            return {"1": True, "true": True, "0": False, "false": False}[value.lower()]
        return int(value) if name == "concurrency" else float(value)
    except (KeyError, ValueError):
        raise SharedError(f"{name}={value} in the URL of the shared store", "give a number") from None


def without_secrets(url: str) -> str:
    """Return URLs without passwords and queries, to be shown and logged."""
    shown = []
    for each in url.split():
        parts = urlsplit(each)
        user, at, host = parts.netloc.rpartition("@")
        user = user.partition(":")[0]
        shown.append(urlunsplit((parts.scheme, f"{user}{at if user else ''}{host}", parts.path, "", "")))
    return " ".join(shown)


def resolve(
    shared: str | SharedOptions | None, required: bool, reader: Reader, environment: Mapping[str, str] = os.environ
) -> SharedOptions | None:
    """Return how a handle shares: as asked for, else as the environment says, else as the store's setting does.

    ``"none"`` is no shared store, wherever it stands. None: nobody says anything.
    """
    if isinstance(shared, SharedOptions):
        return replace(shared, required=shared.required or required)
    if shared is not None and not isinstance(shared, str):
        raise InputTypeError(f"shared must be a URL, not {type(shared).__name__}", 'such as "redis://HOST:PORT"')
    url = shared or environment.get(SHARED_VARIABLE, "").strip() or stored_url(reader)
    if not url or url == NONE:
        if required:
            raise SharedError("a shared store is required, and none is named", f"give shared, or set {SHARED_VARIABLE}")
        return None
    return SharedOptions.of_url(url, required=required, environment=environment)


def stored_url(reader: Reader) -> str:
    """Return the URL that a store has as its setting, or an empty one."""
    data = reader.get(META, _KEY)
    if data is None:
        return ""
    url = unpack_record(_KEY, data).get("url")
    if not isinstance(url, str):
        raise CorruptDataError("the setting of the shared store cannot be read", "set it again: `promptdb shared set`")
    return url


def store_url(writer: Writer, url: str) -> None:
    """Set the URL that a store has as its setting; an empty one takes it away.

    Raises
    ------
    SharedError
        It is no URL of a shared store, or holds a password: whoever can read the store would have it.
    """
    if not url:
        writer.delete(META, _KEY)
        return
    SharedOptions.of_url(url)
    if any(urlsplit(each).password for each in url.split()):
        raise SharedError("a password must not stand in the store", f"leave it out, and set {PASSWORD_VARIABLE}")
    writer.put(META, _KEY, pack_record(_KEY, {"url": url}))
