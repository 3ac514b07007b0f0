"""What a client needs of Google's object storage, in this process: the XML API as Google documents it.

No emulator that can be installed speaks that API with its conditions, so this is no proof that Google's servers do
what is written; it holds the client to asking for it.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

BUCKET = "promptdb"
_FACTS = {"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def _asked(self) -> tuple[str, str]:
        bucket, _, name = urllib.parse.urlsplit(self.path).path.lstrip("/").partition("/")
        return bucket, urllib.parse.unquote(name)

    def _answer(self, status: int, body: bytes = b"", code: str = "", **headers: str) -> None:
        if code:
            body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>".encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self) -> None:
        bucket, name = self._asked()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        condition = self.headers.get("x-goog-if-generation-match")
        with self.server.lock:
            self.server.conditions.add(condition)
            if bucket != BUCKET:
                self._answer(404, code="NoSuchBucket")
            elif condition == "0" and name in self.server.objects:
                self._answer(412, code="PreconditionFailed")
            else:
                self.server.objects[name] = data
                self._answer(200, **{"ETag": '"0"', "x-goog-generation": "1"})

    def do_GET(self) -> None:
        bucket, name = self._asked()
        if bucket != BUCKET:
            self._answer(404, code="NoSuchBucket")
        elif not name:
            self._list()
        elif name in self.server.objects:
            self._answer(200, self.server.objects[name], **_FACTS)
        else:
            self._answer(404, code="NoSuchKey")

    do_HEAD = do_GET  # noqa: N815 - the name is the base class'

    def _list(self) -> None:
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        with self.server.lock:
            found = {name: len(data) for name, data in self.server.objects.items()}
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>0</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name, size in sorted(found.items())
            if name.startswith(asked.get("prefix", ""))
        )
        self._answer(200, f"<?xml version='1.0'?><ListBucketResult>{entries}</ListBucketResult>".encode())

    def do_DELETE(self) -> None:
        with self.server.lock:
            was = self.server.objects.pop(self._asked()[1], None)
        self._answer(204) if was is not None else self._answer(404, code="NoSuchKey")


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.conditions: set[str | None] = set()  # under which objects were to be put
        self.lock = threading.Lock()


@contextmanager
def google_stand_in():
    """Yield the server; :func:`credentials_for` says how a client finds it."""
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def credentials_for(server: _Server) -> str:
    """Return a service account's key that leads to the server, and needs no token."""
    address = f"http://127.0.0.1:{server.server_address[1]}"
    return json.dumps(
        {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    )
