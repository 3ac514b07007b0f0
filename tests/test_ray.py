"""A corpus computed by two machines of a Ray cluster: every token once, and a third machine has nothing left to do."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from cli_tools import run, run_json, write_checkpoint
from far_servers import free_port, needs_redis, redis_server

from promptdb import Engine, PromptDB
from promptdb.errors import ClusterError, PromptTooLongError, StoreError
from promptdb.keys import unpack_tokens
from promptdb.ray_jobs import _needs, _Pool, compute, connected
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


# Every process has a store of its own, as if it were another machine.
SITE = """
import os
os.environ["PROMPTDB_PATH"] = os.path.join({directory!r}, str(os.getpid()))
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A Ray of two processors, one for a worker. Returns the directory of the workers' stores."""
    directory, site = tmp_path_factory.mktemp("machines"), tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE.format(directory=str(directory)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{site}:{Path(__file__).parent.parent}")
        patch.delenv("PROMPTDB_SHARED", raising=False)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield directory
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "llama")


def prefixes(prompts):
    tokens = [tuple(unpack_tokens(prompt.packed)) for prompt in prompts]
    return {each[: end + 1] for each in tokens for end in range(len(each))}


def stores(machines):
    return [path for path in machines.iterdir() if (path / "data.mdb").exists()]


def workers():
    """Return the processes of this Ray that are workers."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if each.name().startswith("ray::_Actor")]


@needs_redis()
def test_every_token_is_computed_once(machines, model, tmp_path):
    """Although one of the workers is killed as soon as the first share is there, and has a new machine then."""

    def wait_for_both():
        """Nothing begins before two machines have the model, so that both take part."""
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            if len(stores(machines)) >= 2 and all(knows_model(path) for path in stores(machines)):
                return
            time.sleep(0.1)

    with redis_server(tmp_path / "redis") as server, PromptDB(tmp_path / "three", shared=server.url) as db:
        with Engine.from_pretrained(db, model) as engine:
            prompts = [engine.tokenize(text) for text in TEXTS]
            assert split(prompts, 2).first, "this corpus has to be opened"
            running = compute(prompts, {"model": model, "shared": server.url}, num_workers=2, check=wait_for_both)
            done = [next(running)]
            workers()[0].kill()
            done += running
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
    for path in stores(machines):
        with PromptDB(path, shared="none") as local:
            assert local.verify() == []


def knows_model(path):
    try:
        with PromptDB(path, readonly=True) as db:
            return bool(db.registry.models())
    except StoreError:  # it is just being made
        return False


def test_the_command(machines, model, tmp_path):
    lines, url = tmp_path / "prompts.jsonl", f"file://{tmp_path}/far"
    texts = [text.replace("cache", "store") for text in TEXTS]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = run_json("warm", "--model", model, "--file", lines, "--shared", url, "--ray", "auto", "--workers", 1)
    assert (found["num_prompts"], found["num_skipped"]) == (len(TEXTS), 0)
    assert found["tokens_computed"] == found["distinct_tokens"]
    with PromptDB(tmp_path / "three", shared=url) as db, Engine.from_pretrained(db, model) as engine:
        pull(db, connect(db))
        assert found["distinct_tokens"] == len(prefixes([engine.tokenize(text) for text in texts]))
        assert [each.tokens_computed for each in engine.run(texts)] == [0] * len(texts)


def documented():
    """Return the batch job of docs/team.md."""
    text = (Path(__file__).parent.parent / "docs" / "team.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import ray\n.*?)```", text, re.DOTALL)
    return code


@pytest.mark.slow
def test_the_documented_batch_job(machines, model, tmp_path, capsys):
    code = documented().replace("/models/demo", model).replace("redis://cache.example:6379", f"file://{tmp_path}/far")
    for name, instead in (("num_gpus=1", "num_cpus=1"), (", 8\n", ", 1\n"), ("load_texts()", "TEXTS")):
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


def test_what_workers_raise_arrives(machines):
    class Refusing:
        """What a worker looks like from afar that cannot begin."""

        def root(self):
            raise PromptTooLongError("too long", "shorten it")

    class Another:
        """One with weights of its own."""

        def root(self):
            return str(os.getpid())

        def compute(self, prompts, bases):
            time.sleep(60)

    jobs = [([], [])]
    with pytest.raises(PromptTooLongError, match="too long") as found:
        list(_Pool([ray.remote(Refusing).remote()], lambda: None).run(iter(jobs)))
    assert found.value.hint == "shorten it"
    others = [ray.remote(Another).remote() for _ in range(2)]
    with pytest.raises(ClusterError, match="different weights"):
        list(_Pool(others, lambda: None).run(iter(jobs)))
    with pytest.raises(KeyboardInterrupt):
        list(_Pool(others, interrupted).run(iter(jobs)))


def interrupted():
    raise KeyboardInterrupt


def test_what_is_wrong_is_told(machines, model, tmp_path):
    assert list(compute([], {})) == []
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"text": "one"}\n{"text": ""}\n')
    options = ("--model", model, "--file", lines, "--ray", "auto")
    assert ":2: the prompt is empty" in run("warm", *options, "--shared", f"file://{tmp_path}/far", code=2).output
    assert "no shared store" in run("warm", *options, "--db", tmp_path / "x", code=2).output
    assert "--workers goes with --ray" in run("warm", *options[:-2], "--workers", 2, code=2).output
    assert "no config.json" in run("warm", "--model", tmp_path, *options[2:], code=2).output


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere", "127.0.0.1:x"])
def test_nobody_there(address, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="no Ray at"), connected(address.format(port=free_port())):
        pass


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"Ray is not installed.*promptdb\[ray\]"), connected("auto"):
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
