"""``promptdb get --out``: the file holds what the engine would load, byte for byte."""

import pytest
import torch
from cli_tools import run, run_json, write_checkpoint
from promptdb.cli.main import cli  # noqa: F401 - the command is there
from safetensors import safe_open
from safetensors.torch import load_file

from promptdb import Engine, PromptDB

TEXT = "The cache keeps what the model has read, so that the next prompt which begins with the same words is short."


def exported(path, model, text, out, code=0):
    found = run_json("get", "--db", path, "--model", model, "--out", out, text, code=code)
    assert found["out"] == {"path": str(out), "size_bytes": out.stat().st_size}
    return found, load_file(out)


def expect(tensors, cache, num_tokens):
    names = {name for name in tensors if name.startswith("layers.")}
    assert names == {f"layers.{n}.{kind}" for n in range(len(cache.layers)) for kind in ("keys", "values")}
    for number, layer in enumerate(cache.layers):
        for kind, states in (("keys", layer.keys), ("values", layer.values)):
            ours = tensors[f"layers.{number}.{kind}"]
            assert ours.dtype == states.dtype
            assert torch.equal(ours, states[0, :, :num_tokens])


@pytest.mark.parametrize(("arch", "dtype"), [("llama", "float32"), ("deepseek_v3", "float32"), ("qwen3", "bfloat16")])
def test_export_equals_the_engine(tmp_path, arch, dtype):
    model = write_checkpoint(tmp_path / "model", arch, dtype=dtype)
    path, out = tmp_path / "store.promptdb", tmp_path / "kv.safetensors"
    with PromptDB(path, chunk_tokens=16) as db, Engine.from_pretrained(db, model) as engine:
        engine.put([TEXT[:9], TEXT[9:40], TEXT[40:]])
        whole = engine.get(TEXT)
        parting = TEXT[:61] + "ZZZ"
        cache = whole.past_key_values()
        num_spans = db.stat()["num_nodes"]
    assert num_spans > 4
    found, tensors = exported(path, model, TEXT, out)
    expect(tensors, cache, found["num_tokens"])
    assert tensors["token_ids"].tolist() == list(whole.token_ids)
    assert torch.equal(tensors["token_logprobs"], whole.token_logprobs)
    assert torch.equal(tensors["logits"], whole.logits)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["weights_id"] == found["weights_id"]
    assert metadata["num_tokens"] == str(found["num_tokens"])
    # A part of a span, and no logits after it.
    found, tensors = exported(path, model, parting, out, code=1)
    assert 0 < found["num_stored"] < found["num_tokens"]
    expect(tensors, cache, found["num_stored"])
    assert tensors["token_ids"].tolist() == list(whole.token_ids[: found["num_stored"]])
    assert torch.equal(tensors["token_logprobs"], whole.token_logprobs[: found["num_stored"] - 1])
    assert "logits" not in tensors
    # The first token alone; nothing at all.
    first, tensors = exported(path, model, "The", out, code=None)
    expect(tensors, cache, first["num_stored"])
    out.unlink()
    result = run("get", "--db", path, "--model", model, "--out", out, "@", code=1)
    assert "nothing" in result.stdout
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "store.promptdb"]
