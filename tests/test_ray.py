"""A corpus computed by two machines of a Ray cluster: every token once, and a third machine has nothing left to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
import torch
from cli_tools import run, run_json, write_checkpoint
from far_servers import free_port, needs_redis, redis_server

from promptdb import Engine, PromptDB
from promptdb.errors import ClusterError, IdentityError, ModelNotFoundError
from promptdb.keys import unpack_tokens
from promptdb.ray_jobs import _needs, compute, connected
from promptdb.shared import connect
from promptdb.shared_sync import pull
from promptdb.shares import split

ray = pytest.importorskip("ray")

BEGINNING = "The cache keeps what the model has read, so that the next prompt which begins alike is short. " * 3
TEXTS = [
    *(f"{BEGINNING}Question {number}: what is {number} + {number}?" for number in range(6)),
    *(f"{BEGINNING}Another one, {number}, without a question mark" for number in range(4)),
    BEGINNING,
    "Something else entirely.",
    "Something else again: naïve 你好 🙂",
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two machines in one: each with a processor and a store of its own. Returns where those are."""
    from ray.cluster_utils import Cluster

    paths = [tmp_path_factory.mktemp("machine") / "db" for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        patch.delenv("PROMPTDB_SHARED", raising=False)
        node = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        cluster = Cluster(
            initialize_head=True, head_node_args={**node, "env_vars": {"PROMPTDB_PATH": str(paths[0])}}, connect=False
        )
        try:
            cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", env_vars={"PROMPTDB_PATH": str(paths[1])})
            with connected(cluster.address):
                yield paths
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "llama")


def prefixes(prompts):
    tokens = [tuple(unpack_tokens(prompt.packed)) for prompt in prompts]
    return {each[: end + 1] for each in tokens for end in range(len(each))}


@needs_redis()
def test_every_token_is_computed_once(machines, model, tmp_path):
    with redis_server(tmp_path / "redis") as server, PromptDB(tmp_path / "three", shared=server.url) as db:
        with Engine.from_pretrained(db, model) as engine:
            prompts = [engine.tokenize(text) for text in TEXTS]
            done = list(compute(prompts, {"model": model, "shared": server.url}))
            assert split(prompts, 2).first, "this corpus has to be opened"
            assert sum(each.num_prompts for each in done) == len(TEXTS)
            assert sum(each.tokens_computed for each in done) == len(prefixes(prompts))
            assert sum(each.tokens_fetched for each in done) > 0
            assert pull(db, connect(db)).tokens_stored == len(prefixes(prompts))
            for text, found in zip(TEXTS, engine.run(TEXTS), strict=True):
                assert found.tokens_computed == 0
                ids = torch.tensor([engine.tokenizer(text)["input_ids"]])
                with torch.no_grad():
                    expected = engine.model(ids).logits[0, -1]
                torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
        assert db.verify() == []
    for path in machines:
        with PromptDB(path, shared="none") as local:
            assert local.verify() == []
            assert 0 < local.stat()["num_tokens"] <= len(prefixes(prompts))


def test_a_worker_that_dies_is_replaced(machines, model, tmp_path):
    """The command, with a machine's worker killed as soon as the first share is there; and the command again."""
    lines, url = tmp_path / "prompts.jsonl", f"file://{tmp_path}/far"
    lines.write_text("".join(json.dumps({"text": text.replace("cache", "store")}) + "\n" for text in TEXTS))
    options = ("--model", model, "--file", lines, "--shared", url, "--ray", "auto", "--workers", 1)
    killed = []

    def kill_once(*_):
        workers = [each for each in psutil.process_iter(["name"]) if each.info["name"].startswith("ray::_Actor.comp")]
        if not killed and workers:
            killed.append(workers[0].pid)
            workers[0].kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("promptdb.cli.jobs.Interrupts.check", kill_once)
        found = run_json("warm", *options)
    assert killed
    assert found["num_prompts"] == len(TEXTS)
    with PromptDB(tmp_path / "three", shared=url) as db, Engine.from_pretrained(db, model) as engine:
        texts = [text.replace("cache", "store") for text in TEXTS]
        pull(db, connect(db))
        assert [each.tokens_computed for each in engine.run(texts)] == [0] * len(texts)
        assert found["distinct_tokens"] == len(prefixes([engine.tokenize(text) for text in texts]))
    again = run("warm", *options)
    assert "0 tokens computed" in again.stdout
    assert "1 worker" in again.stderr


