"""Many prompts as one tree: the same as one by one, every token once, in order, in bounded memory."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from conftest import SUPPORTED, TEXT, shared_model, shared_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptdb import Engine, PromptDB
from promptdb.batch import BatchLimits
from promptdb.errors import InputTypeError, PromptTooLongError, TokenRangeError, UnsupportedModelError

TOLERANCE = 1e-5
SMALL = BatchLimits(window_tokens=90, pass_tokens=24)


def reference(model, token_ids):
    """One plain forward pass: last logits, log-probabilities, greedy tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)[:-1]
    chosen = logprobs.gather(1, torch.tensor(token_ids)[1:, None])[:, 0].float()
    return logits[-1], chosen, logits[:-1].argmax(-1)


def assert_equal(representation, model, token_ids):
    assert list(representation.token_ids) == list(token_ids)
    logits, logprobs, greedy = reference(model, list(token_ids))
    torch.testing.assert_close(representation.logits, logits, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(representation.token_logprobs, logprobs, rtol=0, atol=TOLERANCE)
    assert torch.equal(representation.greedy_ids, greedy.int())


def random_tree(rng, *, tokens=200, prompts=12):
    """Return prompts that share prefixes in every way: nested, equal, one the beginning of another."""
    made = [[rng.randrange(tokens) for _ in range(rng.randint(1, 60))]]
    while len(made) < prompts:
        base = rng.choice(made)
        kept = rng.randint(0, len(base))
        made.append(base[:kept] + [rng.randrange(tokens) for _ in range(rng.randint(0 if kept else 1, 20))])
    rng.shuffle(made)
    return made


def distinct(prompts):
    return {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)}


def ways_of(arch):
    return ["batched", "single"] if arch in ("bloom", "mpt") else ["packed", "batched", "single"]


@pytest.mark.parametrize("arch", SUPPORTED)
def test_a_batch_equals_one_by_one(arch, tmp_path):
    model, tokenizer = shared_model(arch), shared_tokenizer()
    for way in ways_of(arch):
        rng = random.Random(f"{arch} {way}")
        prompts = random_tree(rng)
        limits = BatchLimits(window_tokens=4000, pass_tokens=rng.choice([16, 40, 512]), way=way)
        with PromptDB(tmp_path / way, chunk_tokens=16) as db:
            with Engine(db, model, tokenizer) as engine:
                found = list(engine.run(prompts, limits=limits))
                for representation, prompt in zip(found, prompts, strict=True):
                    assert_equal(representation, model, prompt)
                assert sum(each.tokens_computed for each in found) == len(distinct(prompts))
            assert db.verify() == []
            with Engine(db, model, tokenizer) as engine:
                for representation, prompt in zip(engine.run(prompts, limits=limits), prompts, strict=True):
                    assert representation.tokens_computed == 0
                    assert_equal(representation, model, prompt)
                # What was stored can be extended like anything else, and its keys and values are right.
                longer = [*prompts[0], 3, 4, 5]
                extended = engine.get(longer)
                assert extended.tokens_loaded >= len(prompts[0])
                assert_equal(extended, model, longer)


@pytest.mark.parametrize("arch", ["gpt2", "mistral", "gemma3_text", "mpt"])
def test_a_batch_over_what_is_stored(arch, tmp_path):
    """Some prompts stored, some in part, at odd places, with and without logits there."""
    model, tokenizer = shared_model(arch), shared_tokenizer()
    for seed in range(2):
        for way in ways_of(arch):
            rng = random.Random(f"{arch} {seed}")
            prompts = random_tree(rng, prompts=10)
            with PromptDB(tmp_path / f"{way}{seed}", chunk_tokens=rng.choice([5, 16, 256])) as db:
                with Engine(db, model, tokenizer) as engine:
                    for prompt in rng.sample(prompts, 3):
                        engine.get(prompt[: rng.randint(1, len(prompt))])
                with Engine(db, model, tokenizer) as engine:
                    limits = BatchLimits(window_tokens=rng.choice([50, 4000]), pass_tokens=20, way=way)
                    for representation, prompt in zip(engine.run(prompts, limits=limits), prompts, strict=True):
                        assert_equal(representation, model, prompt)
                    assert all(each.tokens_computed == 0 for each in engine.run(prompts))
                assert db.verify() == []


