import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from promptdb.cli.demo_model import demo_model

from promptdb import demo, demo_models, demo_text
from promptdb.errors import InputTypeError, ModelError, UnsupportedModelError

TEXTS = [
    "Return a list of the",
    " leading and trailing \n\n\t",
    "naïve café — “quotes”",
    "日本語 한국어 العربية",
    "🎉👩‍👩‍👧 e\u0301 \u200b\ufeff",
    "<|endoftext|> in the <|pad|> text",
    "",
    "\x00\x7f",
]
WINDOWED = ("mistral",)  # every layer slides, so a token 60 back is out of sight


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same short training twice, and the reports."""
    folder = tmp_path_factory.mktemp("demo")
    losses = []
    reports = [
        demo.write_demo_model(
            folder / name,
            num_steps=4,
            max_chars=100_000,
            progress=lambda done, total, loss: losses.append((done, loss)),
        )
        for name in ("a", "b")
    ]
    return folder, reports, losses[: len(losses) // 2]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("arch", demo_models.ARCHITECTURES)
def test_logits_depend_on_every_token(arch):
    model = demo_models.random_model(arch)
    assert not model.training
    tokens = torch.randint(2, 384, (60,), generator=torch.Generator().manual_seed(1))
    changed = {where: tokens.clone() for where in ("same", "last", "near", "first")}
    changed["last"][-1] = changed["near"][-5] = changed["first"][0] = 2
    swapped = tokens.clone()
    swapped[[-3, -5]] = tokens[[-5, -3]]
    with torch.no_grad():
        # One at a time: a batch could differ by rounding.
        same, last, near, first, order = (
            model(ids[None], use_cache=False).logits[0, -1] for ids in (*changed.values(), swapped)
        )
    assert torch.isfinite(same).all()
    assert same.std() > 0.5
    assert (same - last).abs().max() > 0.5
    assert (same - near).abs().max() > 0.02
    assert (same - order).abs().max() > 0.005
    if arch in WINDOWED:
        assert torch.equal(same, first)
    else:
        assert (same - first).abs().max() > 1e-3


def test_random_model_is_deterministic_and_leaves_the_global_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (demo_models.random_model("llama", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_random_model_options():
    model = demo_models.random_model("qwen2", dtype="bfloat16", num_hidden_layers=3, vocab_size=600)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 3
    assert model.get_input_embeddings().weight.shape == (600, 64)
    assert demo_models.random_model(size="tiny").config.model_type == "gpt2"


@pytest.mark.parametrize(("size", "num_parameters"), [("gpt2", 124e6), ("llama-1b", 1.24e9), ("llama-8b", 8.03e9)])
def test_sizes_have_the_shapes_of_their_names(size, num_parameters):
    model = demo_models.random_model(size=size, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(num_parameters, rel=0.01)


def test_unknown_names():
    with pytest.raises(UnsupportedModelError, match="llama"):
        demo_models.random_model("lstm")
    with pytest.raises(ModelError, match="gpt2-medium"):
        demo_models.random_model(size="gpt5")
    with pytest.raises(ModelError, match="'llama'"):
        demo_models.random_model("gpt2", size="llama-1b")


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokenizer_round_trips(text):
    tokenizer = demo_text.byte_tokenizer()
    assert len(tokenizer) < 512
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids == demo_text.byte_tokenizer()(text).input_ids


def test_tokenizer_arguments():
    with pytest.raises(InputTypeError):
        demo_text.demo_tokenizer("one text")
    with pytest.raises(ModelError):
        demo_text.demo_tokenizer(["text"], vocab_size=100)


def test_corpus_is_prose_of_the_length_asked_for():
    text = demo_text.corpus(100_000)
    assert 90_000 < len(text) <= 100_000
    assert demo_text.corpus(250_000).startswith(text)
    assert ">>>" not in text


def test_training_lowers_the_loss(trained):
    _, (report, _), losses = trained
    assert [done for done, _ in losses] == list(range(1, len(losses) + 1))
    assert losses[0][1] == pytest.approx(math.log(demo_text.VOCAB_SIZE), abs=0.5)
    assert report.loss < losses[0][1] - 1
    assert report.heldout_loss < math.log(demo_text.VOCAB_SIZE) - 1
    assert report.num_tokens_trained == 4 * 1024


def test_same_arguments_same_bytes(trained):
    folder, (first, second), _ = trained
    names = sorted(path.name for path in (folder / "a").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(names)
    assert [digest(folder / "a" / name) for name in names] == [digest(folder / "b" / name) for name in names]
    assert first.size_bytes == second.size_bytes == sum(path.stat().st_size for path in (folder / "a").iterdir())
    assert not torch.are_deterministic_algorithms_enabled()


LOAD = """
import json, sys, warnings
warnings.simplefilter("error")
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
backend = Tokenizer.from_file(folder + "/tokenizer.json")
for text in texts:
    assert tokenizer(text).input_ids == backend.encode(text).ids, text
    assert tokenizer.decode(tokenizer(text).input_ids) == text, text
out = model.generate(**tokenizer("Return a list of the", return_tensors="pt"), max_new_tokens=3, do_sample=False)
assert out.max() < len(tokenizer) <= model.config.vocab_size
assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 0
assert not model.training
"""


def test_loads_without_a_word(trained):
    folder, _, _ = trained
    texts = json.dumps([text for text in TEXTS if text])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / "a"), texts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert not noise


def test_cli_writes_a_random_model(tmp_path):
    result = CliRunner().invoke(demo_model, [str(tmp_path / "deep" / "m"), "--arch", "qwen3"])
    assert result.exit_code == 0, result.output
    assert "random" in result.stdout
    assert "promptdb put --model" in result.stdout
    assert not result.stderr
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m"]

    again = CliRunner().invoke(demo_model, [str(tmp_path / "deep" / "m"), "--arch", "qwen3"])
    assert isinstance(again.exception, ModelError)
    result = CliRunner().invoke(demo_model, [str(tmp_path / "deep" / "m"), "--arch", "mamba", "--overwrite", "--json"])
    report = json.loads(result.stdout)
    assert report["architecture"] == "mamba"
    assert report["loss"] is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m"]


def test_cli_help_needs_no_torch():
    code = (
        "import sys; from promptdb.cli.demo_model import demo_model; "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    result = CliRunner().invoke(demo_model, ["--help"])
    assert "Example:" in result.output


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_demo_model_is_never_replaced(tmp_path, overwrite):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    mixed = tmp_path / "mixed"
    demo.write_demo_model(mixed, arch="gpt2")
    (mixed / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (checkpoint, mixed, file):
        with pytest.raises(ModelError, match="empty directory"):
            demo.write_demo_model(path, arch="gpt2", overwrite=overwrite)
    assert (mixed / "notes.txt").read_text() == file.read_text() == "mine"


def test_a_failed_write_keeps_the_old_model(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    demo.write_demo_model(folder, arch="gpt2")
    before = digest(folder / "model.safetensors")

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.write_demo_model(folder, arch="llama", overwrite=True)
    assert digest(folder / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_empty_directory_is_used(tmp_path):
    report = demo.write_demo_model(tmp_path, arch="llama")
    assert report.directory == tmp_path
    assert (tmp_path / "config.json").exists()
    assert report.num_parameters > 100_000


def test_negative_steps(tmp_path):
    with pytest.raises(ModelError, match="num_steps"):
        demo.write_demo_model(tmp_path / "m", num_steps=-1)
