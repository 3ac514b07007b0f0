"""The ciphers, against published vectors and against an implementation of their parts by others; and keys of users."""

import copy
import logging
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFCMAC, CounterLocation, Mode
from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb.errors import InputTypeError, StoreKeyError
from promptdb.format import BLOBS, CHILDREN, LABELS, META, NODES, QUEUE, STORE_KEY
from promptdb.memory import MemoryIndex
from promptdb.sealed import SealedIndex, UnreadableKey
from promptdb.sealing import HIDDEN_BYTES, NONCE_BYTES, SEAL_BYTES, Sealer, Xaes256Gcm
from promptdb.userkey import KEY_FILE_VARIABLE, KEY_VARIABLE, find_key, read_key_file

KEY = bytes(range(32))


# Ciphers


@pytest.mark.parametrize(
    ("key", "context", "ciphertext"),
    [
        (b"\x01" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\x03" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
)
def test_vectors_of_the_specification(key, context, ciphertext):
    cipher = Xaes256Gcm(key)
    assert cipher.encrypt(b"ABCDEFGHIJKLMNOPQRSTUVWX", b"XAES-256-GCM", context).hex() == ciphertext
    sealed = b"ABCDEFGHIJKLMNOPQRSTUVWX" + bytes.fromhex(ciphertext)
    assert bytes(cipher.open(sealed, context)) == b"XAES-256-GCM"


def reference_open(key, sealed, context):
    """XAES-256-GCM by way of the library's key derivation (SP 800-108, CMAC)."""
    nonce = bytes(sealed[:NONCE_BYTES])
    derived = KBKDFCMAC(
        algorithm=algorithms.AES, mode=Mode.CounterMode, length=32, rlen=2, llen=None,
        location=CounterLocation.BeforeFixed, label=None, context=None, fixed=b"X\0" + nonce[:12],
    ).derive(key)  # fmt: skip
    return AESGCM(derived).decrypt(nonce[12:], bytes(sealed[NONCE_BYTES:]), context)


@settings(max_examples=60, deadline=None)
@given(
    key=st.binary(min_size=32, max_size=32),
    value=st.binary(max_size=200) | st.integers(65_000, 67_000).map(os.urandom),
    context=st.binary(max_size=50),
)
def test_sealed_values_are_those_of_the_reference(key, value, context):
    cipher = Xaes256Gcm(key)
    sealed = cipher.seal(value, context)
    assert len(sealed) == len(value) + SEAL_BYTES
    assert reference_open(key, sealed, context) == value
    assert bytes(cipher.open(sealed, context)) == value
    assert cipher.open(sealed, context + b"x") is None
    assert Xaes256Gcm(key[::-1] + b"" if key != key[::-1] else b"\1" * 32).open(sealed, context) is None


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 70_000])
def test_any_changed_bit_is_noticed(num_bytes):
    sealer = Sealer(KEY)
    sealed = bytes(sealer.seal(b"place", bytes(num_bytes)))
    assert bytes(sealer.open(b"place", sealed)) == bytes(num_bytes)
    for place in {*range(min(60, len(sealed))), len(sealed) // 2, len(sealed) - 1}:
        changed = bytearray(sealed)
        changed[place] ^= 1 << place % 8
        assert sealer.open(b"place", changed) is None
    for cut in (0, 1, SEAL_BYTES - 1, len(sealed) - 1):
        assert sealer.open(b"place", sealed[:cut]) is None
    assert sealer.open(b"place", sealed + b"\0") is None


def test_no_nonce_comes_twice():
    sealer = Sealer(KEY)
    assert len({bytes(sealer.seal(b"", b"same")) for _ in range(1000)}) == 1000


@given(name=st.binary(min_size=1, max_size=479), context=st.binary(max_size=30))
@settings(max_examples=50, deadline=None)
def test_names(name, context):
    sealer = Sealer(KEY)
    hidden = sealer.hide(context, name)
    assert hidden == Sealer(KEY).hide(context, name)
    assert len(hidden) == len(name) + HIDDEN_BYTES
    assert sealer.reveal(context, hidden) == name
    assert sealer.reveal(context + b"1", hidden) is None
    assert sealer.reveal(context, hidden[:-1] + bytes([hidden[-1] ^ 1])) is None
    assert Sealer(KEY[::-1]).reveal(context, hidden) is None


def test_names_and_values_have_keys_of_their_own():
    sealer = Sealer(KEY)
    for key in (KEY, KEY + KEY):
        with pytest.raises(InvalidTag):
            AESSIV(key).decrypt(sealer.hide(b"c", b"name"), [b"c"])
    assert Xaes256Gcm(KEY).open(sealer.seal(b"c", b"value"), b"c") is None


def test_threads_share_a_sealer():
    sealer = Sealer(KEY)

    def work(number):
        value = bytes([number]) * (100 if number % 2 else 70_000)
        return all(
            bytes(sealer.open(b"c", sealer.seal(b"c", value))) == value
            and sealer.reveal(b"c", sealer.hide(b"c", value[:99])) == value[:99]
            for _ in range(50)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_a_data_key_is_opened_by_its_users_key_alone():
    sealer, user_key = Sealer.new(), os.urandom(32)
    wrapped = sealer.wrap(user_key)
    assert bytes(Sealer.unwrap(wrapped, user_key).open(b"c", sealer.seal(b"c", b"value"))) == b"value"
    assert Sealer.unwrap(wrapped, os.urandom(32)) is None
    assert Sealer.unwrap(wrapped[:-1], user_key) is None
    assert Sealer.new().open(b"c", sealer.seal(b"c", b"value")) is None


def test_keys_are_not_shown():
    sealer = Sealer(KEY)
    assert KEY.hex() not in repr(sealer)
    assert "keys" not in repr(sealer)
    for write in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="keys are not written"):
            write(sealer)


# Tables

ITEMS = [
    (META, b"limits"),
    (NODES, b"\x07" * 32),
    (BLOBS, b"\x07" * 32 + b"kv"),
    (CHILDREN, b"\x07" * 32 + b"\0\0\0\x09"),
    (CHILDREN, b"\x07" * 32 + b"\0\0\0\x0a"),
    (LABELS, b"p" + b"\x07" * 32 + b"a name"),
    (LABELS, b"p" + b"\x07" * 32),
    (QUEUE, b"\1" + bytes(8) + b"\x07" * 32),
]


def sealed_store():
    inner = MemoryIndex()
    index = SealedIndex(inner, Sealer(KEY))

    def fill(writer):
        for number, (table, key) in enumerate(ITEMS):
            writer.put(table, key, b"value %d" % number)
        writer.put(META, STORE_KEY, b"in the clear")

    index.transact(fill)
    return inner, index


def stored_items(inner):
    with inner.read() as reader:
        return {
            (table, key): bytes(value) for table in {table for table, _ in ITEMS} for key, value in reader.scan(table)
        }


def test_nothing_of_what_is_stored_can_be_read():
    inner, index = sealed_store()
    stored = stored_items(inner)
    assert stored.pop((META, STORE_KEY)) == b"in the clear"
    everything = b"".join(key + value for (_, key), value in stored.items())
    for plain in (b"value", b"limits", b"kv", b"\x07\x07", b"name", b"\0\0\0\x09"):
        assert plain not in everything
    with index.read() as reader:
        assert bytes(reader.get(META, STORE_KEY)) == b"in the clear"


def test_sizes_are_what_is_stored():
    inner, index = sealed_store()
    with inner.read() as below, index.read() as reader:
        for table, key in ITEMS:
            (stored_key,) = [each for each in below.keys(table) if bytes(reader._keys.plain(table, each)) == key]
            value_bytes = len(reader.get(table, key))
            expected = (len(stored_key), below.size(table, stored_key))
            assert reader.stored_sizes(table, len(key), value_bytes) == expected
            assert reader.size(table, key) == value_bytes


def test_values_cannot_be_moved():
    """Neither to another key nor to another table: they read as empty, which no reader takes for anything."""
    for source, target in [(a, b) for a in range(len(ITEMS)) for b in range(len(ITEMS)) if a != b]:
        inner, index = sealed_store()
        keys = index.transact(lambda writer: [writer._keys.stored(table, key) for table, key in ITEMS])

        def move(writer, keys=keys, source=source, target=target):
            value = bytes(writer.get(ITEMS[source][0], keys[source]))
            writer.put(ITEMS[target][0], keys[target], value)

        inner.transact(move)
        with index.read() as reader:
            assert bytes(reader.get(*ITEMS[target])) == b""
            assert bytes(reader.get(*ITEMS[source])) == b"value %d" % source


def test_keys_cannot_be_moved_between_tables():
    """An entry that is copied to another table, or whose key was changed, is given as a key that nobody has."""
    inner, index = sealed_store()
    moved = stored_items(inner)

    def copy_all(writer):
        for (table, key), value in moved.items():
            for other in {each for each, _ in ITEMS} - {table}:
                if key != STORE_KEY:
                    writer.put(other, key, value)

    inner.transact(copy_all)

    def clean(writer):
        for table in {table for table, _ in ITEMS}:
            strangers = [key for key in writer.keys(table) if isinstance(key, UnreadableKey)]
            assert [key for key, value in writer.scan(table) if isinstance(key, UnreadableKey)] == strangers
            assert all(bytes(writer.get(table, key)) == b"" for key in strangers)
            assert len(strangers) == sum(each != table for each, _ in ITEMS)
            assert all(writer.delete(table, key) for key in strangers)

    index.transact(clean)
    assert stored_items(inner) == moved


def test_times_of_the_queue_cannot_be_changed():
    inner, index = sealed_store()
    with inner.read() as reader:
        (key,) = reader.keys(QUEUE)
    later = key[:5] + b"\x11" + key[6:]
    inner.transact(lambda writer: writer.put(QUEUE, later, writer.get(QUEUE, key)))
    with index.read() as reader:
        assert [type(each) for each in reader.keys(QUEUE)] == [bytes, UnreadableKey]


# Keys of users


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.delenv(KEY_FILE_VARIABLE, raising=False)


def test_where_a_key_comes_from(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text(f"\n{KEY.hex().upper()} \n")
    file.chmod(0o600)
    assert find_key(None) is None
    assert find_key(KEY) == find_key(KEY.hex()) == KEY
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(file))
    assert find_key(None) == read_key_file(file) == KEY
    assert find_key("") is None
    assert find_key(b"\1" * 32) == b"\1" * 32
    monkeypatch.setenv(KEY_VARIABLE, "11" * 32)
    with pytest.raises(StoreKeyError, match="both set"):
        find_key(None)
    monkeypatch.delenv(KEY_FILE_VARIABLE)
    assert find_key(None) == b"\x11" * 32


@pytest.mark.parametrize("wrong", ["secret", "secret" * 11, "s3" * 32, "é" * 64, b"secret", b"secret" * 6, "0" * 63])
def test_what_is_no_key_is_refused_without_showing_it(wrong, tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    file.chmod(0o600)
    for use in (lambda: find_key(wrong), lambda: read_key_file(file)):
        with pytest.raises(StoreKeyError, match="64 hexadecimal digits") as caught:
            use()
        text = str(caught.value)
        assert not re.search("secret|s3|é|0000", text.replace(str(file), ""))
    with pytest.raises(InputTypeError):
        find_key(5)


def test_files_that_cannot_be_read(tmp_path, caplog):
    with pytest.raises(StoreKeyError, match="No such file"):
        read_key_file(tmp_path / "missing")
    with pytest.raises(StoreKeyError, match="directory"):
        read_key_file(tmp_path)
    with pytest.raises(StoreKeyError):
        read_key_file("nul\0")
    file = tmp_path / "open"
    file.write_text(KEY.hex())
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING, "promptdb"):
        assert read_key_file(file) == KEY
    assert "chmod 600" in caplog.text
    assert KEY.hex() not in caplog.text