def counting(engine):
    """Return a list that grows by the tokens of every forward pass of the engine's model."""
    runner, counts = engine._extender.runner, []
    call = runner._call

    def counted(input_ids, *arguments):
        counts.append(input_ids.numel())
        return call(input_ids, *arguments)

    runner._call = counted
    return counts


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.sampled_from(["packed", "batched", "single"]), st.booleans())
def test_tokens_through_the_model_are_the_distinct_missing_ones(seed, way, want_more):
    rng = random.Random(seed)
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    prompts = random_tree(rng, tokens=rng.choice([2, 3, 50]))
    with PromptDB.in_memory(chunk_tokens=rng.choice([3, 256])) as db, Engine(db, model, tokenizer) as engine:
        counts = counting(engine)
        limits = BatchLimits(window_tokens=10**6, pass_tokens=rng.choice([1, 7, 64]), way=way)
        found = list(engine.run(prompts, limits=limits))
        assert sum(counts) == len(distinct(prompts)) == sum(each.tokens_computed for each in found)
        for representation, prompt in zip(found, prompts, strict=True):
            assert representation.tokens_loaded + representation.tokens_computed == len(prompt)
        counts.clear()
        more = [[*rng.choice(prompts), 7, 8] for _ in range(4)] if want_more else prompts
        again = list(engine.run(more, limits=limits))
        # All prompts' last logits are stored: what stands on them needs nothing again.
        assert sum(counts) == len(distinct(more) - distinct(prompts)) == sum(each.tokens_computed for each in again)


def test_half_precision(tmp_path):
    from promptdb.demo_models import random_model

    model, tokenizer = random_model("llama", dtype="bfloat16"), shared_tokenizer()
    prompts = random_tree(random.Random(5))
    with PromptDB(tmp_path / "store") as db, Engine(db, model, tokenizer) as engine:
        for representation, prompt in zip(engine.run(prompts), prompts, strict=True):
            logits, logprobs, _ = reference(model, prompt)
            # A few units in the last place of bfloat16 at the size of these logits.
            scale = float(logits.float().abs().max())
            torch.testing.assert_close(representation.logits.float(), logits.float(), rtol=0, atol=scale / 32)
            torch.testing.assert_close(representation.token_logprobs, logprobs, rtol=0, atol=scale / 16)


