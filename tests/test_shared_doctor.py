"""``promptdb doctor`` on a store that is shared: every failure of the far side, by name, with what to do about it."""

from __future__ import annotations

import time

import pytest
from archive_tools import put
from cli_tools import run, run_json
from far_servers import free_port, needs_redis, proxy_to, redis_server, write_certificates
from shared_tools import PROMPT

from promptdb import PromptDB
from promptdb.signing import write_key

QUICK = "timeout_s=0.3&connect_timeout_s=0.3"


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in ("", "_SIGN", "_TRUST", "_PASSWORD"):
        monkeypatch.delenv(f"PROMPTDB_SHARED{name}", raising=False)


@pytest.fixture
def path(tmp_path):
    with PromptDB(tmp_path / "db", chunk_tokens=16, quota_bytes=1 << 30) as db:
        put(db, PROMPT)
    return tmp_path / "db"


def examined(path, url, level):
    """Return the findings about the shared store, which has none worse than a level."""
    codes = {"ok": 0, "note": 0, "warning": 1, "error": 2}
    began = time.monotonic()
    found = run_json("doctor", "--db", path, "--shared", url, code=None)["findings"]
    assert time.monotonic() - began < 10
    shared = [each for each in found if each["what"].startswith("shared store")]
    assert max(codes[each["level"]] for each in shared) == codes[level], shared
    return "\n".join(f"{each['level']}: {each['what']}\n{each['hint']}" for each in shared)


def test_no_shared_store(path):
    assert "shared" not in run("doctor", "--db", path, code=None).stdout


def test_a_directory(path, tmp_path):
    found = examined(path, f"file://{tmp_path}/far", "ok")
    assert "answers in" in found
    assert "takes what is sent" in found
    assert list((tmp_path / "far").rglob("*/*/*")) == []
    assert "only read from here" in examined(path, f"file://{tmp_path}/far?readonly=1", "ok")
    run("shared", "set", f"file://{tmp_path}/far", "--db", path)
    assert "takes what is sent" in run("doctor", "--db", path, code=None).stdout


def test_what_waits(path, tmp_path):
    """Spans that have waited for long are told; they are not touched."""
    then = time.time() - 7200
    url = f"redis://127.0.0.1:{free_port()}?{QUICK}"
    with PromptDB(path, shared=url, clock=lambda: then) as db:
        put(db, [1, *PROMPT])
    found = examined(path, f"file://{tmp_path}/far", "warning")
    assert "4 spans wait to be sent, the oldest for 2 hours" in found
    assert "`promptdb push`" in found


@needs_redis()
def test_nobody_there_and_a_server_that_hangs(path, tmp_path):
    assert "cannot be reached" in examined(path, f"redis://127.0.0.1:{free_port()}?{QUICK}", "error")
    with redis_server(tmp_path / "redis") as server, proxy_to(server.port) as proxy:
        proxy.is_silent = True
        assert "no answer in time" in examined(path, f"redis://127.0.0.1:{proxy.port}?{QUICK}", "error")


@needs_redis()
def test_room(path, tmp_path):
    with redis_server(tmp_path / "none") as server:
        assert "no maxmemory" in examined(path, server.url, "warning")
    with redis_server(tmp_path / "lru", maxmemory="64mb", maxmemory_policy="allkeys-lru") as server:
        assert "evicts by allkeys-lru" in examined(path, server.url, "ok")
        assert server.cli("dbsize").strip() == "0"
    with redis_server(tmp_path / "volatile", maxmemory="64mb", maxmemory_policy="volatile-lru") as server:
        assert "spares what has no time to live" in examined(path, server.url, "warning")
    with redis_server(tmp_path / "full", maxmemory="3mb", maxmemory_policy="noeviction") as server:
        assert "noeviction" in examined(path, server.url, "note")
        for number in range(40):
            server.cli("eval", f"pcall(redis.call, 'set', 'k{number}', string.rep('x', 100000))", "0")
        found = examined(path, server.url, "error")
        assert "evicts nothing" in found
        assert "takes nothing: redis" in found
        assert "raise maxmemory" in found


@needs_redis()
def test_passwords_and_rights(path, tmp_path, monkeypatch):
    users = tmp_path / "users.acl"
    users.write_text(
        "user default off\n"
        "user team1 on >right ~team1:* resetchannels -@all +@read +@write +@connection +info\n"
        "user reader on >right ~team1:* resetchannels -@all +@read +@connection\n"
    )
    with redis_server(tmp_path / "acl", aclfile=str(users)) as server:
        where = f"127.0.0.1:{server.port}?prefix=team1"
        assert "wrong user or password" in examined(path, f"redis://team1:wrong@{where}", "error")
        assert "wrong user or password" in examined(path, f"redis://{where}", "error")
        assert "the user may not do that" in examined(path, f"redis://team1:right@{where}2", "error")
        monkeypatch.setenv("PROMPTDB_SHARED_PASSWORD", "right")
        assert "takes what is sent" in examined(path, f"redis://team1@{where}", "warning")
        found = examined(path, f"redis://reader@{where}", "error")
        assert "answers in" in found
        assert "readonly=1 for readers" in found
        assert "only read from here" in examined(path, f"redis://reader@{where}&readonly=1", "ok")


@needs_redis()
def test_certificates(path, tmp_path):
    for days, level, text in (
        (60, "warning", "holds for 60 days"),
        (3, "warning", "expires in 3.0 days"),
        (-1, "error", "expired"),
    ):
        files = write_certificates(tmp_path / f"files{days}", days=days)
        port = free_port()
        tls = {"tls_port": str(port), "tls_cert_file": files["server"], "tls_key_file": files["server_key"]}
        with redis_server(tmp_path / f"tls{days}", port=0, tls_ca_cert_file=files["ca"], tls_auth_clients="no", **tls):
            url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={files['ca']}"
            assert text in examined(path, url, level)
            if days > 0:
                assert "TLS fails" in examined(path, f"rediss://127.0.0.1:{port}", "error")


def test_keys_and_urls(path, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/far"
    assert "no URL of a shared store" in run("doctor", "--db", path, "--shared", "ftp://host", code=2).stdout
    monkeypatch.setenv("PROMPTDB_SHARED_SIGN", str(tmp_path / "none.pem"))
    assert "cannot be read" in examined(path, url, "error")
    monkeypatch.setenv("PROMPTDB_SHARED_SIGN", str(tmp_path / "key.pem"))
    write_key(str(tmp_path / "key.pem"))
    assert "key.pem can be read" in examined(path, url, "ok")
    (tmp_path / "key.pem").chmod(0o644)
    assert "chmod 600" in examined(path, url, "error")
