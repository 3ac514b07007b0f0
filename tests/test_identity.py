from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from children import Child
from conftest import SUPPORTED
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from promptdb.demo_models import random_model
from promptdb.errors import IdentityError, InputTypeError
from promptdb.hashing import FieldHasher
from promptdb.identity import weights_id
from promptdb.tokenizer_identity import tokenizer_id

EAGER_ONLY = {"gemma2", "bloom", "mpt", "gptj"}


def tiny(arch: str = "llama", seed: int = 0, attn: str | None = None, **fields: Any) -> Any:
    more = {"attn_implementation": attn} if attn else {}
    return random_model(arch, seed=seed, **fields, **more)


# FieldHasher


def test_golden_digest() -> None:
    h = FieldHasher("d").field("b", b"\x00\xff").field("s", "é").field("i", -2).field("f", 0.5).field("t", True)
    # The bytes by hand, so that the layout cannot change unnoticed.
    raw = b""
    parts = [(b"domain", b"s", b"d"), (b"b", b"b", b"\x00\xff"), (b"s", b"s", b"\xc3\xa9")]
    parts += [(b"i", b"i", b"\xfe" + b"\xff" * 7), (b"f", b"f", b"\x00" * 6 + b"\xe0\x3f"), (b"t", b"t", b"\x01")]
    for tag, kind, value in [*parts, (b"n", b"n", b"")]:
        raw += len(tag).to_bytes(8, "little") + tag + kind + len(value).to_bytes(8, "little") + value
    from blake3 import blake3

    assert h.field("n", None).digest() == blake3(raw).digest()
    assert h.digest().hex() == "0fe8c924a1bf3fb9e6490080ec93e2377616d0166835d6c276301602b430c630"


FIELDS = st.lists(
    st.tuples(
        st.text(max_size=3).filter(lambda text: text.isascii()),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**63), 2**63 - 1),
            st.binary(max_size=4),
            st.floats(allow_nan=False),
        ),
    ),
    max_size=4,
)


@given(FIELDS, FIELDS)
def test_different_fields_never_collide(a: list[Any], b: list[Any]) -> None:
    def run(fields: list[Any]) -> bytes:
        h = FieldHasher("test")
        for tag, value in fields:
            h.field(tag, value)
        return h.digest()

    exactly = [[(tag, type(value), repr(value)) for tag, value in fields] for fields in (a, b)]
    assert (run(a) == run(b)) == (exactly[0] == exactly[1])


@given(st.binary(min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_bytes_cannot_move_between_fields(data: bytes, i: int, j: int) -> None:
    def at(cut: int) -> bytes:
        return FieldHasher("test").field("x", data[:cut]).field("x", data[cut:]).digest()

    assert (at(i) == at(j)) == (data[:i] == data[:j])


def test_hasher_refuses() -> None:
    assert FieldHasher("a").digest() != FieldHasher("b").digest()
    with pytest.raises(OverflowError):
        FieldHasher("d").field("i", 1 << 63)
    with pytest.raises(InputTypeError):
        FieldHasher("d").field("x", [1])  # type: ignore[arg-type]


# What must not change the ID


@pytest.mark.parametrize("arch", SUPPORTED)
def test_same_content_same_id(arch: str, tmp_path: Path) -> None:
    model = tiny(arch)
    known = weights_id(model)
    assert len(bytes.fromhex(known)) == 32
    assert weights_id(tiny(arch)) == known
    assert weights_id(tiny(arch, seed=1)) != known
    if arch not in EAGER_ONLY:
        assert weights_id(tiny(arch, attn="eager")) == weights_id(tiny(arch, attn="sdpa")) == known
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        for size in (40, 3, 17):
            model(ids[:, :size], use_cache=True)
        model(ids, use_cache=False, output_hidden_states=True)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    model.requires_grad_(False)
    model.name_or_path = model.config._name_or_path = "elsewhere"
    model.config.use_cache = not model.config.use_cache
    assert weights_id(model) == known
    model.save_pretrained(tmp_path)
    assert weights_id(AutoModelForCausalLM.from_pretrained(tmp_path)) == known
    halves = [AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16) for _ in range(2)]
    assert weights_id(halves[0]) == weights_id(halves[1]) != known


def test_same_id_in_another_process(tmp_path: Path) -> None:
    model = tiny("gemma3_text")
    model.save_pretrained(tmp_path / "copied")
    code = "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
    code += "from promptdb.identity import weights_id\n"
    code += "for d in (torch.float32, torch.bfloat16):\n"
    code += "    print(weights_id(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=d)))"
    with Child(code, tmp_path / "copied") as child:
        shown = child.read().split()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "copied", dtype=torch.bfloat16)
    assert shown == [weights_id(model), weights_id(half)]


