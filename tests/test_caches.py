"""Caches that an engine hands out, and the one that it keeps: whose memory is whose."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from contextlib import contextmanager, nullcontext
from pickle import dumps, loads

import pytest
import torch
from conftest import TEXT, plain_logits, shared_model
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from promptdb import Engine
from promptdb.cache import PromptCache, PromptLayer
from promptdb.errors import InputTypeError, UnsupportedModelError
from promptdb.extender import Extender
from promptdb.hook_points import HookVariableNames as N
from promptdb.hooks import Hook
from promptdb.interventions import Intervention
from promptdb.runner import Runner


@pytest.fixture
def engine(db, tokenizer):
    with Engine(db, shared_model("llama"), tokenizer) as engine:
        yield engine


class TestCaches:
    def test_every_caller_gets_its_own(self, engine):
        representation = engine.get(TEXT)
        first, second = representation.past_key_values(), representation.past_key_values()
        before = second.layers[0].keys.clone()
        first.layers[0].keys.zero_()
        with torch.no_grad():
            engine.model(torch.tensor([[5, 6]]), past_key_values=first, use_cache=True)
        assert torch.equal(second.layers[0].keys, before)
        assert torch.equal(representation.past_key_values().layers[0].keys, before)

    def test_memory_is_not_used_again_while_a_tensor_lives(self, engine):
        engine.get(TEXT)
        engine._extender.held = None
        kept = engine.get(TEXT).past_key_values().layers[1].values
        before = kept.clone()
        gc.collect()
        for _ in range(5):
            other = engine.get([7] * 80)
            other.past_key_values().layers[1].values.fill_(3.0)
            engine._extender.held = None
        assert torch.equal(kept, before)

    def test_appends_in_place(self, engine):
        engine.get([7, 8, 9])  # the first computation finds out the shapes, the second one uses them
        for fresh in (True, False):
            engine.get(TEXT if fresh else TEXT + " again")
            cache = engine._extender.held.cache
            assert cache.room() > 0
            assert cache.stacks(engine._extender.layout) is not None
            place = cache.layers[0].keys.data_ptr()
            with torch.no_grad():
                engine.model(torch.tensor([[5, 6]]), past_key_values=cache, use_cache=True)
            assert cache.layers[0].keys.data_ptr() == place

    def test_another_dtype_is_not_converted_silently(self, engine):
        cache = engine.get(TEXT).past_key_values()
        layer = cache.layers[0]
        more = torch.zeros(1, layer.keys.shape[1], 1, layer.keys.shape[3], dtype=torch.bfloat16)
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="bfloat16"):
            layer.update(more, more)

    def test_cut_short(self, engine):
        whole = engine.get(TEXT)
        for num_tokens in (0, 1, 17, whole.num_tokens):
            cache = whole.past_key_values(num_tokens)
            assert cache.get_seq_length() == num_tokens
        with pytest.raises(InputTypeError):
            whole.past_key_values(whole.num_tokens + 1)

    def test_tokens_that_were_cut_off_are_not_written_over(self, engine):
        cache = engine.get(TEXT).past_key_values()
        seen = cache.layers[0].keys
        before = seen.clone()
        cache.crop(10 - cache.get_seq_length())
        with torch.no_grad():
            engine.model(torch.tensor([[5, 6]]), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 12
        assert torch.equal(seen, before)

    def test_continuing_by_hand_equals_one_pass(self, engine):
        ids = torch.tensor([engine.get(TEXT).token_ids])
        cache = engine.get(TEXT).past_key_values(40)
        with torch.no_grad():
            whole = engine.model(ids).logits
            rest = engine.model(
                ids[:, 40:],
                past_key_values=cache,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(40, ids.shape[1])[None],
            ).logits
        torch.testing.assert_close(rest, whole[:, 40:], rtol=0, atol=1e-5)

    def test_growing_past_its_room_and_with_gradients(self, engine):
        cache = engine.get(TEXT).past_key_values(10)
        reference = DynamicCache()
        for layer, number in zip(cache.layers, range(2), strict=True):
            reference.update(layer.keys.clone(), layer.values.clone(), number)
        ids = torch.tensor([engine.get(TEXT).token_ids])
        for first in range(10, 95, 5):
            for each in (cache, reference):
                with torch.set_grad_enabled(first > 80):
                    engine.model(ids[:, first : first + 5], past_key_values=each, use_cache=True)
        ids = torch.randint(5, 300, (1, 300))
        for each in (cache, reference):
            with torch.no_grad():
                engine.model(ids, past_key_values=each, use_cache=True)
        for one, other in zip(cache.layers, reference.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-5)

    def test_a_representation_keeps_no_keys_and_values_alive(self, engine):
        representations = [engine.get([5 + n, 6, 7, 8]) for n in range(3)]
        cache = weakref.ref(engine._extender.held.cache)
        engine.get([9, 9, 9])
        gc.collect()
        assert cache() is None
        assert [each.past_key_values().get_seq_length() for each in representations] == [4, 4, 4]

    def test_keys_and_values_that_were_removed_are_computed_again(self, engine):
        representation = engine.get(TEXT)
        expected = representation.past_key_values()
        engine.flush()
        engine._extender.held = None
        root_nodes = [node for node, record in engine.db.nodes() if record.start == 0]
        assert engine.db.remove(root_nodes[0]) > 1
        again = representation.past_key_values()
        torch.testing.assert_close(again.layers[0].keys, expected.layers[0].keys, rtol=0, atol=1e-5)

    def test_not_stored_on_request(self, engine):
        representation = engine.get(TEXT, store=False)
        engine.flush()
        assert engine.db.stat()["num_nodes"] == 0
        assert representation.past_key_values().get_seq_length() == representation.num_tokens


CONTEXT = list(range(40, 90))


def _same(x, pctx):
    return x * 1


def place(engine) -> int:
    return engine._extender.held.cache.layers[0].keys.data_ptr()


def _scale(layer):
    layer.keys.mul_(3)


def _give_other_data(layer):
    layer.keys.data = layer.keys.data * 3


def _set_other_memory(layer):
    layer.keys.set_(layer.keys * 3)


def _replace(layer):
    layer.keys = layer.keys * 3


class TestChangesByHand:
    """Keys that somebody changed are the ones that the model goes on with, however they were changed."""

    @pytest.mark.parametrize("change", [_scale, _give_other_data, _set_other_memory, _replace])
    @pytest.mark.parametrize("copied", [lambda each: each, copy.copy, copy.deepcopy, lambda each: loads(dumps(each))])
    @torch.no_grad()
    def test_are_seen(self, engine, change, copied):
        representation = engine.get(list(range(10, 40)))
        cache = representation.past_key_values()
        expected = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        cache.layers = [copied(layer) for layer in cache.layers]
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            change(layer)
            change(other)
        for token_ids in (torch.arange(50, 58)[None], torch.tensor([[60]])):
            found = engine.model(token_ids, past_key_values=cache).logits
            torch.testing.assert_close(
                found, engine.model(token_ids, past_key_values=expected).logits, atol=1e-5, rtol=0
            )
        assert cache.get_seq_length() == 39

    @torch.no_grad()
    def test_a_layer_of_an_older_version_goes_on(self, engine):
        cache = engine.get([5, 6, 7]).past_key_values()
        expected = plain_logits(engine.model, [5, 6, 7, 8])
        for layer in cache.layers:
            layer.__dict__.pop("_views", None)
            layer.__dict__.pop("before_update", None)
        found = engine.model(torch.tensor([[8]]), past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class TestTheHeldCache:
    """What the last computation left is continued in place where that is safe, and copied where it is not."""

    @pytest.mark.parametrize("is_stored", [True, False])
    def test_questions_after_a_context_copy_nothing(self, engine, is_stored):
        if is_stored:
            engine.put(CONTEXT)
        engine.get([*CONTEXT, 5, 6, 7], store=is_stored)
        where = place(engine)
        for question in ([8], [9, 10, 11, 12], [13, 5]):
            found = engine.get([*CONTEXT, *question], store=is_stored)
            assert place(engine) == where
            assert found.tokens_loaded >= len(CONTEXT) - 1
            expected = plain_logits(engine.model, found.token_ids)
            torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                found.token_logprobs, engine.get(found.token_ids, logits="all").token_logprobs, rtol=0, atol=1e-5
            )
            engine.get([*CONTEXT, *question, 3], store=is_stored)
            where = place(engine)
        engine.flush()
        assert engine.db.verify() == []

    def test_what_was_handed_out_stays_as_it_is(self, engine):
        handed = []
        for question in range(5, 15):
            found = engine.get([*CONTEXT, question, question + 1])
            cache = found.past_key_values()
            handed.append((cache, [layer.keys.clone() for layer in cache.layers]))
        for cache, before in handed:
            for layer, keys in zip(cache.layers, before, strict=True):
                assert torch.equal(layer.keys, keys)

    def test_without_room_it_moves(self, engine):
        engine.get([*CONTEXT, 5])
        where = place(engine)
        longer = engine.get([*CONTEXT, *range(6, 6 + 80)])
        assert place(engine) != where
        torch.testing.assert_close(longer.logits, plain_logits(engine.model, longer.token_ids), rtol=0, atol=1e-5)

    def test_what_hooks_may_have_kept_is_not_written_over(self, db, tokenizer):
        same = Intervention("same", [Hook(N.KEY_STATES, _same)])
        with Engine(db, shared_model("llama"), tokenizer, intervention=same) as engine:
            engine.get([*CONTEXT, 5, 6])
            where = place(engine)
            again = engine.get([*CONTEXT, 7, 8])
            assert again.tokens_loaded >= len(CONTEXT) - 1
            assert place(engine) != where

    @pytest.mark.parametrize("hooked", [0, 1])
    def test_neither_before_nor_after_a_pass_under_hooks(self, engine, monkeypatch, hooked):
        places = []
        for number in range(2):
            with monkeypatch.context() as patch:
                if number == hooked:
                    patch.setattr(engine._extender.runner, "attach", lambda: nullcontext())
                engine.get([*CONTEXT, 5, number])
                places.append(place(engine))
        assert places[0] != places[1]

    def test_what_a_mode_of_torch_kept_is_not_written_over(self, engine):
        kept = []

        class Keep(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func is scaled_dot_product_attention:
                    kept.append((args[1], args[1].clone()))
                return func(*args, **(kwargs or {}))

        with Keep():
            engine.get([*CONTEXT, 5, 6])
        engine.get([*CONTEXT, 7, 8])
        assert kept
        assert all(torch.equal(seen, before) for seen, before in kept)

    def test_fetching_while_the_engine_goes_on(self, engine):
        """Threads copy the held cache while it is being continued: each copy is of one prompt."""
        engine.put(CONTEXT)
        expected = {}
        for question in range(5, 25):
            ids = (*CONTEXT, question, question + 1, question + 2)
            expected[ids] = engine.get(ids, store=False).past_key_values()
        failures = []
        stop = threading.Event()

        def fetch():
            rng = random.Random(threading.get_ident())
            while not stop.is_set():
                ids = rng.choice(list(expected))
                cache = engine.get(ids, store=False).past_key_values()
                for layer, other in zip(cache.layers, expected[ids].layers, strict=True):
                    if not torch.allclose(layer.keys, other.keys, rtol=0, atol=1e-5):
                        failures.append(ids)

        threads = [threading.Thread(target=fetch) for _ in range(4)]
        for thread in threads:
            thread.start()
        stop.wait(1.5)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_another_prompt_takes_its_place_while_it_is_asked_for(self, engine, monkeypatch):
        """What is held is looked at once: not one prompt compared, and another one's cache copied."""
        other = list(range(100, 140))
        found = engine.put(other)
        expected = found.past_key_values()
        engine.get([*CONTEXT, 5])
        reading = Extender._reading_held

        @contextmanager
        def replaced(extender):
            with reading(extender) as held:
                thread = threading.Thread(target=engine.get, args=(other,), kwargs={"logits": "all"})
                thread.start()
                thread.join()
                assert extender.held is not held
                yield held

        monkeypatch.setattr(Extender, "_reading_held", replaced)
        again = found.past_key_values()
        for layer, kept in zip(again.layers, expected.layers, strict=True):
            torch.testing.assert_close(layer.keys, kept.keys, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    @pytest.mark.parametrize("where", [(PromptLayer, "rewind"), (Runner, "_call")])
    def test_interrupted_on_the_way(self, engine, monkeypatch, where, error):
        found = engine.get([5, 6, 7], store=False)
        expected = found.past_key_values()
        work = getattr(*where)

        def stopped(*args):
            work(*args)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(*where, stopped)
            with pytest.raises(error):
                engine.get([5, 6, 8], store=False)
        for layer, kept in zip(found.past_key_values().layers, expected.layers, strict=True):
            torch.testing.assert_close(layer.keys, kept.keys, rtol=0, atol=1e-5)
        again = engine.get([5, 6, 8], store=False)
        torch.testing.assert_close(again.logits, plain_logits(engine.model, [5, 6, 8]), rtol=0, atol=1e-5)

    def test_a_short_prompt_does_not_keep_the_memory_of_a_long_one(self, engine):
        engine.get([5, 6, 7, *[9] * 400], store=False)
        for question in range(10, 15):
            engine.get([5, 6, 7, question], store=False)
        assert engine._extender.held.cache.room() < 100

    def test_nothing_is_written_over_while_it_is_copied(self, engine, monkeypatch):
        found = engine.get([*CONTEXT, 5, 6])
        expected = found.past_key_values()
        copy, others = PromptCache.copy, []

        def interrupted(cache, *sizes):
            if not others:
                others.append(threading.Thread(target=engine.get, args=([*CONTEXT, 7, 8],)))
                others[0].start()
                others[0].join(0.5)  # it would be done by now, if it did not wait
            return copy(cache, *sizes)

        monkeypatch.setattr(PromptCache, "copy", interrupted)
        again = found.past_key_values()
        others[0].join()
        for layer, other in zip(again.layers, expected.layers, strict=True):
            assert torch.equal(layer.keys, other.keys)

    def test_approximate_ones_come_from_the_store(self, db, tokenizer):
        """What is stored in 8 bits is not what was computed: results must not depend on what happened before."""
        with Engine(db, shared_model("llama"), tokenizer, kv_codec="int8") as engine:
            engine.put(CONTEXT)
            engine.get([*CONTEXT, 5, 6], store=False)
            again = engine.get([*CONTEXT, 7, 8], store=False)
            engine._extender.held = None
            assert torch.equal(again.logits, engine.get([*CONTEXT, 7, 8], store=False).logits)
