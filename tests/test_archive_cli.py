"""``promptdb export`` and ``import``."""

import subprocess
import sys
from pathlib import Path

import pytest
from archive_tools import (
    MODEL,
    OTHER_MODEL,
    ROOTS,
    TIMEOUT_S,
    TOKENIZER,
    check_content,
    check_same,
    exported,
    flip_last,
    lookup,
    put,
    tamper,
)
from cli_tools import command, run, run_json

from promptdb import PromptDB
from promptdb.format import BLOBS
from promptdb.keys import Root


@pytest.fixture
def store(filled, tmp_path):
    filled[0].close()
    return tmp_path / "filled"


def test_commands_move_everything(store, filled, tmp_path):
    _, prompts = filled
    file = tmp_path / "out.archive"
    written = run_json("export", "--db", store, file)
    assert written["num_spans"] > 0
    assert written["num_bytes"] == file.stat().st_size
    assert run("export", "--db", store, file, code=None).exit_code == 2
    shown = run("export", "--db", store, "--force", file).stdout
    assert f"{written['num_spans']:,} spans" in shown
    assert run_json("check", file)["num_spans"] == written["num_spans"]
    found = run_json("import", "--db", tmp_path / "other", file)
    assert found["spans_stored"] == written["num_spans"]
    shown = run("import", "--db", tmp_path / "other", file).stdout
    assert f"{written['num_spans']:,} spans there already" in shown
    with PromptDB(tmp_path / "other") as other:
        check_same(other, prompts)


