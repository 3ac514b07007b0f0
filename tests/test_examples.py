"""The tutorials of examples/ run, small, and what they find is right."""

from __future__ import annotations

import ast
import importlib
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import write_checkpoint
from transformers import AutoModelForCausalLM

from promptdb import PromptDB

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PROGRAMS = ("spectra", "no_causal_mask", "high_pass", "diffusion_opt", "sae")
PUBLIC = {"", "dataset", "demo_models", "demo_text", "errors", "hooks", "interventions"}


WORDS = "return the number of items in a list or raise an error when it is empty and so on"


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of short texts: words in random order, so letters of a word tell its others, and nothing more."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(" ".join(rng.choices(WORDS.split(), k=40)) for _ in range(400)), "utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of 2 layers whose every logit depends visibly on every token that it may see."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), "opt")


@pytest.fixture
def program(tiny, texts, tmp_path):
    """Return a function that runs a program of examples/ in this process, and returns what its ``main`` does."""

    def run(name: str, *arguments: object, model: str = tiny, out: str = "out", db: bool = True) -> dict:
        fixed = ["--model", model, "--texts", texts, "--out", tmp_path / out]
        fixed += ["--db", tmp_path / "store.promptdb"] if db else []
        return importlib.import_module(name).main(list(map(str, [*fixed, *arguments])))

    return run


def plain(model: str, prompts: list[list[int]]):
    """Return what transformers makes of prompts, without any hook."""
    ids = torch.tensor(prompts)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model)(ids, labels=ids, output_hidden_states=True)


def is_small_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_use_public_names_only_and_have_a_page(name, capsys):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "promptdb":
            assert node.module.partition(".")[2] in PUBLIC
            assert not any(alias.name.startswith("_") for alias in node.names)
    module = importlib.import_module(name)
    page = ROOT / "docs" / "tutorials" / f"{name.replace('_', '-')}.md"
    assert f"docs/tutorials/{page.name}" in module.__doc__
    assert f"examples/{name}.py" in page.read_text("utf-8")
    assert is_small_png(page.with_name(f"{name.replace('_', '-')}.png"))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert "--model" in capsys.readouterr().out


def num_distinct(prompts):
    """Return how many tokens there are after different texts: each is computed once."""
    return len({tuple(ids[: at + 1]) for ids in prompts for at in range(len(ids))})


