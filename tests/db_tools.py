"""What the tests of the store share."""

import contextlib
import os
import shutil
import subprocess

import lmdb
import pytest

from promptdb.blobs import TensorSpec, build_blob
from promptdb.keys import Root, pack_tokens
from promptdb.testing import encode_tokens

ROOT = Root("aa" * 32, "bb" * 32)
LOGITS_BLOB = bytes(build_blob([(TensorSpec("logits", "F32", (4,)), bytes(16))]))


def put(db, tokens, *, boundaries=(), logits=(), root=ROOT):
    packed = pack_tokens(tokens)
    encode = encode_tokens(packed, boundaries, db.chunk_tokens)
    return db.put(root, packed, 0, encode, dict.fromkeys(logits, LOGITS_BLOB))


def lookup(db, tokens):
    return db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)


def read_tokens(db, tokens):
    """Read what is stored of a prompt, blob by blob."""
    found = b""
    with db.read() as snapshot:
        for step in snapshot.match(ROOT, pack_tokens(tokens)).steps:
            record = snapshot.record(step.node)
            found += bytes(snapshot.blob(step.node, record, "tokens")["tokens"].data)[: 4 * step.num_tokens]
    return found


@contextlib.contextmanager
def raw(path, write=True):
    """Open the LMDB file behind promptdb's back."""
    env = lmdb.open(str(path), max_dbs=32, map_size=1 << 30)
    try:
        with env.begin(write=write) as transaction:
            yield lambda table: (env.open_db(table.encode(), txn=transaction, create=False), transaction)
    finally:
        env.close()


@contextlib.contextmanager
def mounted(*arguments):
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)