def test_windows_and_order(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    prompts = random_tree(random.Random(1), prompts=40)
    with Engine(db, model, tokenizer) as engine:
        taken = []

        def stream():
            for prompt in prompts:
                taken.append(prompt)
                yield prompt

        results = engine.run(stream(), limits=SMALL)
        first = next(results)
        assert len(taken) < len(prompts), "prompts are taken as they are needed"
        assert_equal(first, model, prompts[0])
        engine.get("others may use the engine between two results")
        for representation, prompt in zip(results, prompts[1:], strict=True):
            assert_equal(representation, model, prompt)


def test_texts_and_pieces(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    context = "Naïve café: 你好 🙂. "
    prompts = [[context, choice, ending] for choice in ("one", "two", "thr🙃ee") for ending in (".", "!", "\n\n")]
    with Engine(db, model, tokenizer) as engine:
        for representation, prompt in zip(engine.run(prompts), prompts, strict=True):
            assert_equal(representation, model, tokenizer("".join(prompt)).input_ids)
            assert engine.get(prompt).tokens_computed == 0


def test_nothing_stored_on_request(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    prompts = random_tree(random.Random(2))
    with Engine(db, model, tokenizer) as engine:
        for representation, prompt in zip(engine.run(prompts, store=False), prompts, strict=True):
            assert_equal(representation, model, prompt)
    assert db.stat()["num_nodes"] == 0


def test_past_key_values_of_a_batch(db):
    model, tokenizer = shared_model("qwen3"), shared_tokenizer()
    prompts = random_tree(random.Random(3))
    with Engine(db, model, tokenizer) as engine:
        for representation, prompt in zip(engine.run(prompts), prompts, strict=True):
            cache = representation.past_key_values()
            with torch.no_grad():
                plain = model(torch.tensor([prompt]), use_cache=True).past_key_values
            for ours, theirs in zip(cache.layers, plain.layers, strict=True):
                torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=TOLERANCE)
                torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=TOLERANCE)


def test_wrong_prompts_are_named_and_nothing_is_stored(db):
    model, tokenizer = shared_model("gpt2"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        with pytest.raises(TokenRangeError, match=r"prompt 1: .* outside the model's vocabulary"):
            list(engine.run([[1, 10**6], [1, 2, 3]]))
        with pytest.raises(PromptTooLongError, match="prompt 1: "):
            list(engine.run([[1] * (engine.max_tokens + 1)]))
        engine.flush()
        assert db.stat()["num_nodes"] == 0


def test_a_way_that_is_not_exact_is_refused(db):
    with (
        Engine(db, shared_model("mpt"), shared_tokenizer()) as engine,
        pytest.raises(UnsupportedModelError, match="packed"),
    ):
        list(engine.run([[1, 2], [1, 3]], limits=BatchLimits(way="packed")))


def test_the_probe_catches_a_boolean_mask(db, monkeypatch):
    """Gemma 2 adds a boolean mask to its scores: silently wrong, and so found by the probe."""
    from promptdb import masks
    from promptdb.demo_models import random_model

    def boolean(self, visible, device):
        return visible[None, None].to(device)

    monkeypatch.setattr(masks.Masks, "_additive", boolean)
    model = random_model("gemma2")
    model.set_attn_implementation("eager")
    prompts = random_tree(random.Random(4))
    with Engine(db, model, shared_tokenizer()) as engine:
        assert engine._extender.runner.exact_ways == {"batched"}
        for representation, prompt in zip(engine.run(prompts), prompts, strict=True):
            assert_equal(representation, model, prompt)


def test_ways_are_remembered_with_the_model(db, monkeypatch):
    from promptdb import registration

    with Engine(db, shared_model("mpt"), shared_tokenizer()) as engine:
        assert engine._extender.runner.exact_ways == {"batched"}
    monkeypatch.setattr(registration, "probe", lambda runner: pytest.fail("probed again"))
    with Engine(db, shared_model("mpt"), shared_tokenizer()) as engine:
        assert engine._extender.runner.exact_ways == {"batched"}


def test_another_attention_implementation_is_not_known_to_be_exact(db):
    from promptdb.demo_models import random_model

    model = random_model("llama")
    prompts = random_tree(random.Random(6))
    with Engine(db, model, shared_tokenizer()) as engine:
        model.set_attn_implementation("eager")
        assert engine._extender.runner.exact_ways == frozenset()
        for representation, prompt in zip(engine.run(prompts), prompts, strict=True):
            assert_equal(representation, model, prompt)


def test_long_prompts_and_small_memory(tmp_path):
    """Prompts longer than a pass, than the windows of attention, and than the memory allowed."""
    model, tokenizer = shared_model("gemma2"), shared_tokenizer()
    token_ids = tokenizer(TEXT).input_ids
    prompts = [token_ids[:end] + [7] * extra for end in (len(token_ids), 50, 90) for extra in (0, 1, 5)]
    for way in ("packed", "batched", "single"):
        limits = BatchLimits(pass_tokens=10, cache_bytes=1, way=way)
        with PromptDB(tmp_path / way) as db, Engine(db, model, tokenizer) as engine:
            for representation, prompt in zip(engine.run(prompts, limits=limits), prompts, strict=True):
                assert_equal(representation, model, prompt)


def test_a_strict_engine_takes_prompts_one_by_one(tmp_path):
    """In bfloat16 the way of computing shows: a strict engine gives the bits of a computation of its own."""
    from promptdb.demo_models import random_model

    model, tokenizer = random_model("llama", dtype="bfloat16"), shared_tokenizer()
    prompts = [[*range(5, 30), number, number + 1] for number in range(100, 108)]
    for way in ("packed", "batched"):
        with PromptDB(tmp_path / way) as db, PromptDB.in_memory() as own:
            with Engine(db, model, tokenizer) as engine:
                list(engine.run(prompts, limits=BatchLimits(way=way)))
            with (
                Engine(db, model, tokenizer, strict=True) as engine,
                Engine(own, model, tokenizer, strict=True) as other,
            ):
                reports = []
                for found, expected in zip(
                    engine.run(prompts, on_progress=reports.append), other.run(prompts), strict=True
                ):
                    assert found.tokens_computed > 0
                    assert torch.equal(found.logits, expected.logits)
                    assert torch.equal(found.token_logprobs, expected.token_logprobs)
                assert len(reports) == len(prompts)


def test_windows_by_places_in_the_cache_are_not_packed(db):
    """GPT-Neo's layers apply their windows to slots of the cache, and its configuration has no sliding windows."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=512, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, window_size=16,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(config).eval()
    prompts = [[*range(5, 25), number, number + 1, number + 2] for number in range(100, 140)]
    with Engine(db, model, shared_tokenizer()) as engine:
        assert "packed" not in engine._extender.runner.exact_ways
        for representation, prompt in zip(engine.run(prompts), prompts, strict=True):
            assert_equal(representation, model, prompt)


def test_the_probe_itself_sees_windows_by_places(db, monkeypatch):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    from promptdb import masks
    from promptdb.probe import probe
    from promptdb.runner import Runner

    monkeypatch.setattr(masks.Masks, "can_build", True)
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=512, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    assert probe(Runner(GPTNeoForCausalLM(config).eval())).exact_ways == {"batched"}


def slow_batch(number):
    """Return prompts that take several sections."""
    return [[*range(5, 20), number, each, each + 1, each + 2] for each in range(100, 130)]


def test_training_that_goes_on_during_a_batch_is_noticed(db):
    from promptdb.demo_models import random_model
    from promptdb.errors import TrainModeError

    model = random_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    with Engine(db, model, shared_tokenizer()) as engine:
        with pytest.raises(TrainModeError):
            list(engine.run(slow_batch(1), limits=BatchLimits(pass_tokens=16), on_progress=lambda _: model.train()))
        model.eval()
        for representation, prompt in zip(engine.run(slow_batch(1)), slow_batch(1), strict=True):
            assert_equal(representation, model, prompt)


@pytest.mark.parametrize("way", ["packed", "batched", "single"])
def test_weights_that_change_and_spans_that_go_during_a_batch(db, way):
    from promptdb.demo_models import random_model

    model = random_model("llama")
    limits = BatchLimits(pass_tokens=16, way=way)
    with Engine(db, model, shared_tokenizer()) as engine:
        changes = iter([True])

        def change(_):
            if next(changes, False):
                with torch.no_grad():
                    model.lm_head.weight.mul_(1.5)

        found = list(engine.run(slow_batch(1), limits=limits, on_progress=change))
        for representation, prompt in zip(found, slow_batch(1), strict=True):
            assert_equal(representation, model, prompt)
        engine.get(slow_batch(2)[0][:18])
        engine.flush()

        def remove(_):
            for node in [node for node, record in db.nodes() if record.start == 0]:
                db.remove(node)

        for representation, prompt in zip(
            engine.run(slow_batch(2), limits=limits, on_progress=remove), slow_batch(2), strict=True
        ):
            assert_equal(representation, model, prompt)


def test_damaged_spans_are_healed_together_and_the_rest_is_kept(db):
    from promptdb.format import BLOBS

    model = shared_model("llama")
    prompts = [[*range(5, 25), number, number + 1] for number in range(100, 120)]

    def damage(writer):
        keys = [key for key, _ in writer.scan(BLOBS)][::5]
        for key in keys:
            value = bytearray(writer.get(BLOBS, key))
            value[-1] ^= 1
            writer.put(BLOBS, key, bytes(value))
        return len(keys)

    with Engine(db, model, shared_tokenizer()) as engine:
        list(engine.run(prompts))
        engine.flush()
        assert db._index.transact(damage) > 4
        db._verified._seen.clear()
    with Engine(db, model, shared_tokenizer()) as engine:
        for representation, prompt in zip(engine.run(prompts), prompts, strict=True):
            assert_equal(representation, model, prompt)
        for representation in engine.run(prompts):
            representation.past_key_values()
        engine.flush()
        counts = counting(engine)
        list(engine.run(prompts))
        assert sum(counts) == 0


def test_several_threads_run_batches_on_one_engine(db):
    from concurrent.futures import ThreadPoolExecutor

    model = shared_model("gpt2")
    batches = [random_tree(random.Random(seed), prompts=6) for seed in (1, 1, 2)]
    with Engine(db, model, shared_tokenizer()) as engine, ThreadPoolExecutor(3) as pool:
        for found, prompts in zip(pool.map(lambda batch: list(engine.run(batch)), batches), batches, strict=True):
            for representation, prompt in zip(found, prompts, strict=True):
                assert_equal(representation, model, prompt)


def test_what_came_before_an_error_has_its_results(db):
    def source():
        yield [1, 2, 3]
        yield [1, 2, 4]
        raise RuntimeError("no more")

    with Engine(db, shared_model("gpt2"), shared_tokenizer()) as engine:
        results = engine.run(source())
        assert [list(next(results).token_ids), list(next(results).token_ids)] == [[1, 2, 3], [1, 2, 4]]
        with pytest.raises(RuntimeError, match="no more"):
            next(results)
        assert engine.get([1, 2, 4]).tokens_computed == 0


def test_wrong_arguments(db):
    with Engine(db, shared_model("gpt2"), shared_tokenizer()) as engine:
        for prompts in ("Hello", b"Hello", None, {"a": 1}):
            with pytest.raises(InputTypeError, match="iterable of prompts"):
                list(engine.run(prompts))
        for options in ({"way": "nonsense"}, {"pass_tokens": 0}, {"cache_bytes": 1.5}):
            with pytest.raises(InputTypeError):
                BatchLimits(**options)


STREAM = """
import random, resource, sys
from promptdb import Engine, PromptDB
from promptdb.batch import BatchLimits
from promptdb.demo_models import random_model
from promptdb.demo_text import byte_tokenizer

path, count = sys.argv[1], int(sys.argv[2])
rng = random.Random(0)
contexts = [[rng.randrange(200) for _ in range(20)] for _ in range(50)]


def prompts():
    for _ in range(count):
        yield [*rng.choice(contexts), rng.randrange(200), rng.randrange(4)]


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


with PromptDB(path, map_bytes=1 << 30) as db, Engine(db, random_model("gpt2"), byte_tokenizer()) as engine:
    computed = 0
    for number, representation in enumerate(engine.run(prompts(), limits=BatchLimits(window_tokens=2048))):
        computed += representation.tokens_computed
        if number == count // 5:
            warm = peak_mib()
    assert number == count - 1
    print(computed, peak_mib() - warm)
"""


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_prompts_stream_in_bounded_memory(count, tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "store"), str(count)], check=True, capture_output=True, text=True
    ).stdout
    computed, grown_mib = map(float, output.split())
    rng = random.Random(0)
    contexts = [[rng.randrange(200) for _ in range(20)] for _ in range(50)]
    asked = [[*rng.choice(contexts), rng.randrange(200), rng.randrange(4)] for _ in range(count)]
    # A token is computed again if a later window parts from it in the middle of a stored span, where no logits are.
    parting = {tuple(prompt[:-1]) for prompt in asked}
    assert len(distinct(asked)) <= computed <= len(distinct(asked)) + len(parting)
    # Pages of the store's map that were read count as memory of the process.
    stored_mib = sum(file.stat().st_size for file in (tmp_path / "store").iterdir()) / 2**20
    assert grown_mib < stored_mib + 64
