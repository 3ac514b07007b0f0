"""Encryption and compression from the command line: keys from the environment, and what is said when they are wrong."""

import pytest
from cli_tools import run, run_json

from promptdb import PromptDB
from promptdb.keys import Root, pack_tokens
from promptdb.testing import encode_tokens

ROOT = Root("aa" * 32, "bb" * 32)
KEY, OTHER_KEY = "5e" * 32, "0d" * 32


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Two key files, the first of which is the one in use, and the store's path."""
    monkeypatch.delenv("PROMPTDB_KEY", raising=False)
    files = []
    for name, key in (("store.key", KEY), ("new.key", OTHER_KEY)):
        file = tmp_path / name
        file.write_text(key + "\n")
        file.chmod(0o600)
        files.append(file)
    monkeypatch.setenv("PROMPTDB_KEY_FILE", str(files[0]))
    monkeypatch.setenv("PROMPTDB_PATH", str(tmp_path / "store.promptdb"))
    with PromptDB() as db:
        packed = pack_tokens([1, 2, 3])
        db.put(ROOT, packed, 0, encode_tokens(packed))
    return files


def test_an_encrypted_store_is_used_like_any_other(keys, tmp_path):
    found = run_json("stat")
    assert (found["is_encrypted"], found["compression"], found["format_version"]) == (True, "off", 3)
    assert "encrypted   yes" in run("stat").stdout
    (node,) = run_json("ls")["nodes"]
    for command in (
        ["show", node["node"]],
        ["tree"],
        ["verify"],
        ["gc", "--dry-run"],
        ["pins"],
        ["models"],
        ["compact"],
    ):
        run(*command)
    run("pin", node["node"], "--name", "é")
    run("backup", str(tmp_path / "copy"))
    assert run_json("check", str(tmp_path / "copy"))["is_sound"]
    assert run_json("rm", "--yes", node["node"])["spans_removed"] == 1


@pytest.mark.parametrize("command", [["stat"], ["ls"], ["verify"], ["gc"], ["limits", "--quota", "1GB"]])
def test_without_the_key(keys, monkeypatch, command):
    monkeypatch.delenv("PROMPTDB_KEY_FILE")
    said = run(*command, code=2).output
    assert "is encrypted, and there is no key" in said
    assert "PROMPTDB_KEY_FILE" in said
    monkeypatch.setenv("PROMPTDB_KEY", OTHER_KEY)
    said = run(*command, code=2).output
    assert "is encrypted with another key" in said
    assert OTHER_KEY not in said


def test_rotating(keys, monkeypatch):
    assert run_json("rotate-key", str(keys[1]))["is_rotated"]
    assert "another key" in run("stat", code=2).output
    monkeypatch.setenv("PROMPTDB_KEY_FILE", str(keys[1]))
    assert run_json("stat")["num_nodes"] == 1
    assert "opens it from now on" in run("rotate-key", str(keys[0])).stdout


def test_wrong_key_files(keys, tmp_path):
    assert "No such file" in run("rotate-key", str(tmp_path / "missing"), code=2).output
    (tmp_path / "short").write_text("abc")
    said = run("rotate-key", str(tmp_path / "short"), code=2).output
    assert "openssl rand -hex 32" in said
    assert run_json("stat")["num_nodes"] == 1


def test_a_plain_store(keys, tmp_path, monkeypatch):
    plain = str(tmp_path / "plain")
    PromptDB(plain, key="").close()
    assert "is not encrypted, but a key was given" in run("stat", "--db", plain, code=2).output
    monkeypatch.delenv("PROMPTDB_KEY_FILE")
    assert run_json("stat", "--db", plain)["is_encrypted"] is False
    assert "is not encrypted" in run("rotate-key", "--db", plain, str(keys[1]), code=2).output


def test_compression(keys):
    assert run_json("limits", "--compression", "zstd")["compression"] == "zstd"
    assert "compression  zstd" in run("limits").stdout
    assert "compression  zstd" in run("stat").stdout
    assert run_json("limits", "--quota", "1GB")["compression"] == "zstd"
    assert run_json("limits", "--compression", "off")["compression"] == "off"
    assert "compression" not in run("limits").stdout
    assert "zstd" in run("limits", "--compression", "rar", code=2).output
