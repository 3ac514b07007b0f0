"""Ways in which a stored tensor could come to be wrong, each found by somebody who tried to make it so."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import TEXT, plain_logits, shared_model, shared_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from promptdb import Engine
from promptdb.buffers import BufferPool, Slab
from promptdb.demo_models import random_model
from promptdb.errors import IdentityError, InputTypeError, ModelError, StoreError, TrainModeError, UnsupportedModelError


def in_child(work):
    """Run ``work`` in a forked child; fail if it fails or hangs."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
class TestFork:
    def test_buffers_are_not_shared(self):
        pool = BufferPool()
        mine = torch.frombuffer(pool.lease(1 << 16), dtype=torch.uint8).fill_(7)
        in_child(lambda: mine.zero_())
        assert (mine == 7).all()

    def test_writes_of_the_parent_are_not_waited_for(self, db):
        engine = Engine(db, shared_model("llama"), shared_tokenizer())
        release = threading.Event()
        transact = db._index.transact
        db._index.transact = lambda work: release.wait(30) and transact(work)
        try:
            engine.get(TEXT)

            def child():
                engine._extender.storer.queue.flush()
                engine._extender.storer.queue.close()

            in_child(child)
        finally:
            release.set()
            engine.close()
            del db._index.transact


class TestPool:
    @given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40 << 20), st.integers(0, 9)), max_size=25))
    def test_leases_are_apart_and_come_back(self, steps):
        """What is held keeps its bytes, whatever else is taken and given back; what is kept idle has a limit."""
        pool, held = BufferPool(max_idle_bytes=32 << 20), []
        for number, (take, size, which) in enumerate(steps):
            if take or not held:
                view = memoryview(pool.lease(size)).cast("B")
                view[0] = view[-1] = number
                held.append((number, size, view))
            else:
                held.pop(which % len(held))
                view = None
            assert all((len(each), each[0], each[-1]) == (size, mark, mark) for mark, size, each in held)
        view = None
        held.clear()
        pool.lease(1)
        assert pool.idle_bytes() <= (32 << 20) + (2 << 20)  # and the one just given back

    def test_memory_is_used_again_where_it_fits(self):
        pool = BufferPool()
        sizes = [1 << 20, 30 << 20, 5 << 20]
        leases = [pool.lease(size) for size in sizes]
        del leases
        idle = pool.idle_bytes()
        assert idle == (2 + 30 + 6) << 20
        large = pool.lease(29 << 20)
        assert pool.idle_bytes() == idle - (30 << 20)
        small = pool.lease(4096)  # takes the smallest
        assert pool.idle_bytes() == 6 << 20
        del large, small
        assert pool.idle_bytes() == idle


class TestSlab:
    @given(
        sizes=st.lists(st.integers(0, 300), max_size=40),
        lease_bytes=st.integers(1, 512),
        kept=st.lists(st.booleans(), min_size=40),
    )
    def test_copies_are_apart_and_outlive_the_slab(self, sizes, lease_bytes, kept):
        pool = BufferPool()
        slab, copies = Slab(pool, lease_bytes), []
        for number, (size, keep) in enumerate(zip(sizes, kept, strict=False)):
            copied = slab.copy(memoryview(bytes([number]) * size))
            if keep:
                copies.append((number, size, copied))
        slab = copied = None
        # Who comes next writes over what is free.
        memoryview(pool.lease(lease_bytes)).cast("B")[:] = b"\xff" * lease_bytes
        for number, size, copied in copies:
            assert bytes(copied) == bytes([number]) * size
            copied[:] = b"\xee" * size  # and what one changes, no other sees

    def test_results_of_a_batch_share_no_memory(self, db):
        engine = Engine(db, shared_model("llama"), shared_tokenizer())
        prompts = ["one", "one two", "three", "four"]
        first = [each.logits.clone() for each in engine.run(prompts)]
        engine.flush()
        again = list(engine.run(prompts))
        assert not sum(each.tokens_computed for each in again)
        again[1].logits.fill_(7)
        del again[0]
        gc.collect()
        later = list(engine.run(prompts))
        assert torch.equal(again[0].logits, torch.full_like(first[1], 7))
        for got, expected in zip([*again[1:], *later], [*first[2:], *first], strict=True):
            assert torch.equal(got.logits, expected)


