"""put, get, explain and the commands that look at the store: what people and programs see."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_tools import TIMEOUT_S, run, run_json, run_lines, write_checkpoint
from promptdb.cli.main import COMMANDS, cli
from promptdb.cli.predictions import predict
from promptdb.cli.tree import guides

from promptdb import Engine, PromptDB
from promptdb.blobs import TensorView
from promptdb.format import BLOBS, CHILDREN, KV_BLOB
from promptdb.keys import Root, pack_tokens
from promptdb.testing import encode_tokens

TEXT = "Hello there. General Kenobi"
PIECES = ("Hello there.", " General", " Kenobi")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def filled(tmp_path_factory, model):
    """A store with one prompt in three pieces. Tests only read it."""
    path = tmp_path_factory.mktemp("cli") / "filled.promptdb"
    report = run_json("put", "--db", path, "--model", model, *PIECES)
    assert report["tokens_computed"] == report["num_tokens"] == report["tokens_written"]
    assert report["spans_written"] == 3
    return path


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The path of a store, which the environment names."""
    path = tmp_path / "store.promptdb"
    monkeypatch.setenv("PROMPTDB_PATH", str(path))
    yield path
    if path.exists():
        with PromptDB(path) as db:
            assert db.verify() == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_with_its_output(name):
    documentation = Path(__file__).parent.parent / "docs" / "cli.md"
    section = documentation.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert f"$ promptdb {name}" in section


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_line_in_the_list(name):
    command = cli.get_command(None, name)
    assert command.name == name
    assert command.get_short_help_str(200) == COMMANDS[name][1]
    text = run(name, "--help").stdout
    assert re.search(rf"Examples?:\n( .*\n)*  *promptdb {name}", text) or re.search(rf"\| promptdb {name}", text)


def test_put_loads_what_is_stored_and_computes_the_rest(store, model):
    first = run_json("put", "--model", model, TEXT)
    again = run_json("put", "--model", model, TEXT)
    longer = run_json("put", "--model", model, TEXT + "!")
    assert again["tokens_computed"] == again["bytes_written"] == 0
    assert again["tokens_loaded"] == again["num_tokens"] == first["num_tokens"]
    assert longer["tokens_loaded"] == first["num_tokens"]
    assert longer["tokens_computed"] == longer["tokens_written"] == longer["num_tokens"] - first["num_tokens"]
    assert "nothing new to write" in run("put", "--model", model, TEXT).stdout


def test_put_reads_files_and_standard_input(store, model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '\ufeff{"text": "你好", "id": 7}\n\n{"pieces": ["Hello", " there"]}\n{"text": "你好"}', encoding="utf-8"
    )
    text = tmp_path / "prompt.txt"
    text.write_bytes(b"Hello\r\n")
    found = run_lines("put", "--model", model, "--file", prompts, "--file", text)
    assert [each["source"] for each in found] == [f"{prompts}:1", f"{prompts}:3", f"{prompts}:4", str(text)]
    assert [each["tokens_computed"] > 0 for each in found] == [True, True, False, True]
    assert [each["spans_written"] for each in found] == [1, 2, 0, 1]
    run("get", "--model", model, "Hello\r\n")
    run("put", "--model", model, "Hel", "-", stdin="lo there\n")
    assert run_json("get", "--model", model, "Hello there\n")["is_complete"]
    shown = run("put", "--model", model, "--file", prompts).stdout
    assert re.search(r"^3 prompts +\d+ +\d+ +0 ", shown, re.MULTILINE)


