"""Functions that are computed once: a result is given again only for the same code, names, library and arguments."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import math
import pathlib
import random
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import shared_model, shared_tokenizer

from promptdb import Engine, PromptDB
from promptdb.call_identity import call_key
from promptdb.demo_models import random_model
from promptdb.errors import IdentityError, InputTypeError
from promptdb.format import ARTIFACTS
from promptdb.hook_points import HookVariableNames as N
from promptdb.hooks import Hook
from promptdb.interventions import Intervention
from promptdb.reuse import reused

FACTOR = 2


def scaled(x):
    return x * FACTOR


class Kind(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass
class Settings:
    width: int = 3
    names: tuple = ()


class Pair(NamedTuple):
    a: int
    b: float


def called(log):
    """Return how often a function has written a line."""
    return len(pathlib.Path(log).read_text().splitlines()) if pathlib.Path(log).exists() else 0


def key(function, *arguments):
    return call_key("name", "1", function, {str(at): value for at, value in enumerate(arguments)})


def plain(*_):
    return {}


@pytest.fixture
def log(tmp_path):
    return str(tmp_path / "calls")


def test_a_result_is_computed_once(store_path, log):
    def compute(n, offset=0.0):
        with open(log, "a") as stream:  # noqa: PTH123
            stream.write("called\n")
        return {"columns": {"square": [i * i + offset for i in range(n)]}, "tensors": {"n": torch.tensor(n)}}

    with PromptDB(store_path) as db:
        once = reused(db, "squares")(compute)
        first = once(3)
        assert first.columns["square"] == [0, 1, 4]
        assert once(3, 0.0).name == once(n=3).name == first.name
        assert once(3).tensors["n"] == 3
        assert called(log) == 1
        assert once(3, 0.5).columns["square"] == [0.5, 1.5, 4.5]
        assert once(4).name != first.name
        assert called(log) == 3
        assert first.config == {"function": compute.__qualname__, "arguments": {"n": 3, "offset": 0.0}}
        assert reused(db, "squares", version="2")(compute)(3).name != first.name
        assert reused(db, "others")(compute)(3).name.startswith("others/")
        assert (called(log), len(db.artifacts.list())) == (5, 5)
        assert db.verify() == []
    with PromptDB(store_path, readonly=True) as db:
        once = reused(db, "squares")(compute)
        assert once(4).columns["square"] == [0, 1, 4, 9]
        assert called(log) == 5
        assert once(5).columns["square"] == [0, 1, 4, 9, 16]  # computed, and not kept
        assert once(5).name not in {each.name for each in db.artifacts.list()}
        assert called(log) == 7


def test_damage_is_computed_again(db, log):
    @reused(db, "x")
    def compute():
        with open(log, "a") as stream:  # noqa: PTH123
            stream.write("called\n")
        return {"columns": {"x": [1, 2, 3]}}

    name = compute().name

    def flip(writer):
        value = bytearray(writer.get(ARTIFACTS, b"b" + name.encode()))
        value[-1] ^= 1
        writer.put(ARTIFACTS, b"b" + name.encode(), value)

    db._index.transact(flip)
    assert compute().columns["x"] == [1, 2, 3]
    assert compute().columns["x"] == [1, 2, 3]
    assert called(log) == 2


def test_another_key_of_the_same_name_is_not_taken_for_it(db):
    @reused(db, "x")
    def compute(n):
        return {"columns": {"n": [n]}}

    name = compute(1).name
    db.artifacts.save(name, columns={"n": [99]}, replace=True)  # by hand: it has no key
    assert compute(1).columns["n"] == [1]


def test_what_changes_while_it_is_computed_is_not_kept(db):
    @reused(db, "x")
    def compute(x):
        x += 1
        return {"tensors": {"x": x.clone()}}

    x = torch.zeros(2)
    assert compute(x).tensors["x"].tolist() == [1, 1]
    assert db.artifacts.list() == []
    assert compute(torch.zeros(2)).tensors["x"].tolist() == [1, 1]


@pytest.mark.parametrize("result", [None, 3, {}, {"tensor": 1}, {"columns": {"x": [object()]}}])
def test_a_result_is_a_dict_of_what_is_kept(db, result):
    compute = reused(db, "x")(lambda: eval("result", {"result": result}))
    with pytest.raises((InputTypeError, IdentityError)):
        compute()
    assert db.artifacts.list() == []


DISTINCT = [
    None, True, False, 0, 1, -1, 2**70, 1.0, -0.0, 0.0, math.nan, 1j, "", "1", b"", b"1", (), [], {}, set(), (1,), [1],
    [[1], 2], [1, [2]], [1, 2], {"a": 1}, {"a": 1, "b": 2}, {"b": 2, "a": 1}, {1: "a"}, {1, 2}, frozenset({1, 2}),
    slice(1, 2), range(1, 2), Kind.A, Kind.B, Kind, Settings(), Settings(4), Settings(names=(1,)), Pair(1, 2.0),
    (1, 2.0), torch.float32, torch.device("cpu"), torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).half(),
    torch.zeros(2, dtype=torch.int32), torch.ones(2), np.zeros(2), np.zeros(2, dtype="f4"), np.float64(0), np.int64(0),
    np.zeros((2, 1)), math.sin, math.cos, math, np, scaled, plain, lambda: 1, lambda: 2, functools.partial(scaled, 1),
    functools.partial(scaled, 2), [1].append, "x".join, torch.nn.functional.gelu, torch.no_grad(),
]  # fmt: skip


def test_different_arguments_have_different_keys():
    keys = [key(plain, value) for value in DISTINCT]
    assert len(set(keys)) == len(DISTINCT)
    assert keys == [key(plain, value) for value in DISTINCT]
    assert key(plain, {1, 2, "a"}) == key(plain, {"a", 2, 1})
    assert key(plain, torch.arange(6).view(2, 3).T) == key(plain, torch.arange(6).view(2, 3).T.contiguous())
    assert key(plain, 1, 2) != key(plain, 2, 1)
    assert key(plain, [1, 2]) != key(plain, 1, 2)


def test_the_key_follows_all_that_a_function_names(monkeypatch):
    def outer(weight):
        return lambda x: scaled(x) + weight

    before = key(outer(1))
    assert key(outer(1)) == before
    assert key(outer(2)) != before
    assert key(outer(torch.ones(1))) != key(outer(torch.zeros(1)))
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)  # named by a function that it names
    assert key(outer(1)) != before
    monkeypatch.undo()
    assert key(outer(1)) == before

    class Helper:
        @staticmethod
        def method(x):
            return x + FACTOR

        rate = 0.1

    def uses_class(x):
        return Helper.method(x) * Helper.rate

    before = key(uses_class)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)
    assert key(uses_class) != before
    monkeypatch.undo()
    assert key(uses_class) == before
    Helper.rate = 0.2
    assert key(uses_class) != before

    class Probe(torch.nn.Module):
        def forward(self, x):
            return scaled(x)

    before = key(plain, Probe())
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)
    assert key(plain, Probe()) != before


def test_the_key_follows_the_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for number, (helper, own) in enumerate(
        [("x + 1", "f(x)"), ("x + 2", "f(x)"), ("x + 1", "f(x) * 1"), ("x + 1", "f(x)")]
    ):
        (tmp_path / f"helper{number}.py").write_text(f"def f(x):\n    return {helper}\n")
        (tmp_path / f"work{number}.py").write_text(f"from helper{number} import f\ndef g(x):\n    return {own}\n")
        module = importlib.import_module(f"work{number}")
        # the import line differs as the modules' names do
        (tmp_path / f"work{number}.py").write_text(f"from helper import f\ndef g(x):\n    return {own}\n")
        keys.append(key(module.g))
    assert len({*keys[:3]}) == 3
    assert keys[3] == keys[0]


def test_decorated_functions_and_libraries():
    @torch.no_grad()
    def gradless(x):
        return torch.nn.functional.gelu(np.pi * x)

    assert key(gradless) == key(gradless)

    def local(x):
        import json

        return json.dumps(x)

    assert len(key(local)) == 64


def own_module():
    module = types.ModuleType("mine")
    module.__file__ = "/home/me/mine.py"
    return module


class Opaque:
    pass


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Opaque(), "is a Opaque, which cannot be identified"),
        (random.Random(0), "pass a seed"),
        (torch.Generator(), "pass a seed"),
        (np.random.default_rng(0), "pass a seed"),
        (pathlib.Path("/tmp"), "pass what was read"),
        (own_module(), "module mine"),
        (torch.ones(2).to_sparse(), "layout"),
        (torch.ones(2, device="meta"), "layout"),
        (np.array([object()]), "ndarray"),
        (functools.lru_cache(plain), "_lru_cache_wrapper"),
        (iter([1]), "list_iterator"),
        ([{"a": (1, Opaque())}], r"0\[0\]\[1\]\[1\] is a Opaque"),
    ],
)
def test_what_cannot_be_identified_is_refused(value, reason):
    with pytest.raises(IdentityError, match=reason):
        key(plain, value)

    def closes_over():
        return value

    with pytest.raises(IdentityError, match="closes_over"):
        key(closes_over)


def test_a_store_and_what_holds_itself_are_refused(db):
    items = []
    items.append(items)
    with pytest.raises(IdentityError, match="holds itself"):
        key(plain, items)

    @reused(db, "x")
    def compute():
        return {"config": db.stat()}

    with pytest.raises(IdentityError, match=r"compute: db is a PromptDB, which cannot .*pass an Engine"):
        compute()


def test_relative_imports_of_ones_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_x").mkdir()
    (tmp_path / "package_x" / "__init__.py").write_text("")
    (tmp_path / "package_x" / "json.py").write_text("A = 1")
    (tmp_path / "package_x" / "work.py").write_text(
        "def relative():\n    from .json import A\n    return A\n"
        "def absolute():\n    import package_x.json\n    return 1\n"
    )
    module = importlib.import_module("package_x.work")
    with pytest.raises(IdentityError, match="relatively"):
        key(module.relative)
    with pytest.raises(IdentityError, match=r"module package_x\.json"):
        key(module.absolute)


def test_ones_own_module_with_a_name_of_pythons_is_ones_own(monkeypatch):
    mine = own_module()
    mine.__name__ = "this"
    monkeypatch.setitem(sys.modules, "this", mine)
    with pytest.raises(IdentityError, match="module this"):
        key(plain, mine)
    import statistics

    assert key(plain, statistics) != key(plain, math)


def test_models_engines_and_hooks(db):
    model, tokenizer = random_model("llama"), shared_tokenizer()
    with Engine(db, model, tokenizer) as engine:
        before = key(plain, engine), key(plain, model), key(plain, tokenizer)
        assert before == (key(plain, engine), key(plain, model), key(plain, tokenizer))
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        assert key(plain, engine) != before[0]
        assert key(plain, model) != before[1]
        other = key(plain, model)
        model.train()
        assert key(plain, model) != other
    hooks = [
        Hook(N.POST_MLP, lambda x, pctx: x * 2),
        Hook(N.POST_MLP, lambda x, pctx: x * 3),
        Hook(N.PRE_MLP, lambda x, pctx: x * 2),
        Hook(N.POST_MLP, lambda x, pctx: x * 2, layers=1),
        Hook(N.POST_MLP, lambda x, pctx: x * 2, positions=slice(1, None)),
    ]
    keys = [key(plain, [hook]) for hook in hooks] + [key(plain, Intervention("a", [hook])) for hook in hooks]
    assert len(set(keys)) == len(keys)


def test_an_engines_result_is_found_again_in_another_session(store_path, log):
    def mean_norm(engine, text):
        with open(log, "a") as stream:  # noqa: PTH123
            stream.write("called\n")
        return {"tensors": {"logits": engine.get(text).logits}}

    results = []
    for _ in range(2):
        with PromptDB(store_path) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
            results.append(reused(db, "norm")(mean_norm)(engine, "Hello").tensors["logits"])
    assert called(log) == 1
    assert torch.equal(*results)
    with torch.no_grad():
        expected = shared_model("llama")(torch.tensor([shared_tokenizer()("Hello")["input_ids"]])).logits[0, -1]
    assert torch.allclose(results[0], expected, atol=1e-5)
