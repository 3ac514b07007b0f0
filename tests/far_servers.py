"""Real servers for the tests of the shared store, on loopback and free ports; each stops what it started."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import ipaddress
import os
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NO_REDIS = "redis-server is not installed: apt-get install redis-server (or valkey)"
REDIS_SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
REDIS_CLI = shutil.which("redis-cli") or shutil.which("valkey-cli")
_START_S = 20.0


def needs_redis():
    """Skip loudly where there is no server; CI installs one, and says that nothing may be skipped."""
    is_required = os.environ.get("PROMPTDB_TEST_SERVERS") == "required"
    return pytest.mark.skipif(REDIS_SERVER is None and not is_required, reason=NO_REDIS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_cluster_port() -> int:
    """Return a free port whose neighbour 10,000 above is free too: nodes of a cluster talk there."""
    for port in random.sample(range(20_000, 45_000), 200):
        bus = ("127.0.0.1", port + 10_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)), socket.create_server(bus):
            return port
    raise AssertionError("no two free ports")


class RedisServer:
    """One redis-server process. ``options`` are its command line: ``maxmemory="64mb"``."""

    def __init__(self, directory: Path, *, port: int | None = None, **options: str) -> None:
        assert REDIS_SERVER is not None, NO_REDIS
        self.port = port or free_port()
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "no",
            "dir": str(self.directory),
            "logfile": str(self.directory / "log"),
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        self.process: subprocess.Popen | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [part for name, value in self.options.items() for part in (f"--{name}", *_words(name, value))]
        self.process = subprocess.Popen([REDIS_SERVER, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        ends = time.monotonic() + _START_S
        port = int(self.options.get("tls-port", self.port))
        while time.monotonic() < ends:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self.stop()
        raise AssertionError(f"redis-server did not start: {(self.directory / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(_START_S)

    stop = kill

    def cli(self, *arguments: str) -> str:
        command = [REDIS_CLI, "-h", "127.0.0.1", "-p", str(self.port), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _words(name: str, value: str) -> list[str]:
    return value.split(" ") if name == "user" else [value]


@contextmanager
def redis_server(directory: Path, **options: str):
    server = RedisServer(directory, **options)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def redis_cluster(directory: Path, num_nodes: int = 6):
    """Three primaries with a replica each, ready to fail over."""
    nodes = []
    try:
        for number in range(num_nodes):
            options = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", "repl-diskless-sync-delay": "0"}
            nodes.append(RedisServer(directory / str(number), port=free_cluster_port(), **options))
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        nodes[0].cli("--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes")
        ends = time.monotonic() + 2 * _START_S
        while not all(_is_ready(node) for node in nodes):
            assert time.monotonic() < ends, "the cluster did not come up"
            time.sleep(0.1)
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def _is_ready(node: RedisServer) -> bool:
    if "cluster_state:ok" not in node.cli("cluster", "info"):
        return False
    replication = node.cli("info", "replication")
    return "role:master" in replication or "master_link_status:up" in replication


class Proxy:
    """Forwards TCP connections, and can be slow, silent, or cut them off.

    ``delay_s`` is added to what goes each way. ``is_silent``: bytes are taken, and nothing is ever answered.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.delay_s = 0.0
        self.is_silent = False
        self.num_requests = 0  # pieces that came from clients
        self._cut_after: int | None = None
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, num_bytes: int) -> None:
        """Close every connection once so many more bytes have come from clients."""
        self._cut_after = num_bytes

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                self.num_requests += is_client
                if self.is_silent:
                    continue
                if self.delay_s:
                    time.sleep(self.delay_s)
                if is_client and self._cut_after is not None:
                    data = data[: self._cut_after]
                    self._cut_after -= len(data)
                    target.sendall(data)
                    if self._cut_after <= 0:
                        break
                    continue
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            each.close()


@contextmanager
def proxy_to(port: int):
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


