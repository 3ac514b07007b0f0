"""An engine in any order of calls: every result is that of one plain pass, and what was handed out stays as it is."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from conftest import shared_model, shared_tokenizer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from promptdb import Engine, PromptDB
from promptdb.runner import Runner

CLOSE = {"rtol": 0, "atol": 1e-5}
BEGINNINGS = [list(range(40, 40 + length)) for length in (1, 7, 16, 23)]
# Few different tokens, so that prompts part at every place; and some that are longer than the room of a cache.
ENDINGS = st.one_of(st.lists(st.integers(5, 7), max_size=6), st.just([9] * 90))
PROMPTS = st.builds(lambda begin, end: [*begin, *end], st.sampled_from(BEGINNINGS), ENDINGS)


class Engines(RuleBasedStateMachine):
    """One engine, the representations that it gave, and copies of the caches that it handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []
        self.handed = []

    @initialize(
        arch=st.sampled_from(["llama", "gpt2", "gemma3_text"]), chunk=st.sampled_from([4, 16]), behind=st.booleans()
    )
    def begin(self, arch: str, chunk: int, behind: bool) -> None:
        self.model = shared_model(arch)
        self.db = PromptDB.in_memory(chunk_tokens=chunk)
        self.engine = Engine(self.db, self.model, shared_tokenizer(), write_behind=behind)

    def plain(self, ids: list[int]):
        with torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=True)

    def check(self, found, ids: list[int], *, all_logits: bool = False) -> None:
        logits = self.plain(ids).logits[0]
        assert found.token_ids == tuple(ids)
        torch.testing.assert_close(found.logits, logits if all_logits else logits[-1], **CLOSE)
        logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
        torch.testing.assert_close(found.token_logprobs, logprobs, rtol=0, atol=2e-5)
        self.found.append(found)

    @rule(ids=PROMPTS, store=st.booleans(), all_logits=st.booleans())
    def get(self, ids: list[int], store: bool, all_logits: bool) -> None:
        found = self.engine.get(ids, store=store, logits="all" if all_logits else "last")
        self.check(found, ids, all_logits=all_logits)

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=4), store=st.booleans())
    def run_many(self, prompts: list[list[int]], store: bool) -> None:
        for found, ids in zip(self.engine.run(prompts, store=store), prompts, strict=True):
            self.check(found, ids)

    @rule(ids=PROMPTS, new=st.integers(1, 3))
    def generate(self, ids: list[int], new: int) -> None:
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 1}
        with torch.no_grad():
            expected = self.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        assert torch.equal(self.engine.generate(ids, **options), expected)

    @rule(which=st.integers(0, 100), share=st.floats(0, 1), changed=st.booleans())
    def fetch(self, which: int, share: float, changed: bool) -> None:
        if not self.found:
            return
        found = self.found[which % len(self.found)]
        count = round(share * found.num_tokens)
        cache = found.past_key_values(count)
        assert cache.get_seq_length() == count
        if not count:
            return
        expected = self.plain(list(found.token_ids)).past_key_values
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            kept = theirs.keys.shape[-2]  # a layer with a sliding window has dropped the others
            first = max(0, found.num_tokens - kept)
            torch.testing.assert_close(ours.keys[:, :, first:], theirs.keys[:, :, : max(0, count - first)], **CLOSE)
        if changed:  # it is the caller's
            for layer in cache.layers:
                layer.keys.fill_(7.0)
        self.handed.append([(layer.keys, layer.keys.clone()) for layer in cache.layers])

    @rule(ids=PROMPTS, late=st.booleans(), error=st.sampled_from([KeyboardInterrupt, MemoryError]))
    def interrupt(self, ids: list[int], late: bool, error: type[BaseException]) -> None:
        call = Runner._call

        def stopped(*args):
            if late:
                call(*args)
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runner, "_call", stopped)
            with suppress(error):  # of a full hit there is no pass
                self.found.append(self.engine.get(ids))

    @rule(which=st.integers(0, 100))
    def remove(self, which: int) -> None:
        self.engine.flush()
        nodes = [node for node, _ in self.db.nodes()]
        if nodes:
            self.db.remove(nodes[which % len(nodes)])

    @rule()
    def forget(self) -> None:
        self.engine._extender.held = None

    @invariant()
    def what_was_handed_out_stays(self) -> None:
        for cache in self.handed:
            assert all(torch.equal(keys, before) for keys, before in cache)

    def teardown(self) -> None:
        self.engine.close()
        assert self.db.verify() == []
        self.db.close()


TestEngines = Engines.TestCase
TestEngines.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