def test_layout_in_memory_does_not_count() -> None:
    model, other = tiny(), tiny()
    weight = other.lm_head.weight.data
    other.lm_head.weight.data = weight.t().contiguous().t()
    assert not other.lm_head.weight.is_contiguous()
    assert weights_id(other) == weights_id(model)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_does_not_count() -> None:
    assert weights_id(tiny().cuda()) == weights_id(tiny())


# What must change the ID


def optimiser_step(model: Any) -> None:
    model(torch.arange(5, 15)[None]).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def one_bit(model: Any) -> None:
    bits = model.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)
    bits[3, 5] ^= 1


def inv_freq(model: Any) -> None:
    model.model.rotary_emb.inv_freq[1] *= 1.5


def set_config(**fields: Any) -> Callable[[Any], None]:
    return lambda model: [setattr(model.config, key, value) for key, value in fields.items()]  # type: ignore[return-value]


def rope_theta(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 5000.0


def swap_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def same_shape_module(model: Any) -> None:
    model.model.norm = torch.nn.RMSNorm(64, eps=1e-6)


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def new_field(model: Any) -> None:
    model.config.some_new_scale = 2.0


def plain_tensor(model: Any) -> None:
    model.model.steering = torch.ones(3)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimiser": optimiser_step,
    "data": lambda m: m.lm_head.weight.data.mul_(2),
    "bit": one_bit,
    "bf16": lambda m: m.to(torch.bfloat16),
    "buffer": inv_freq,
    "eps in config": set_config(rms_norm_eps=1e-3),
    "window": set_config(sliding_window=8),
    "theta": rope_theta,
    "unknown field": new_field,
    "attention scaling": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.3),
    "eps in module": lambda m: setattr(m.model.norm, "variance_epsilon", 1e-3),
    "activation": swap_module,
    "norm": same_shape_module,
    "layer order": swap_layers,
    "bias": lambda m: setattr(m.lm_head, "bias", torch.nn.Parameter(torch.zeros(300))),
    "plain tensor": plain_tensor,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_changes_id(change: Callable[[Any], Any]) -> None:
    model = tiny()
    known = weights_id(model)
    change(model)
    assert weights_id(model) != known