def test_commands_move_through_a_pipe(store, filled, tmp_path):
    _, prompts = filled
    exporting = subprocess.Popen(
        [*command(), "export", "--db", str(store), "-", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    importing = subprocess.run(
        [*command(), "import", "--db", str(tmp_path / "other"), "-"],
        stdin=exporting.stdout, capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert importing.returncode == 0, importing.stderr
    assert b'"num_spans"' in exporting.stderr.read()
    assert exporting.wait() == 0
    with PromptDB(tmp_path / "other") as other:
        check_same(other, prompts)


def test_a_reader_that_goes_away(store):
    # More than a pipe holds.
    with PromptDB(store) as db:
        for number in range(200):
            put(db, (5000 + number, *range(60)))
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -c 100 | wc -c; echo ${PIPESTATUS[0]}', "bash",
         *command(), "export", "--db", str(store), "-"],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.stdout.split() == ["100", "141"], done.stderr
    assert "Traceback" not in done.stderr


def test_commands_choose(tmp_path):
    with PromptDB(tmp_path / "a", chunk_tokens=4) as db:
        for root in ROOTS:
            put(db, range(8), root=root)
            put(db, [*range(4), 9, 9], root=root)
        db.registry.add_model(MODEL, {"name": "first"})
        db.registry.add_model(OTHER_MODEL, {"name": "second"})
        node = lookup(db, range(8)).steps[1].node.hex()
    store, file = tmp_path / "a", tmp_path / "out.archive"

    def moved(*arguments, code=0, importing=()):
        number = len(list(tmp_path.glob("to*")))
        written = run_json("export", "--db", store, "--force", file, *arguments)
        found = run_json("import", "--db", tmp_path / f"to{number}", file, *importing, code=code)
        assert written["num_spans"] == found["num_spans"]
        with PromptDB(tmp_path / f"to{number}") as db:
            assert db.verify() == []
            return {(root.weights_id, root.namespace): totals["num_nodes"] for root, totals in db.roots()}

    assert moved() == {(MODEL, ""): 3, (MODEL, "tenant"): 3, (OTHER_MODEL, ""): 3}
    assert moved("--model", "first") == {(MODEL, ""): 3, (MODEL, "tenant"): 3}
    assert moved("--model", "cccc", "--namespace", "") == {(OTHER_MODEL, ""): 3}
    assert moved("--namespace", "tenant") == {(MODEL, "tenant"): 3}
    assert moved(node[:12]) == {(MODEL, ""): 2}
    assert moved(node, "--without-prefix", code=1) == {}
    assert moved(importing=["--only-model", "cccc"]) == {(OTHER_MODEL, ""): 3}
    assert moved(importing=["--only-model", "dddd"], code=1) == {}
    assert moved(importing=["--only-tokenizer", TOKENIZER]) == moved()
    assert moved("--namespace", "", "--model", "first", importing=["--namespace", "new"]) == {(MODEL, "new"): 3}
    run("export", "--db", store, "--force", file)
    found = run_json("import", "--db", tmp_path / "to0", file, "--only-model", "second")  # a name that this store knows
    assert (found["spans_present"], found["spans_filtered"]) == (3, 6)
    shown = run("import", "--db", tmp_path / "to9", file, "--only-model", "nobody", code=1)
    assert "promptdb check" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "FILE", "--without-prefix"], "goes with NODE"),
        (["export", "FILE", "abcd", "--model", "m"], "NODE is one span"),
        (["export", "FILE", "xyz"], "no node ID"),
        (["export", "FILE", "0" * 64], "no node ID starts"),
        (["export", "FILE", "--model", "nobody"], "knows no model"),
        (["export", "."], "directory"),
        (["import", "FILE"], "cannot be read"),
        (["import", "FILE", "--max-blob-bytes", "0"], "max-blob-bytes"),
        (["import", "DAMAGED", "--only-tokenizer", "x"], "no tokenizer ID"),
        (["check", "FILE"], "cannot be read"),
        (["check", "."], "no store at"),
        (["import", "TEXT"], "no promptdb archive"),
        (["check", "TEXT"], "no promptdb archive"),
    ],
)
def test_wrong_usage_says_what_to_do(store, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("TEXT").write_text("hello")
    Path("DAMAGED").write_bytes(exported(PromptDB.in_memory()))
    options = [] if arguments[0] == "check" else ["--db", store if arguments[0] == "export" else tmp_path / "new"]
    result = run(*arguments, *options, code=None)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Hint:" in result.stderr or "Usage:" in result.stderr
    if arguments[:2] == ["import", "TEXT"]:
        assert not (tmp_path / "new").exists()  # nothing is created for what is no archive


def test_a_broken_archive_says_how_much_is_in(store, filled, tmp_path):
    _, prompts = filled
    file = tmp_path / "out.archive"
    total = run_json("export", "--db", store, file)["num_spans"]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = run("import", "--db", tmp_path / "other", file, code=2)
    with PromptDB(tmp_path / "other") as other:
        stored = other.stat()["num_nodes"]
        for tokens in prompts:
            check_content(other, tokens)
    assert 0 < stored < total
    assert f"after {stored:,} spans" in result.stderr
    assert f"{stored:,} spans are stored, all of them verified" in result.stderr
    found = run_json("import", "--db", tmp_path / "other", file, code=2)
    assert not found["is_complete"]
    assert found["spans_present"] == stored
    found = run_json("check", file, code=1)
    assert not found["is_sound"]
    assert "ends in the middle" in found["problem"]
    assert "ends in the middle" in run("check", file, code=1).stdout


def test_an_export_with_damage_has_another_exit_code(store, tmp_path):
    with PromptDB(store) as db:
        tamper(db, BLOBS, flip_last(BLOBS))
    found = run_json("export", "--db", store, tmp_path / "out.archive", code=1)
    assert found["num_damaged"] == 1
    assert "verify --fix" in run("export", "--db", store, "--force", tmp_path / "out.archive", code=1).stdout


def test_an_empty_store(tmp_path):
    PromptDB(tmp_path / "empty").close()
    assert run_json("export", "--db", tmp_path / "empty", tmp_path / "x", code=1)["num_spans"] == 0
    assert run_json("import", "--db", tmp_path / "other", tmp_path / "x")["is_complete"]


def test_names_are_any_unicode(tmp_path):
    root = Root(MODEL, TOKENIZER, "Ünïcode 🙂 \x1b[2J\n")
    with PromptDB(tmp_path / "a") as db:
        put(db, range(5), root=root)
    file = tmp_path / "ärchiv 🙂.promptdb"
    run("export", "--db", tmp_path / "a", "--namespace", root.namespace, file)
    run("import", "--db", tmp_path / "b", file)
    with PromptDB(tmp_path / "b") as db:
        assert check_content(db, range(5), root) == 5


def test_moving_needs_no_heavy_library(store, tmp_path):
    code = f"""
import sys
from promptdb.cli.main import cli
for arguments in (["export", "--db", {str(store)!r}, {str(tmp_path / "x")!r}], ["check", {str(tmp_path / "x")!r}],
                  ["import", "--db", {str(tmp_path / "y")!r}, {str(tmp_path / "x")!r}]):
    assert not cli.main(arguments, standalone_mode=False), arguments
    heavy = {{"torch", "transformers", "numpy", "rich", "tokenizers"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE)