def test_get_tells_what_the_model_would_say(filled, model):
    found = run_json("get", "--db", filled, "--model", model, "--logprobs", "--top", "3", TEXT)
    with PromptDB(filled) as db, Engine.from_pretrained(db, model) as engine:
        representation = engine.get(TEXT)
        assert representation.tokens_computed == 0
    logprobs = torch.log_softmax(representation.logits, -1)
    best = logprobs.topk(3)
    assert [each["token_id"] for each in found["next_tokens"]] == best.indices.tolist()
    assert [each["logprob_nats"] for each in found["next_tokens"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert found["next_tokens"][0]["probability"] == pytest.approx(math.exp(best.values[0]), abs=1e-5)
    assert [each["token_id"] for each in found["tokens"]] == list(representation.token_ids)
    assert found["tokens"][0]["logprob_nats"] is None
    stored = [each["logprob_nats"] for each in found["tokens"][1:]]
    assert stored == pytest.approx(representation.token_logprobs.tolist(), abs=1e-6)
    assert "".join(each["text"] for each in found["tokens"]) == found["stored_text"] == TEXT
    shown = run("get", "--db", filled, "--model", model, "--logprobs", TEXT).stdout
    assert "100 %" in shown
    assert "next token" in shown


def test_get_of_a_part_says_where_it_stops(filled, model):
    found = run_json("get", "--db", filled, "--model", model, "Hello there. Generic", code=1)
    assert found["stored_text"] + found["missing_text"] == "Hello there. Generic"
    assert 0 < found["num_stored"] < found["num_tokens"]
    assert not found["is_complete"]
    shown = run("get", "--db", filled, "--model", model, "Hello there. Generic", code=1).stdout
    assert "--compute" in shown
    assert run_json("get", "--db", filled, "--model", model, "Hello there.")["has_logits"]  # a piece ends there
    nothing = run_json("get", "--db", filled, "--model", model, "Zzz", code=1)
    assert (nothing["num_stored"], nothing["next_tokens"], nothing["stored_text"]) == (0, [], "")
    assert run("get", "--db", filled, "--model", model, "--namespace", "other", TEXT, code=1)


def test_get_computes_on_request(store, model):
    run("put", "--model", model, "Hello there.")
    found = run_json("get", "--model", model, "--compute", TEXT)
    assert found["is_complete"]
    assert 0 < found["tokens_computed"] < found["num_tokens"]
    assert found["compute_s"] > 0
    assert run_json("get", "--model", model, TEXT)["next_tokens"] == found["next_tokens"]


def test_get_of_several_prompts_fails_if_one_is_missing(filled, model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"pieces": ["no", "ne"]}))
    found = run_lines("get", "--db", filled, "--model", model, "--file", prompts, code=1)
    assert [each["is_complete"] for each in found] == [True, False]
    found = run_lines("explain", "--db", filled, "--model", model, "--file", prompts, code=1)
    assert [each["is_complete"] for each in found] == [True, False]


def test_explain_names_the_token_where_prompts_part(filled, model):
    found = run_json("explain", "--db", filled, "--model", model, "Hello there. Zeneral", code=1)
    assert found["stored_text"] == "Hello there. "[: len(found["stored_text"])]
    assert found["expected_token"]["text"].endswith("Z")
    assert found["stored_next_tokens"]
    shown = run("explain", "--db", filled, "--model", model, "Hello there. Zeneral", code=1).stdout
    assert "prompt has" in shown
    assert "store has" in shown
    assert "everything is stored" in run("explain", "--db", filled, "--model", model, TEXT).stdout


def test_explain_names_the_identity_that_differs(store, tmp_path):
    ours = write_checkpoint(tmp_path / "ours", seed=1)
    theirs = write_checkpoint(tmp_path / "theirs", seed=2)
    run("put", "--model", ours, TEXT)
    run("put", "--model", theirs, "Something else")
    (other,) = run_json("explain", "--model", theirs, TEXT, code=1)["other_identities"]
    assert other["differs_in"] == ["weights_id"]
    assert other["model_name"] == ours
    assert "other weights" in run("explain", "--model", theirs, TEXT, code=1).stdout
    shown = run("explain", "--model", ours, "--namespace", "tenant", TEXT, code=1).stdout
    assert "nothing is stored for this model and tokenizer in namespace 'tenant'" in shown


def test_explain_says_what_is_not_measured_yet(store, model):
    text = "word after word, " * 20
    run("put", "--model", model, text)
    found = run_json("explain", "--model", model, text)
    assert found["load_s"] is None
    assert found["compute_s"] > 0
    shown = run("explain", "--model", model, text).stdout
    assert "loading them is not measured yet" in shown
    assert "computing them" in shown