def documented():
    """Return the batch job of docs/team.md."""
    text = (Path(__file__).parent.parent / "docs" / "team.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import ray\n.*?)```", text, re.DOTALL)
    return code


def test_the_documented_batch_job(machines, model, tmp_path, capsys):
    code = documented().replace("/models/demo", model).replace("redis://cache.example:6379", f"file://{tmp_path}/far")
    for name, instead in (("num_gpus=1", "num_cpus=1"), ("WORKERS = 8", "WORKERS = 2"), ("load_texts()", "TEXTS")):
        assert name in code
        code = code.replace(name, instead)
    ray.data.DataContext.get_current().enable_progress_bars = False
    names = {"TEXTS": [text.replace("cache", "memory") for text in TEXTS], "__name__": "__main__"}
    exec(compile(code, "docs/team.md", "exec"), names)
    shown = dict(re.findall(r"^(-?[\d.]+) (.*)$", capsys.readouterr().out, re.MULTILINE))
    assert len(shown) == len(TEXTS)
    with PromptDB(tmp_path / "three", shared=f"file://{tmp_path}/far") as db:
        pull(db, connect(db))
        with Engine.from_pretrained(db, model) as engine:
            assert [each.tokens_computed for each in engine.run(names["TEXTS"])] == [0] * len(TEXTS)


def test_what_is_wrong_is_told(machines, model, tmp_path):
    worker = {"model": str(tmp_path / "none"), "shared": f"file://{tmp_path}/far"}
    with Engine.from_pretrained(PromptDB.in_memory(), model) as engine:
        prompts = [engine.tokenize("one")]
    with pytest.raises(ModelNotFoundError, match="none"):
        list(compute(prompts, worker, num_workers=1))
    with pytest.raises(IdentityError, match="tokenizer"):
        list(compute(prompts, {**worker, "model": model, "tokenizer_id": "00" * 32}, num_workers=1))
    assert list(compute([], worker)) == []
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"text": "one"}\n{"text": ""}\n')
    options = ("--model", model, "--file", lines, "--shared", worker["shared"], "--ray", "auto")
    assert ":2: the prompt is empty" in run("warm", *options, code=2).output
    assert "no shared store" in run("warm", *options[:4], *options[6:], "--db", tmp_path / "x", code=2).output
    assert "--workers goes with --ray" in run("warm", *options[:-2], "--workers", 2, code=2).output


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere", "127.0.0.1:x"])
def test_nobody_there(address, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="no Ray at"), connected(address.format(port=free_port())):
        pass


def machine(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


def test_what_a_worker_takes():
    assert _needs([machine(8.0), machine(4.0), machine(0)], None, None) == (2, {"num_gpus": 0, "num_cpus": 4})
    assert _needs([machine(8), machine(4), machine(64, alive=False)], 6, "cpu") == (6, {"num_gpus": 0, "num_cpus": 1})
    assert _needs([machine(96, 8), machine(16, 1), machine(4)], None, None) == (9, {"num_gpus": 1, "num_cpus": 12})
    assert _needs([machine(96, 8)], 2, "cuda") == (2, {"num_gpus": 1, "num_cpus": 12})
    assert _needs([machine(96, 8)], None, "cpu") == (1, {"num_gpus": 0, "num_cpus": 96})
    with pytest.raises(ClusterError, match="no machine"):
        _needs([machine(8, alive=False)], None, None)