class TestCheckpoints:
    def write(self, path, model):
        from conftest import shared_tokenizer

        model.save_pretrained(path)
        shared_tokenizer().save_pretrained(path)

    def test_missing_weights_are_refused(self, db, tmp_path):
        self.write(tmp_path / "headless", random_model("gpt_neox").gpt_neox)
        with pytest.raises(ModelError, match=r"embed_out|lm_head"):
            Engine.from_pretrained(db, tmp_path / "headless")

    def test_an_adapter_whose_base_is_replaced(self, db, tmp_path):
        from peft import LoraConfig, get_peft_model

        self.write(tmp_path / "base", random_model("llama"))
        base = Engine.from_pretrained(db, tmp_path / "base").model
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "adapter")
        shared_tokenizer().save_pretrained(tmp_path / "adapter")
        with Engine.from_pretrained(db, tmp_path / "adapter") as engine:
            engine.get(TEXT)
        shutil.rmtree(tmp_path / "base")
        self.write(tmp_path / "base", random_model("llama", seed=1))
        with Engine.from_pretrained(db, tmp_path / "adapter") as engine:
            got = engine.get(TEXT)
            assert got.tokens_loaded == 0
            torch.testing.assert_close(got.logits, plain_logits(engine.model, got.token_ids), rtol=0, atol=1e-5)

    def test_files_replaced_while_they_are_loaded(self, db, tmp_path, monkeypatch):
        from transformers import AutoModelForCausalLM

        self.write(tmp_path / "model", random_model("llama"))
        load = AutoModelForCausalLM.from_pretrained

        def load_and_replace(*arguments, **options):
            loaded = load(*arguments, **options)
            self.write(tmp_path / "model", random_model("llama", seed=1))
            return loaded

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_and_replace)
        with Engine.from_pretrained(db, tmp_path / "model") as engine:
            first = engine.root
        monkeypatch.undo()
        with Engine.from_pretrained(db, tmp_path / "model") as engine:
            assert engine.root != first

    def test_the_memo_spares_the_hash_of_an_unchanged_checkpoint(self, db, tmp_path, monkeypatch):
        self.write(tmp_path / "model", random_model("llama"))
        with Engine.from_pretrained(db, tmp_path / "model") as engine:
            root = engine.root
        monkeypatch.setattr("promptdb.watch.weights_id", None)
        with Engine.from_pretrained(db, tmp_path / "model") as engine:
            assert engine.root == root