def test_a_checkpoint_that_is_new_or_changed_is_not_found_and_the_reason_is_told(store, model, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=5)
    run("put", "--model", model, TEXT)
    assert "the store does not know" in run("get", "--model", other, TEXT, code=1).stderr
    assert "--dtype auto" in run("get", "--model", model, "--dtype", "bfloat16", TEXT, code=1).stderr
    run("put", "--model", other, TEXT)
    write_checkpoint(tmp_path / "other", seed=6)
    assert "have changed" in run("get", "--model", other, TEXT, code=1).stderr
    found = run_json("explain", "--model", other, TEXT, code=1)
    assert not found["is_known_model"]
    assert {each["model_name"] for each in found["other_identities"]} == {model, other}
    assert "have changed" in run("explain", "--model", other, TEXT, code=1).stdout


def test_listing_the_store(filled, model):
    stat = run_json("stat", "--db", filled)
    assert (stat["num_nodes"], stat["num_models"]) == (3, 1)
    listed = run_json("ls", "--db", filled, "--sort", "start")
    assert listed["num_nodes"] == 3
    assert "".join(each["text"] for each in listed["nodes"]) == TEXT
    assert sum(each["num_tokens"] for each in listed["nodes"]) == stat["num_tokens"]
    assert len(run_json("ls", "--db", filled, "--limit", "2")["nodes"]) == 2
    largest = run_json("ls", "--db", filled, "--sort", "size")["nodes"]
    assert largest == sorted(largest, key=lambda each: -each["size_bytes"])
    (tree,) = run_json("tree", "--db", filled)["roots"]
    assert [each["depth"] for each in tree["spans"]] == [0, 1, 2]
    assert [each["parent"] for each in tree["spans"]] == ["", *(each["node"] for each in tree["spans"][:-1])]
    assert [each["node"] for each in tree["spans"]] == [each["node"] for each in listed["nodes"]]
    (cut,) = run_json("tree", "--db", filled, "--depth", "1")["roots"]
    assert (len(cut["spans"]), cut["is_cut"]) == (1, True)
    assert "└── " in run("tree", "--db", filled, "--limit", "2").stdout
    (known,) = run_json("models", "--db", filled)["models"]
    assert (known["model_type"], known["num_nodes"], known["checkpoints"]) == ("llama", 3, [model])
    for chosen in (model, known["weights_id"][:8]):
        assert run_json("ls", "--db", filled, "--model", chosen)["num_nodes"] == 3
    for name in ("stat", "ls", "tree", "models"):
        assert run(name, "--db", filled).stdout


def test_show_describes_a_span_and_its_neighbours(filled):
    first, second, third = run_json("ls", "--db", filled, "--sort", "start")["nodes"]
    found = run_json("show", "--db", filled, second["node"][:16])
    assert (found["parent"], found["children"]) == (first["node"], [third["node"]])
    assert found["logits_after"] == [found["end"]]
    assert found["problems"] == []
    kinds = {blob["kind"]: blob for blob in found["blobs"]}
    assert kinds["kv"]["tensors"]["kv.0"]["shape"] == [4, 2, second["num_tokens"], 16]
    assert found["provenance"]["device"] == "cpu"
    assert "sound" in run("show", "--db", filled, second["node"]).stdout


def test_show_tells_of_damage(store, model):
    run("put", "--model", model, TEXT)
    (node,) = run_json("ls")["nodes"]
    key = bytes.fromhex(node["node"]) + KV_BLOB.encode()
    with PromptDB(store) as db:
        with db.read() as snapshot:
            sound = bytes(snapshot.reader.get(BLOBS, key))
        db._index.transact(lambda writer: writer.put(BLOBS, key, sound[:-1] + bytes([sound[-1] ^ 1])))
    result = run("show", node["node"], code=2)
    assert "DAMAGED" in result.stdout
    assert "checksum" in result.stderr
    out = store.parent / "kv.safetensors"
    assert "promptdb put" in run("get", "--model", model, "--out", out, TEXT, code=2).stderr
    assert list(store.parent.glob("*kv*")) == []
    with PromptDB(store) as db:
        db._index.transact(lambda writer: writer.put(BLOBS, key, sound))