def test_spectra(program, tiny, texts, tmp_path):
    found = program("spectra", "--prompts", 6, "--tokens", 96)
    shuffled = importlib.import_module("spectra").shuffled(found["prompts"])
    assert found["computed"] == sum(map(num_distinct, (found["prompts"], shuffled)))
    assert is_small_png(tmp_path / "out" / "spectra.png")

    # hidden_states of transformers: what the first layer gets, then what each returns; the last one is normed.
    states = plain(tiny, found["prompts"]).hidden_states
    for where, (frequencies, power) in found["texts"].items():
        layer = -1 if where[1] is None else where[1]
        if layer == 1:
            continue
        x = states[layer + 1][:, 8:].double().numpy()
        x = (x - x.mean(1, keepdims=True)) * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(88) / 88))[:, None]
        expected = (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean((0, 2))[2:]
        assert np.allclose(power.numpy(), expected / expected.mean(), rtol=1e-3)
        assert np.allclose(frequencies.numpy(), np.fft.rfftfreq(88)[2:])

    again = subprocess.run(
        [sys.executable, EXAMPLES / "spectra.py", "--model", tiny, "--texts", texts, "--out", tmp_path / "again",
         "--db", tmp_path / "store.promptdb", "--prompts", "6", "--tokens", "96"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert again.stdout.count("576 tokens, 0 of them computed") == 2
    assert (tmp_path / "again" / "spectra.png").read_bytes() == (tmp_path / "out" / "spectra.png").read_bytes()


def test_spectra_of_shuffled_text_have_no_structure_of_the_text(program):
    spectra = importlib.import_module("spectra")
    prompts = [[5, 6] * 20, list(range(40))]
    mixed = spectra.shuffled(prompts)
    assert [sorted(each) for each in mixed] == [sorted(each) for each in prompts]
    assert mixed != prompts
    assert mixed == spectra.shuffled(prompts)


def test_no_causal_mask(program, tiny, tmp_path):
    found = program("no_causal_mask", "--prompts", 4, "--tokens", 96, "--ahead", 1, 4)
    moved, half = found["moved"], found["half"]
    assert float(moved[0].max()) < 1e-5  # causal: what comes later changes nothing
    for ahead in (1, 4):  # each of the two layers carries it so many tokens back, and no further
        assert float(moved[ahead][: half - 2 * ahead].max()) < 1e-5
        assert float(moved[ahead][-1]) > 1e-3
    assert float(moved[96].min()) > 1e-4  # without a mask, everything sees everything
    assert float(moved[96].mean()) > float(moved[4].mean()) > float(moved[1].mean())
    assert len(set(found["losses"].values())) == len(found["losses"])
    assert "computed in steps differs" in found["reason"]
    assert found["stored"] == 0
    assert is_small_png(tmp_path / "out" / "no_causal_mask.png")


def test_the_loss_under_no_hooks_is_the_models_own(tiny, texts):
    tutorial, high_pass = importlib.import_module("tutorial"), importlib.import_module("high_pass")
    no_causal_mask = importlib.import_module("no_causal_mask")
    model, tokenizer = tutorial.load_hooked(tiny)
    prompts = tutorial.token_blocks(tokenizer, tutorial.documents(texts, held_out=True), 3, 64)
    expected = float(plain(tiny, prompts).loss)
    ids = torch.tensor(prompts)
    assert high_pass.loss(model, ids) == pytest.approx(expected, rel=1e-5)
    predicted = no_causal_mask.log_probabilities(model, ids, 0)
    assert no_causal_mask.loss(predicted, ids) == pytest.approx(expected, rel=1e-5)


def test_filters_do_what_they_say(on_the_path):
    high_pass = importlib.import_module("high_pass")
    time = torch.arange(64.0)
    slow, fast = torch.cos(2 * torch.pi * time / 32), torch.cos(2 * torch.pi * time / 4)
    x = (3 + slow + fast)[None, :, None]
    assert torch.allclose(high_pass.fourier(x, None, cutoff=1 / 8)[0, :, 0], fast, atol=1e-5)
    assert torch.allclose(high_pass.fourier(x, None, cutoff=0), x, atol=1e-5)
    expected = [float(x[0, at, 0] - x[0, : at + 1, 0].mean()) for at in range(64)]
    assert torch.allclose(high_pass.minus_mean_so_far(x, None)[0, :, 0], torch.tensor(expected), atol=1e-5)


def test_high_pass(program, tiny, tmp_path):
    found = program("high_pass", "--prompts", 3, "--tokens", 96)
    offers = found["offers"]
    for label in ("Fourier, periods <= 16", "minus mean so far"):
        assert "computed in steps differs" in offers[label]["refused"]
    taken = offers["minus mean value"]
    assert taken["loss"] == pytest.approx(found["lines"]["minus mean value"], rel=1e-4)
    assert (taken["computed"], taken["computed_again"]) == (3 * 96, 0)
    with PromptDB(tmp_path / "store.promptdb", readonly=True) as db:
        assert [root.intervention_id != "" for root, totals in db.roots() if totals["num_nodes"]] == [True]
        assert db.verify() == []
    losses = {**found["lines"], **found["by_period"]}
    assert len(set(losses.values())) == len(losses)
    # What is left of a filter that lets nearly nothing through is nearly no attention.
    distance = {period: abs(loss - found["lines"]["no attention"]) for period, loss in found["by_period"].items()}
    assert distance[2] < distance[128]
    assert is_small_png(tmp_path / "out" / "high_pass.png")


def test_diffusion_opt(program, tmp_path):
    untrained = write_checkpoint(tmp_path / "untrained", "opt", initializer_range=0.02, dropout=0.0)
    in_order = tmp_path / "in_order.txt"  # the sentence again and again, from any word on
    words = WORDS.split()
    in_order.write_text("\n\n".join(" ".join((words[at % 19 :] + words)[:40]) for at in range(600)), "utf-8")
    options = ("--texts", in_order, "--prompts", 400, "--tokens", 48, "--steps", 120, "--lr", 0.005)
    found = program("diffusion_opt", *options, "--text", "return the [gap 12]list or", model=untrained, db=False)
    losses = found["losses"]
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 1
    commonest, before, after = found["results"].values()
    assert max(before) < 0.1
    assert after[0] > 3 * commonest[0]
    assert after[0] > after[-1]  # the more is masked, the less is found
    given, filled, mask = found["given"], found["filled"], found["mask"]
    assert int((given == mask).sum()) == 12
    assert int((filled == mask).sum()) == 0
    assert torch.equal(filled[given != mask], given[given != mask])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "diffusion-opt")
    assert loaded.config.vocab_size > mask
    assert is_small_png(tmp_path / "out" / "diffusion_opt.png")


def test_diffusion_uses_what_comes_after(tiny):
    """The prediction of a token depends on every other token, and not on what was under a mask."""
    diffusion_opt, tutorial = importlib.import_module("diffusion_opt"), importlib.import_module("tutorial")
    diffusion = diffusion_opt.Diffusion(*tutorial.load_hooked(tiny))
    ids = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = diffusion.predict(ids)
        for at in (0, 12, 23):
            changed = ids.clone()
            changed[0, at] = 301
            assert (diffusion.predict(changed) - expected).nan_to_num().abs().amax(-1).min() > 1e-4
    steps = list(diffusion.inpaint(ids[0].index_fill(0, torch.arange(5, 15), diffusion.mask), 4))
    assert [int((each == diffusion.mask).sum()) for each in steps] == [7, 4, 2, 0]


def test_the_small_opt_is_trained_where_it_is_missing(texts, tmp_path, monkeypatch, capsys):
    tutorial = importlib.import_module("tutorial")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tutorial, "train_small_opt", partial(tutorial.train_small_opt, num_steps=12))
    monkeypatch.setattr(tutorial, "corpus", lambda: texts.read_text("utf-8"))
    model, tokenizer = tutorial.load_hooked(tutorial.SMALL_OPT)
    assert float(re.search("its loss is (.*) nats", capsys.readouterr().out)[1]) < np.log(288) - 1
    assert model.config.num_hidden_layers == 3
    assert tokenizer.decode(tokenizer("the number")["input_ids"]) == "the number"
    assert tutorial.checkpoint(tutorial.SMALL_OPT) == tutorial.SMALL_OPT
    assert capsys.readouterr().out == ""


def test_sae(program, tiny, texts, tmp_path, monkeypatch):
    options = ("--layer", 0, "--prompts", 12, "--features", 256, "--batch-size", 128, "--epochs", 2)
    found = program("sae", *options)
    training, figures = found["training"], found["figures"]
    assert found["computed"] == found["rows"]
    assert 12 * 128 - 8 < found["rows"] <= 12 * 128  # one row for all prompts that begin with the same token
    assert len(training.log) == 2 * 12
    assert figures["explained variance"] > 0.3
    assert 0 < figures["L0 (active features of a row)"] <= 16
    assert training.log[-1] > training.log[0] + 0.1
    assert is_small_png(tmp_path / "out" / "sae.png")

    # What is reported is so of the model's own activations, through an autoencoder that is read back.
    tutorial, sae = importlib.import_module("tutorial"), importlib.import_module("sae")
    _, tokenizer = tutorial.load_hooked(tiny)
    held_out = tutorial.token_blocks(tokenizer, tutorial.documents(texts, held_out=True), 16, 128)
    rows = plain(tiny, held_out).hidden_states[1].flatten(0, 1)
    held = torch.load(tmp_path / "out" / "sae.pt")
    model = sae.TopK(rows, 256, 16)
    model.load_state_dict(held["sae"])
    with torch.no_grad():
        rebuilt, features = model(rows)
    error = (rows - rebuilt).double().pow(2).sum() / (rows - rows.mean(0)).double().pow(2).sum()
    assert figures["explained variance"] == pytest.approx(1 - float(error), abs=1e-3)
    assert figures["L0 (active features of a row)"] == pytest.approx(float((features > 0).sum(1).float().mean()))

    # Stopped in the middle of each epoch and gone on with: the same, and no model is run.
    def attention(*args, **kwargs):
        raise AssertionError("the model was run, but everything is stored")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for count in (5, 10):
        stopped = program("sae", *options, "--stop-after", count, out="stopped")
    assert len(stopped["training"].log) == 15
    resumed = program("sae", *options, out="stopped")
    assert resumed["computed"] == 0
    assert resumed["training"].log == pytest.approx(training.log, abs=1e-5)
    with pytest.raises(SystemExit, match="remove it"):
        program("sae", *options, "--active", 8, out="stopped")
