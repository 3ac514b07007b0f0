"""A link on loopback with a round-trip time and a bandwidth of its own, for benchmarks."""

from __future__ import annotations

import multiprocessing
import queue
import socket
import threading
import time
from contextlib import contextmanager, suppress


class Link:
    """Forwards connections to a port with a round-trip time and a bandwidth that all of them share each way.

    Bytes are delayed, not held up: what is under way does not wait for what went before it to arrive.
    """

    def __init__(self, port: int, trip_s: float, bytes_per_s: float) -> None:
        self._target, self._half_s, self._rate = port, trip_s / 2, bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._free_at = {True: 0.0, False: 0.0}

    def serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            upstream = socket.create_connection(("127.0.0.1", self._target))
            for source, target, is_up in ((client, upstream, True), (upstream, client, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                under_way: queue.Queue = queue.Queue(1 << 16)
                threading.Thread(target=self._take, args=(source, under_way, is_up), daemon=True).start()
                threading.Thread(target=self._give, args=(target, under_way), daemon=True).start()

    def _take(self, source: socket.socket, under_way: queue.Queue, is_up: bool) -> None:
        data = b"."
        while data:
            data = b""
            with suppress(OSError):
                data = source.recv(1 << 16)
            with self._lock:
                begins = max(time.perf_counter(), self._free_at[is_up])
                self._free_at[is_up] = begins + len(data) / self._rate
                arrives = self._free_at[is_up] + self._half_s
            under_way.put((arrives, data))

    def _give(self, target: socket.socket, under_way: queue.Queue) -> None:
        with suppress(OSError):
            while True:
                arrives, data = under_way.get()
                left_s = arrives - time.perf_counter()
                if left_s > 0:
                    time.sleep(left_s)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)


def _serve_link(port: int, trip_s: float, bytes_per_s: float, told: multiprocessing.Queue) -> None:
    link = Link(port, trip_s, bytes_per_s)
    told.put(link.port)
    link.serve()


@contextmanager
def simulated(port: int, trip_s: float, bytes_per_s: float):
    """A link in a process of its own, so that it and the client do not share a Python."""
    told: multiprocessing.Queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=_serve_link, args=(port, trip_s, bytes_per_s, told), daemon=True)
    process.start()
    try:
        yield told.get(timeout=30)
    finally:
        process.terminate()
        process.join()
