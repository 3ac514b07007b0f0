"""What the tests of the shared store share: machines, each a local store with its tier."""

from __future__ import annotations

import pytest
from archive_tools import ROOT, check_content, lookup, put

from promptdb.db import PromptDB
from promptdb.far import joined
from promptdb.far_index import Entry
from promptdb.keys import pack_tokens
from promptdb.pulling import Want
from promptdb.shared import connect
from promptdb.shared_options import SharedOptions

PROMPT = list(range(100, 150))
WAIT_S = 20.0


class Machine:
    """A store of its own that shares with others."""

    def __init__(self, path, url, **options):
        chunk_tokens = options.pop("chunk_tokens", 16)
        if options:
            url = SharedOptions(url, **options)
        self.db = PromptDB(path, chunk_tokens=chunk_tokens, shared=url)
        self.tier = connect(self.db)
        self.far = self.tier.calls.far
        self.counts = self.tier.calls.counts

    def put(self, tokens, **options):
        put(self.db, tokens, **options)
        assert self.tier.flush(WAIT_S)

    def pull(self, tokens, *, root=ROOT, boundaries=(), rate=None):
        """Fetch what is missing; return how many tokens are stored here then, all of them checked."""
        match = lookup(self.db, tokens, root)
        want = Want(pack_tokens(tokens), boundaries, match.num_tokens, match.has_logits)
        self.tier.pull(root, [want], rate)
        return check_content(self.db, tokens, root)

    def keys(self, prefix="i/"):
        return sorted(self.far.list(prefix))

    def entries(self):
        keys = self.keys()
        return {key: Entry.unpack(key, joined(each)) for key, each in zip(keys, self.far.get(keys), strict=True)}


@pytest.fixture
def machine(tmp_path):
    """Return what makes machines that share a directory."""
    made = []

    def make(name="one", **options):
        found = Machine(tmp_path / name, options.pop("url", f"file://{tmp_path}/far"), **options)
        made.append(found)
        return found

    yield make
    for each in made:
        each.db.close()
        with PromptDB(each.db.path, shared="none") as db:
            assert db.verify() == []