class TestAmbientState:
    @pytest.mark.parametrize(
        "context",
        [
            lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            torch.inference_mode,
            torch.enable_grad,
            lambda: torch.device("meta"),
        ],
        ids=["autocast", "inference", "grad", "device"],
    )
    def test_contexts_do_not_reach_what_is_stored(self, db, context):
        model = random_model("llama")
        ids = shared_tokenizer()(TEXT).input_ids
        expected = plain_logits(model, ids)
        with Engine(db, model, shared_tokenizer()) as engine:
            with context():
                engine.get(ids[:30])
                inside = engine.get(ids)
                cache = inside.past_key_values(40)
            torch.testing.assert_close(inside.logits, expected, rtol=0, atol=1e-5)
            with torch.no_grad():
                ends = {"attention_mask": torch.ones(1, len(ids)), "position_ids": torch.arange(40, len(ids))[None]}
                rest = model(torch.tensor([ids[40:]]), past_key_values=cache, **ends).logits[0, -1]
            torch.testing.assert_close(rest, expected, rtol=0, atol=1e-5)
        with Engine(db, model, shared_tokenizer()) as engine:
            torch.testing.assert_close(engine.get(ids).logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_default_dtype(self, db, dtype):
        model = random_model("llama")
        with Engine(db, model, shared_tokenizer()) as engine:
            expected = engine.get(TEXT, store=False)
            torch.set_default_dtype(dtype)
            try:
                got = engine.get(TEXT + "")
                assert torch.get_default_dtype() == dtype
            finally:
                torch.set_default_dtype(torch.float32)
            torch.testing.assert_close(got.token_logprobs, expected.token_logprobs, rtol=0, atol=1e-6)

    def test_generating_under_autocast_runs_untouched(self, db):
        model = random_model("llama")
        ids = torch.tensor([shared_tokenizer()(TEXT).input_ids])
        with Engine(db, model, shared_tokenizer()) as engine, torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            assert torch.equal(engine.generate(TEXT, max_new_tokens=5, do_sample=False), expected)


class TestArchitectures:
    @pytest.mark.parametrize(
        ("arch", "options"),
        [
            ("gemma3_text", {"use_bidirectional_attention": True}),
            ("llama", {"is_causal": False}),
            ("qwen3", {"is_causal": False}),
        ],
    )
    def test_attention_that_is_not_causal(self, db, arch, options):
        model = random_model(arch, **options)
        with pytest.raises(UnsupportedModelError, match=arch):
            Engine(db, model, shared_tokenizer())

    def test_positions_that_start_elsewhere(self, db):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "roberta", vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=200, is_decoder=True, initializer_range=0.3,
        )  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="roberta"):
            Engine(db, AutoModelForCausalLM.from_config(config).eval(), shared_tokenizer())

    def test_prompt_tuning_is_refused_and_ordinary_lora_is_not(self, db):
        from peft import LoraConfig, PromptTuningConfig, get_peft_model

        tuned = get_peft_model(random_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        with pytest.raises((UnsupportedModelError, IdentityError)):
            Engine(db, tuned.eval(), shared_tokenizer())
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        adapted = get_peft_model(random_model("llama"), lora).eval()
        with Engine(db, adapted, shared_tokenizer()) as engine:
            engine.get(TEXT[:40])
            got = engine.get(TEXT)
            torch.testing.assert_close(got.logits, plain_logits(adapted, got.token_ids), rtol=0, atol=1e-5)


class TestChangesWhileWorking:
    def test_weights_that_change_during_the_forward_pass_are_not_stored_under_the_old_ones(self, db, monkeypatch):
        model = random_model("llama")
        with Engine(db, model, shared_tokenizer()) as engine:
            runner, before = engine._extender.runner, engine.root
            extend, changes = runner.extend, []

            def change_and_extend(*arguments, **options):
                if not changes:
                    changes.append(1)
                    with torch.no_grad():
                        model.model.norm.weight.mul_(1.5)
                return extend(*arguments, **options)

            monkeypatch.setattr(runner, "extend", change_and_extend)
            got = engine.get(TEXT)
            assert engine.root != before
            torch.testing.assert_close(got.logits, plain_logits(model, got.token_ids), rtol=0, atol=1e-4)
            with torch.no_grad():
                model.model.norm.weight.div_(1.5)
            assert engine.root == before
            again = engine.get(TEXT)
            assert again.tokens_loaded == 0
            torch.testing.assert_close(again.logits, plain_logits(model, got.token_ids), rtol=0, atol=1e-4)

    def test_an_attention_function_replaced_under_its_name(self, db):
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        original = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with Engine(db, random_model("llama"), shared_tokenizer()) as engine:
            engine.get(TEXT)
            AttentionInterface.register("sdpa", lambda *a, **k: original(*a, **k))
            try:
                with pytest.raises(IdentityError, match="sdpa"):
                    engine.get(TEXT)
            finally:
                AttentionInterface.register("sdpa", original)
            assert engine.get(TEXT).tokens_computed == 0

    def test_train_mode_is_noticed_on_a_hit_too(self, db):
        model = random_model("gpt2")
        with Engine(db, model, shared_tokenizer()) as engine:
            engine.get(TEXT)
            model.train()
            with pytest.raises(TrainModeError):
                engine.get(TEXT)

    def test_a_closed_engine_says_so(self, db):
        engine = Engine(db, shared_model("llama"), shared_tokenizer())
        representation = engine.get(TEXT)
        engine.close()
        for call in (lambda: engine.get(TEXT), lambda: engine.lookup(TEXT), representation.past_key_values):
            with pytest.raises(StoreError, match="closed"):
                call()

    def test_the_next_turn_does_not_wait_for_the_disk(self, db):
        with Engine(db, random_model("llama"), shared_tokenizer()) as engine:
            ids = list(engine.get(TEXT).token_ids)
            engine.flush()
            release, transact = threading.Event(), db._index.transact
            db._index.transact = lambda work: release.wait(60) and transact(work)
            try:
                turn = [*ids, 7, 8]
                engine.get(turn)
                longer = engine.get([*turn, 9])
                assert (longer.tokens_loaded, longer.tokens_computed) == (len(turn), 1)
                assert engine.get([*turn, 9]).tokens_computed == 0
            finally:
                release.set()
                engine.flush()
                del db._index.transact
            torch.testing.assert_close(longer.logits, plain_logits(engine.model, longer.token_ids), rtol=0, atol=1e-5)
            engine._extender.held = None
            assert engine.get([*turn, 9]).tokens_computed == 0

    def test_what_was_not_to_be_stored_is_not(self, db):
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            representation = engine.get(TEXT, store=False)
            engine._extender.held = None
            representation.past_key_values()
            engine.flush()
            assert db.stat()["num_nodes"] == 0
            # Asked for once more, it is to be stored, although it is still held in memory.
            assert engine.get(TEXT, store=False).tokens_computed == 0
            assert engine.get(TEXT).tokens_computed == 1
            assert engine.lookup(TEXT).is_complete
            engine.get(TEXT + " Or", store=False)
            engine.get(TEXT + " Or more")
            # A prompt is stored whole, although a part of it was held in memory and not to be stored.
            assert engine.lookup(TEXT + " Or more").is_complete


class TestCaches:
    def test_tokens_that_were_cropped_stay_as_somebody_saw_them(self, db):
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            cache = engine.get(TEXT).past_key_values()
            seen = cache.layers[0].keys
            before = seen.clone()
            cache.crop(-1)
            with torch.no_grad():
                engine.model(torch.tensor([[9]]), past_key_values=cache)
            assert torch.equal(seen, before)

    def test_what_the_caller_changes_does_not_reach_what_is_held(self, db):
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            first = engine.get(TEXT)
            expected = first.logits.clone()
            first.logits.zero_()
            first.token_logprobs.zero_()
            again = engine.get(TEXT)
            assert torch.equal(again.logits, expected)
            assert again.token_logprobs.any()

    def test_hidden_states_of_the_whole_prompt(self, db):
        model = random_model("llama")
        ids = torch.tensor([shared_tokenizer()(TEXT).input_ids])
        options = {"max_new_tokens": 3, "do_sample": False, "output_hidden_states": True}
        options["return_dict_in_generate"] = True
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        with Engine(db, model, shared_tokenizer()) as engine:
            got = engine.generate(TEXT, **options)
        assert got.hidden_states[0][0].shape == expected.hidden_states[0][0].shape

    def test_a_representation_can_be_pickled(self, db):
        with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            representation = engine.get(TEXT)
        copy = pickle.loads(pickle.dumps(representation))
        assert torch.equal(copy.logits, representation.logits)
        with pytest.raises(StoreError, match="pickled"):
            copy.past_key_values()


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (torch.tensor(5), "shape"),
        (torch.zeros(2, 3, dtype=torch.long), "one prompt"),
        (torch.tensor([True, False]), "mask"),
        ([True, False], "mask"),
        ({"input_ids": [1, 2]}, "input_ids"),
    ],
)
def test_prompts_that_are_something_else(db, prompt, says):
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine, pytest.raises(InputTypeError, match=says):
        engine.get(prompt)