def test_rm_removes_what_stands_on_a_span(store, model):
    run("put", "--model", model, *PIECES)
    run("put", "--model", model, "Hello yourself")
    nodes = run_json("ls", "--sort", "start")["nodes"]
    general = next(node for node in nodes if node["text"] == " General")
    refused = run("rm", general["node"][:12], code=2)
    assert "and 1 more on top of it" in refused.stdout
    assert "--yes" in refused.stderr
    assert run_json("stat")["num_nodes"] == len(nodes)
    kenobi = next(node for node in nodes if node["text"] == " Kenobi")
    removed = run_json("rm", "--yes", general["node"], kenobi["node"])
    assert removed["spans_removed"] == 2
    assert removed["tokens_removed"] == general["num_tokens"] + kenobi["num_tokens"]
    assert run_json("stat")["num_nodes"] == len(nodes) - 2
    assert "no node ID starts" in run("rm", "--yes", general["node"], code=1).stderr
    assert run_json("get", "--model", model, "Hello there.")["is_complete"]


def test_a_terminal_gets_tables_and_no_control_characters_of_the_prompt(store, model):
    pty = pytest.importorskip("pty")
    prompt = "Hello \x1b]0;title\x07[bold]there"
    run("put", "--model", model, prompt)
    ours, theirs = pty.openpty()
    code = f"from promptdb.cli.main import main; import sys; sys.argv[1:] = {['get', '--model', model, prompt]}; main()"
    done = subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, timeout=TIMEOUT_S)
    shown = b""
    while b"log-prob" not in shown:
        shown += __import__("os").read(ours, 65536)
    assert done.returncode == 0
    assert b"\x1b[" in shown
    assert "\x1b]0;" not in shown.decode()
    assert "[bold]there" in shown.decode()


def test_what_needs_no_model_imports_no_heavy_library(filled, model):
    node = run_json("ls", "--db", filled)["nodes"][0]["node"]
    commands = [
        ["--help"], ["get", "--help"], ["stat"], ["tree"], ["ls"], ["models"], ["show", node],
        ["get", "--model", model, "--logprobs", TEXT], ["explain", "--model", model, TEXT],
        ["get", "--model", model, "--out", str(filled.parent / "kv.safetensors"), TEXT],
    ]  # fmt: skip
    code = f"""
import sys
from promptdb.cli.main import cli
for command in {commands!r}:
    assert not cli.main(command, standalone_mode=False), command
    heavy = {{"torch", "transformers", "numpy", "rich"}} & set(sys.modules)
    assert not heavy, (command, heavy)
    light = command != ["--help"] or not {{"lmdb", "tokenizers"}} & set(sys.modules)
    assert light, command
"""
    environment = {"PROMPTDB_PATH": str(filled), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=TIMEOUT_S, stdout=subprocess.PIPE)


def test_predictions_of_every_dtype():
    values = torch.tensor([1.0, -2.0, 3.0, 3.0, -math.inf])
    for name, dtype in {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.items():
        data = memoryview(values.to(dtype).view(torch.uint8).numpy().tobytes())
        found = predict(TensorView(name, (5,), data), 3)
        assert [each.token_id for each in found] == [2, 3, 0]
        assert found[0].logprob_nats == pytest.approx(float(torch.log_softmax(values, -1)[2]), abs=1e-6)


def test_guides_of_a_tree():
    assert guides([0, 1, 2, 1, 0]) == ["├── ", "│   ├── ", "│   │   └── ", "│   └── ", "└── "]


def test_verify_says_what_does_not_hold_and_fixes_it(tmp_path):
    from click.testing import CliRunner

    path = str(tmp_path / "store.promptdb")
    with PromptDB(path) as db:
        packed = pack_tokens([1, 2, 3])
        db.put(Root("00" * 32, "11" * 32), packed, 0, encode_tokens(packed))
        output = CliRunner().invoke(cli, ["verify", "--db", path]).output
        assert output == "1 span: everything holds. The pages were not looked at: others have the store open.\n"
        db._index.transact(lambda writer: [writer.delete(CHILDREN, key) for key, _ in list(writer.scan(CHILDREN))])
    found = CliRunner().invoke(cli, ["verify", "--db", path])
    assert found.exit_code == 1
    assert "verify --fix" in found.output
    found = CliRunner().invoke(cli, ["verify", "--db", path, "--fix", "--json"])
    assert found.exit_code == 1
    assert '"is_fixed": true' in found.output
    assert CliRunner().invoke(cli, ["verify", "--db", path]).exit_code == 0
