"""What a user can do wrong: each ends with one clear line on stderr, a hint, and the right exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_tools import TIMEOUT_S, run, spawn, write_checkpoint

from promptdb import PromptDB

TEXT = "Hello there. General Kenobi"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("wrong") / "model")


@pytest.fixture(scope="module")
def filled(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("wrong") / "filled.promptdb"
    run("put", "--db", path, "--model", model, TEXT)
    return path


@pytest.fixture
def place(tmp_path, filled, model, monkeypatch):
    """A directory to work in, with the environment naming store and model."""
    monkeypatch.setenv("PROMPTDB_PATH", str(filled))
    monkeypatch.setenv("PROMPTDB_MODEL", model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failure(*args, code=2, stdin=None):
    """Run a command that must fail; return what it says."""
    said = run(*args, code=code, stdin=stdin).stderr
    assert "Error: " in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 5
    return said


def test_no_prompt(place):
    assert "TEXT" in failure("get")
    assert "empty" in failure("get", "")
    assert "empty" in failure("get", "-", stdin="")
    assert "one '-'" in failure("put", "-", "-", stdin="x")


def test_no_model(place, monkeypatch):
    (place / "empty").mkdir()
    weights_only = place / "weights-only"
    weights_only.mkdir()
    (weights_only / "config.json").write_text('{"model_type": "llama"}')
    new = place / "new.promptdb"
    for name in ("get", "put"):
        assert "there is no directory" in failure(name, "--model", "./nowhere", TEXT)
        assert "config.json" in failure(name, "--model", "./empty", TEXT)
        assert "no tokenizer" in failure(name, "--model", weights_only, TEXT)
        assert "is a file" in failure(name, "--model", weights_only / "config.json", TEXT)
    failure("put", "--db", new, "--model", "./nowhere", TEXT)
    assert not new.exists()
    assert "Hugging Face" in failure("get", "--model", "nobody/nothing", TEXT)
    monkeypatch.delenv("PROMPTDB_MODEL")
    assert "--model" in failure("get", TEXT)


def test_no_store(place):
    (place / "file").write_text("x")
    (place / "folder").mkdir()
    (place / "folder" / "thing").write_text("x")
    for name in ("stat", "ls", "tree", "models"):
        assert "promptdb put" in failure(name, "--db", place / "none.promptdb")
        assert not (place / "none.promptdb").exists()
        assert "is a file" in failure(name, "--db", "file")
        assert "something else" in failure(name, "--db", "folder")
    assert "empty" in failure("stat", "--db", "")
    assert "promptdb put" in failure("get", "--db", place / "none.promptdb", TEXT)


def test_no_node(place):
    assert "no node ID starts with" in failure("show", "ffff0000", code=1)
    for name in ("show", "rm"):
        for text in ("", "ab", "wxyz"):  # an empty variable must not stand for the only node
            assert "4 or more hexadecimal digits" in failure(name, text)
    assert "knows no model" in failure("ls", "--model", "nosuch", code=1)


def test_wrong_options(place):
    assert "no device" in failure("put", "--device", "nonsense", TEXT)
    assert "torch finds" in failure("put", "--device", "cuda:99", TEXT)
    assert "int8" in failure("get", "--dtype", "int8", TEXT)
    assert "several" in failure("get", "--out", "kv.safetensors", "--file", jsonl(place, '{"text":"a"}\n{"text":"b"}'))
    assert "no directory" in failure("get", "--out", "none/kv.safetensors", TEXT)
    assert "directory" in failure("get", "--out", ".", TEXT)
    assert "No such command" in failure("gte")


def jsonl(place, content):
    path = place / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"prompt": "b"}', "prompts.jsonl:2: the object has neither 'text' nor 'pieces', but 'prompt'"),
        ('\n{"text": "a", "pieces": []}', "prompts.jsonl:2: the object has both"),
        ('{"text": "a"', "prompts.jsonl:1: this is not JSON"),
        ('{"text": 3}', "'text' must be a string, not a number"),
        ('{"text": null}', "not null"),
        ('{"pieces": "ab"}', "'pieces' must be a list of strings, not a string"),
        ('{"pieces": ["a", true]}', "every piece must be a string, not true or false"),
        ("[1]", "a prompt is a JSON object, not a list"),
        ('{"text": ""}', "prompts.jsonl:1: the prompt is empty"),
        ('{"pieces": []}', "the prompt is empty"),
        ('{"text": "\\ud800"}', "prompts.jsonl:1 is not valid Unicode at character 1"),
        (b'{"text": "a"}\n{"text": "\xff"}', "prompts.jsonl:2: byte 0xff is not valid UTF-8"),
        ("[" * 100_000, "prompts.jsonl:1"),
        ("\n\n", "there are no prompts"),
    ],
)
def test_wrong_json_lines(place, content, said):
    path = jsonl(place, content)
    for name in ("put", "get"):
        assert said in failure(name, "--file", path)


def test_wrong_files(place):
    (place / "latin.txt").write_bytes(b"one\ncaf\xe9\n")
    (place / "empty.txt").touch()
    assert "line 2: byte 0xe9 is not valid UTF-8" in failure("put", "--file", "latin.txt")
    assert "is empty" in failure("put", "--file", "empty.txt")
    assert "does not exist" in failure("put", "--file", "none.txt")
    assert "standard input, line 1" in failure("get", "-", stdin=b"\xe9")


def test_a_prompt_that_is_too_long(place):
    path = jsonl(place, json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": "word " * 2000}))
    assert "prompts.jsonl:2: the prompt has" in failure("get", "--file", path)
    db = place / "other.promptdb"
    said = failure("put", "--db", db, "--file", path)
    assert "shorten the prompt; 1 prompt before it is stored" in said
    with PromptDB(db) as store:
        assert store.stat()["num_nodes"] == 1


def test_texts_that_are_not_utf8_in_arguments(place):
    done = spawn("get", b"caf\xe9")
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "Error: argument 1 is not valid Unicode at character 4\nHint: write the text in UTF-8\n"
    )


def test_streams_that_are_closed_or_full(place):
    assert spawn("get", "-", preexec_fn=lambda: os.close(0)).returncode == 2
    assert spawn("stat", preexec_fn=lambda: os.close(1)).returncode == 0
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = spawn("stat", capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2
        assert done.stderr.decode().startswith("Error: the output cannot be written")
        assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_is_met_with_silence(place):
    reading, writing = os.pipe()
    os.close(reading)
    done = spawn("get", TEXT, "--json", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_encoding_that_lacks_characters(place):
    done = spawn("get", TEXT, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert b"\\u2588" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_is_no_traceback(place):
    start = "from promptdb.cli.main import main; print(flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "get", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()  # it is in the command, or nearly
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert b"Traceback" not in said


def test_errors_that_nobody_foresaw_keep_their_traceback(place, monkeypatch):
    monkeypatch.setattr(PromptDB, "stat", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("stat")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(place):
    place.chmod(0o500)
    try:
        assert "cannot be" in failure("put", "--db", place / "new.promptdb", TEXT)
        assert "cannot be written" in failure("get", "--out", place / "kv.safetensors", TEXT)
    finally:
        place.chmod(0o700)