def write_certificates(directory: Path, *, days: int = 30) -> dict[str, str]:
    """Write a certificate authority's and a server's certificate; with negative ``days``, the latter has expired."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "promptdb tests")])

    def write(name: str, key, subject, ends, extension) -> None:
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=60))
            .not_valid_after(ends)
            .add_extension(extension, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .sign(authority_key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        (directory / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
        (directory / f"{name}.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        paths[name] = str(directory / f"{name}.crt")
        paths[f"{name}_key"] = str(directory / f"{name}.key")

    usage = {"digital_signature": False, "content_commitment": False, "key_encipherment": False}
    usage |= {"data_encipherment": False, "key_agreement": False, "key_cert_sign": True, "crl_sign": True}
    usage |= {"encipher_only": False, "decipher_only": False}
    write("ca", authority_key, authority, now + datetime.timedelta(days=365), x509.KeyUsage(**usage))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    key = ec.generate_private_key(ec.SECP256R1())
    write("server", key, server, now + datetime.timedelta(days=days), names)
    return paths


CEPH = Path(__file__).parent / "ceph-rgw"
NO_CEPH = "no S3 server: apt-get install ceph-mon ceph-mgr ceph-osd radosgw ceph-common (as root)"


def needs_ceph():
    """Skip loudly where Ceph's S3 gateway is not installed."""
    can_run = shutil.which("radosgw") is not None and hasattr(os, "geteuid") and os.geteuid() == 0
    is_required = os.environ.get("PROMPTDB_TEST_SERVERS") == "required"
    return pytest.mark.skipif(not can_run and not is_required, reason=NO_CEPH)


def create_bucket(host: str, bucket: str) -> None:
    """Create a bucket by a request signed as S3 wants it (version 4)."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    day, empty = now[:8], hashlib.sha256(b"").hexdigest()
    headers = {"host": host, "x-amz-content-sha256": empty, "x-amz-date": now}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = f"PUT\n/{bucket}\n\n{lines}\n{names}\n{empty}"
    scope = f"{day}/us-east-1/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = b"AWS4testsecret"
    for part in (day, "us-east-1", "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    proof = f"AWS4-HMAC-SHA256 Credential=testkey/{scope}, SignedHeaders={names}, Signature={signature}"
    asked = urllib.request.Request(f"http://{host}/{bucket}", method="PUT", headers={**headers, "Authorization": proof})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 200


@contextmanager
def s3_server(directory: Path):
    """Ceph's S3 gateway, with a bucket ``promptdb``; yields its address."""
    port = free_port()
    environment = {**os.environ, "OBJSTORE": "memstore"}
    log = directory / "start.log"
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("wb") as output:
            command = [str(CEPH), str(directory / "ceph"), str(port), str(free_port())]
            done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=120, check=False)
        assert done.returncode == 0, log.read_text()[-2000:]
        create_bucket(f"127.0.0.1:{port}", "promptdb")
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([str(CEPH), str(directory / "ceph"), "stop"], check=False, timeout=30)


AZURITE = shutil.which("azurite-blob")
NO_AZURITE = "no Azure server: npm install -g azurite@3.35.0"
# The account that every Azurite has; its key is no secret.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def needs_azurite():
    """Skip loudly where Azurite, Microsoft's own emulator of its object storage, is not installed."""
    is_required = os.environ.get("PROMPTDB_TEST_SERVERS") == "required"
    return pytest.mark.skipif(AZURITE is None and not is_required, reason=NO_AZURITE)


def create_container(address: str, container: str) -> None:
    """Create a container by a request signed with the account's key."""
    now = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": now, "x-ms-version": "2021-08-06"}
    named = "".join(f"{name}:{value}\n" for name, value in headers.items())
    resource = f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{container}\nrestype:container"
    text = "PUT" + 12 * "\n" + named + resource
    signature = base64.b64encode(hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), "sha256")).decode()
    headers |= {"Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}", "Content-Length": "0"}
    asked = urllib.request.Request(f"{address}/{container}?restype=container", method="PUT", headers=headers)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 201


@contextmanager
def azure_server(directory: Path):
    """Azurite, with a container ``promptdb``; yields its address, which ends with the account."""
    assert AZURITE is not None, NO_AZURITE
    directory.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), directory / "log"
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, stdout=output, stderr=output)
    try:
        ends = time.monotonic() + 2 * _START_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < ends, log.read_text()[-2000:]
            time.sleep(0.05)
        address = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
        create_container(address, "promptdb")
        yield address
    finally:
        process.kill()
        process.wait(_START_S)
