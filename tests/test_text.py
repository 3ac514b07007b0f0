"""Text: prompts as sums, the idea of the project that promptdb grew from."""

from __future__ import annotations

import operator
from functools import reduce

import pytest
import torch
from conftest import TEXT, shared_model, shared_tokenizer

from promptdb import Engine, Text, run
from promptdb.demo_models import random_model
from promptdb.errors import EmptyPromptError, InputTypeError


@pytest.fixture
def model_and_tokenizer():
    return shared_model("gpt2"), shared_tokenizer()


def plain_logits(model, tokenizer, string):
    with torch.no_grad():
        return model(**tokenizer(string, return_tensors="pt")).logits


def test_the_program_that_started_it(model_and_tokenizer):
    # The first test of the project that had the idea, with the import line changed.
    atol = 1e-4
    context = Text("a b c", model_and_tokenizer)
    request1 = Text(" d e", model_and_tokenizer)
    request2 = Text(" 1 2", model_and_tokenizer)
    cr1 = context + request1
    cr1()
    model, tokenizer = model_and_tokenizer
    with torch.no_grad():
        out1 = model(**tokenizer(cr1.string, return_tensors="pt"))
    assert torch.allclose(out1.logits[0, -1], cr1.model_repr[1].logits[0, -1], atol=atol)
    cr12 = cr1 + request2
    cr12()
    with torch.no_grad():
        out12 = model(**tokenizer(cr12.string, return_tensors="pt"))
    assert torch.allclose(out12.logits[0, -1], cr12.model_repr[1].logits[:, -1, :][0], atol=atol)


def test_its_demonstration(model_and_tokenizer):
    # A context that is computed once, and requests that are added to it.
    model, tokenizer = model_and_tokenizer
    context_cached = Text(TEXT, model_and_tokenizer)
    context_cached()
    for number in range(5):
        request = Text(f"Here's my new text: {number}", model_and_tokenizer)
        prompt = context_cached + request
        prompt()
        assert prompt.representation.tokens_loaded >= context_cached.representation.num_tokens - 1
        expected = plain_logits(model, tokenizer, TEXT + f"Here's my new text: {number}")
        torch.testing.assert_close(prompt.model_repr[1].logits[0], expected[0, -1:], rtol=0, atol=1e-5)


def test_model_repr(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = Text("Hello there.", model_and_tokenizer) + " General"
    encoding, output = text.model_repr
    expected = tokenizer("Hello there. General", return_tensors="pt")
    assert torch.equal(encoding.input_ids, expected.input_ids)
    assert torch.equal(encoding["attention_mask"], expected.attention_mask)
    assert output.logits.shape == (1, 1, model.config.vocab_size)
    assert output.past_key_values.get_seq_length() == expected.input_ids.shape[1]
    # The encoding and the cache go straight back into the model.
    with torch.no_grad():
        model(
            input_ids=torch.tensor([[5]]),
            attention_mask=torch.ones(1, encoding.input_ids.shape[1] + 1),
            past_key_values=output.past_key_values,
        )


def test_all_logits_on_request(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    expected = plain_logits(model, tokenizer, "Hello there. General")
    text = Text("Hello there.", model_and_tokenizer, logits="all") + " General"
    torch.testing.assert_close(text.model_repr[1].logits, expected, rtol=0, atol=1e-5)
    late = Text("Hello there. General", model_and_tokenizer)
    late()
    assert late.model_repr[1].logits.shape[1] == 1
    late(logits="all")
    torch.testing.assert_close(late.model_repr[1].logits, expected, rtol=0, atol=1e-5)


def test_either_side_and_any_association(model_and_tokenizer):
    a, b, c = (Text(piece, model_and_tokenizer) for piece in ("a b", " c d", " e"))
    left, right = (a + b) + c, a + (b + c)
    assert left.pieces() == right.pieces() == ["a b", " c d", " e"]
    assert (a + " c d" + " e").pieces() == ("a b" + (b + c)).pieces() == left.pieces()
    assert torch.equal(left().logits, right().logits)
    assert right().tokens_computed == 0 or left().tokens_computed == 0
    with pytest.raises(TypeError):
        a + 3
    with pytest.raises(TypeError):
        3 + a


def test_a_text_may_stand_in_a_sum_twice(model_and_tokenizer):
    word = Text("ab ", model_and_tokenizer)
    assert (word + word + word).string == "ab ab ab "


@pytest.mark.parametrize("way", ["left", "right"])
def test_thousands_of_pieces(model_and_tokenizer, way):
    texts = [Text(f"{number} ", model_and_tokenizer) for number in range(5000)]
    total = reduce(operator.add, texts) if way == "left" else reduce(lambda sum_, text: text + sum_, reversed(texts))
    assert total.string == "".join(f"{number} " for number in range(5000))
    assert len(total.pieces()) == 5000
    assert repr(total).startswith("Text('0 1 2")


def test_every_intermediate_sum_is_stored(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        text = Text("one two", engine)
        sums = [text := text + piece for piece in (" three four", " five six", " seven")]
        sums[-1]()
        for each in sums[:-1]:
            assert each().tokens_computed == 0
            torch.testing.assert_close(
                each.representation.logits, plain_logits(model, tokenizer, each.string)[0, -1], rtol=0, atol=1e-5
            )


def test_lazy_and_eager(model_and_tokenizer, monkeypatch):
    engine = Text("x", model_and_tokenizer).engine
    calls = []
    get = engine.get
    monkeypatch.setattr(engine, "get", lambda prompt, **options: calls.append(prompt) or get(prompt, **options))
    lazy = Text("a b", model_and_tokenizer) + " c"
    assert calls == []
    lazy()
    lazy()
    assert len(calls) == 1
    eager = Text("a b", model_and_tokenizer, eager=True)
    assert len(calls) == 2
    eager + " d"
    assert len(calls) == 3


def test_follows_a_model_that_changes():
    model, tokenizer = random_model("llama"), shared_tokenizer()
    text = Text("Hello there", (model, tokenizer))
    before = text().logits.clone()
    assert text() is text()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert not torch.equal(text().logits, before)
    torch.testing.assert_close(text().logits, plain_logits(model, tokenizer, "Hello there")[0, -1], atol=1e-5, rtol=0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    (again,) = run([text])
    torch.testing.assert_close(again().logits, plain_logits(model, tokenizer, "Hello there")[0, -1], atol=1e-5, rtol=0)


def test_texts_of_one_model_share_a_store_in_memory(model_and_tokenizer):
    assert Text("a", model_and_tokenizer).engine is Text("b", model_and_tokenizer).engine
    assert Text("a", model_and_tokenizer).engine.db.path is None
    other = (shared_model("llama"), model_and_tokenizer[1])
    with pytest.raises(InputTypeError, match="different models"):
        Text("a", model_and_tokenizer) + Text("b", other)


def test_models_are_not_kept_alive():
    import gc
    import weakref

    from promptdb.demo_models import random_model

    model = random_model("gpt2")
    reference = weakref.ref(model)
    Text("a b", (model, shared_tokenizer()))()
    del model
    gc.collect()
    assert reference() is None


def test_wrong_types(model_and_tokenizer):
    for string in (None, 3, b"x", ["a"]):
        with pytest.raises(InputTypeError):
            Text(string, model_and_tokenizer)
    for engine in (None, 3, (1, 2, 3)):
        with pytest.raises(InputTypeError):
            Text("a", engine)
    with pytest.raises(EmptyPromptError):
        Text("", model_and_tokenizer)()