def test_dtype_label_alone_does_not_hide_a_cast() -> None:
    zeros = [torch.nn.Linear(4, 4, bias=False, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    for module in zeros:
        module.weight.data.zero_()
    assert weights_id(zeros[0]) != weights_id(zeros[1])


def test_dynamic_ntk_frequencies_count() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny(rope_parameters=rope, max_position_embeddings=32)
    known = weights_id(model)
    with torch.no_grad():
        model(torch.full((1, 20), 7))
        assert weights_id(model) == known
        model(torch.full((1, 60), 7))
        assert weights_id(model) != known
        model(torch.full((1, 20), 7))
    assert weights_id(model) == known


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    base = weights_id(tiny())
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    on = weights_id(model)
    with model.disable_adapter():
        off = weights_id(model)
    assert len({base, on, off}) == 3
    assert weights_id(model) == on
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    scaled = weights_id(model)
    layer.scaling["default"] /= 2
    assert weights_id(model) == on != scaled
    model.merge_adapter()
    assert weights_id(model) not in {on, off, base}
    assert weights_id(model.merge_and_unload()) not in {on, off, base}


def test_lora_saved_and_loaded(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    assert weights_id(peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()) == weights_id(model)


def test_packed_quantised_weights_are_content() -> None:
    def quantised(seed: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(tiny(seed=seed), {torch.nn.Linear}, dtype=torch.qint8)

    def only_linears_differ(seed: int) -> Any:
        model, other = quantised(0), quantised(seed)
        model.model.layers[0].mlp = other.model.layers[0].mlp
        return model

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantised engine")
    ids = {weights_id(tiny()), weights_id(quantised(0)), weights_id(only_linears_differ(1))}
    assert len(ids) == 3
    assert weights_id(quantised(0)) in ids


class Extra(torch.nn.Linear):
    state: Any = 1

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state() -> None:
    torch.manual_seed(0)
    module = Extra(2, 2)
    known = weights_id(module)
    Extra.state = 2
    try:
        assert weights_id(module) != known
        Extra.state = object()
        with pytest.raises(IdentityError, match="extra_state"):
            weights_id(module)
    finally:
        Extra.state = 1


# What must be refused


def hook(*_: Any) -> None:
    return None


REFUSED: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda m: m.model.layers[1].mlp.register_forward_hook(hook),
    "pre-hook": lambda m: m.register_forward_pre_hook(hook),
    "patched forward": lambda m: setattr(m.lm_head, "forward", MethodType(lambda self, x: x, m.lm_head)),
    "opaque": lambda m: setattr(m.model.norm, "thing", object()),
    "meta": lambda m: m.model.norm.to("meta"),
    "sparse": lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight.data.to_sparse())),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_refused_with_place_and_hint(change: Callable[[Any], Any]) -> None:
    model = tiny()
    change(model)
    with pytest.raises(IdentityError) as caught:
        weights_id(model)
    assert caught.value.hint


def test_compiled_global_hook_and_wrong_type() -> None:
    model = tiny()
    with pytest.raises(IdentityError, match="compile"):
        weights_id(torch.compile(model))
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.raises(IdentityError, match="global"):
            weights_id(model)
    finally:
        handle.remove()
    assert weights_id(model)
    with pytest.raises(InputTypeError):
        weights_id("gpt2")


def test_custom_attention_function_is_refused() -> None:
    def mine(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    transformers.AttentionInterface.register("mine_for_test", mine)
    model = tiny()
    model.config._attn_implementation_internal = "mine_for_test"
    with pytest.raises(IdentityError, match="mine_for_test"):
        weights_id(model)


def test_identified_hook_is_accepted() -> None:
    def marked(*_: Any) -> None:
        return None

    marked.__promptdb_identified__ = True  # type: ignore[attr-defined]
    model = tiny()
    known = weights_id(model)
    model.register_forward_hook(marked)
    assert weights_id(model) == known


def test_class_patched_for_all_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    known = weights_id(model)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    monkeypatch.setattr(type(model.model.norm), "forward", forward)
    assert weights_id(model) != known


CUSTOM = """
import torch
def helper(x):
    return x * {factor}
class Custom(torch.nn.Linear):
    def forward(self, x):
        return helper(super().forward(x))
"""


def test_own_code_counts_by_content_not_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.syspath_prepend(tmp_path)

    def build(name: str) -> Any:
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        torch.manual_seed(0)
        return module.Custom(2, 2)

    for name, factor in (("pdb_custom_a", 2), ("pdb_custom_b", 2), ("pdb_custom_c", 3)):
        (tmp_path / f"{name}.py").write_text(CUSTOM.format(factor=factor))
    models = [build(f"pdb_custom_{letter}") for letter in "abc"]
    ids = [weights_id(model) for model in models]
    assert ids[0] == ids[1] != ids[2]
    # Edited after it was loaded: what runs is the old code, so it is not what the new file says.
    (tmp_path / "pdb_custom_a.py").write_text(CUSTOM.format(factor=3))
    assert weights_id(models[0]) not in ids


# Tokenizers


def bare(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: index for index, token in enumerate(sorted(alphabet))} | {"Ġt": 256, "he": 257, "<bos>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e")], **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


def fast(**fields: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare(), bos_token="<bos>", **fields)


def test_tokenizer_id_is_stable(tmp_path: Path) -> None:
    tokenizer = fast()
    known = tokenizer_id(tokenizer)
    assert tokenizer_id(fast()) == known != tokenizer_id(bare())
    tokenizer.pad_token = "<bos>"
    tokenizer(["the the", "the"], padding=True, truncation=True, max_length=2)
    assert tokenizer_id(tokenizer) == known
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_id(transformers.AutoTokenizer.from_pretrained(tmp_path)) == known
    code = "import sys; from transformers import AutoTokenizer; from promptdb.tokenizer_identity import tokenizer_id; "
    code += "print(tokenizer_id(AutoTokenizer.from_pretrained(sys.argv[1])))"
    with Child(code, tmp_path) as child:
        assert child.read().strip() == known


def test_bare_tokenizer_limits_do_not_count() -> None:
    tokenizer = bare()
    known = tokenizer_id(tokenizer)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=258, pad_token="<bos>", length=100)
    assert tokenizer_id(tokenizer) == known
    assert len(tokenizer.encode("the the").ids) == 100  # still as its owner set it


def test_tokenizer_changes_count() -> None:
    from tokenizers import processors

    ids = {tokenizer_id(fast()), tokenizer_id(fast(split_special_tokens=True))}
    added = fast()
    added.add_tokens(["hello"])
    ids.add(tokenizer_id(added))
    with_bos = fast()
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 258)]
    )
    ids.add(tokenizer_id(with_bos))
    assert len(ids) == 4


def test_tokenizer_refused() -> None:
    with pytest.raises(IdentityError, match="random"):
        tokenizer_id(bare(dropout=0.5))
    with pytest.raises(IdentityError, match="no tokenizer"):
        tokenizer_id(object())


class Words:
    """A slow tokenizer, as far as an ID is concerned."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(word) for word in text.split() if word in self.words]}


def test_slow_tokenizer() -> None:
    assert tokenizer_id(Words(["a", "b"])) == tokenizer_id(Words(["a", "b"]))
    assert tokenizer_id(Words(["a", "b"])) != tokenizer_id(Words(["b", "a"]))
