"""The code is layered: imports point one way, heavy libraries stay where they belong, few names are public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import promptdb

PACKAGE = Path(promptdb.__file__).parent
CLI = PACKAGE.parent / "cli"

# A module may import those before it, wherever the import stands. (For type checkers only, it may import any.)
ORDER = (
    "version", "errors", "events", "plots", "pictures",
    "hashing", "code_identity", "libraries", "placement", "refusals", "identity", "tokenizer_identity",
    "watch", "checkpoint",
    "keys", "tokens", "format", "buffers", "blobs", "packing",
    "hook_points", "hook_places", "hook_context", "hook_binding",
    "tables", "filesystem", "memory", "allocator", "writeback", "presence", "reserve", "maplock", "lmdb_errors",
    "pages", "environment", "index",
    "life", "userkey", "sealing", "sealed", "labels", "served", "trie", "access", "activations", "snapshot", "registry",
    "outbox", "shared_options", "shared_counts", "artifact_records", "artifact_values", "artifacts",
    "rebuild", "ledger", "pins", "eviction", "audit", "verify", "commits", "collect", "lifecycle",
    "recordings", "dataset", "gather", "rows", "norms", "recall", "opening", "db",
    "shard_rows", "shards_safetensors", "shards_parquet", "shards_zarr", "shards",
    "metrics", "migrate", "testing",
    "frames", "streams", "intake", "outgoing", "deposit", "incoming", "archive", "backup", "adoption",
    "breaker", "far", "redis_connections", "far_redis", "far_objects", "far_layers", "far_sealed", "far_open",
    "testing_shared", "signing", "parcel", "far_index", "far_calls", "pulling", "leases", "pushing", "shared",
    "shared_tags", "shared_parts", "shared_sync",
    "finding", "shared_doctor", "doctor",
    "cost", "explain",
    "ambient", "cache", "staging", "scores", "quantise", "kv", "masks", "head", "runner", "probe",
    "hook_attention", "hook_loss", "hook_wiring", "hooked_model", "hooks", "interventions", "offloading",
    "loader", "writer", "storer",
    "representation", "loading",
    "generation", "extender", "prefetch", "tree", "shares", "plan", "levels", "forecast", "passes", "batch", "scoring",
    "registration",
    "engine", "recompute", "text", "worker", "ray_jobs",
    "collector", "recorder", "call_identity", "reuse",
    "arguments", "calls",
    "demo_models", "demo_text", "demo_training", "demo",
    "lm_eval",
)  # fmt: skip

# The only module that may import a library, or the only ones.
OWNERS = {
    "accelerate": {"offloading"},
    "cryptography": {"sealing", "signing"},
    "lmdb": {"lmdb_errors", "pages", "environment", "index"},
    "matplotlib": {"pictures"},
    "msgpack": {"format"},
    "pyarrow": {"shards_parquet"},
    "safetensors": set(),
    "zarr": {"shards_zarr"},
    "zstandard": {"packing"},
    "lm_eval": {"lm_eval"},
    "ray": {"ray_jobs"},
    "redis": {"redis_connections"},
    "obstore": {"far_objects"},
    "torch": {
        "arguments", "calls",
        "identity", "watch", "ambient", "cache", "staging", "scores", "quantise", "kv", "masks", "head", "runner",
        "probe", "loader", "storer", "representation", "loading", "generation", "extender", "passes", "batch",
        "scoring", "engine", "recompute", "text", "demo_models", "demo_training", "demo",
        "hook_attention", "hook_loss", "hook_wiring", "hooked_model", "interventions", "rows", "recall", "dataset",
        "collector", "recorder", "artifact_values", "artifacts", "call_identity", "placement", "offloading",
    },
    "transformers": {
        "arguments", "calls",
        "refusals", "watch", "cache", "masks", "runner", "probe", "loading", "passes", "text", "demo_models",
        "demo_text", "demo",
        "hook_attention", "hooked_model",
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports when it runs: not those under ``if TYPE_CHECKING``."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        waiting += ast.iter_child_nodes(node)
    return found


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_module_has_its_place():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    below = set(ORDER[: ORDER.index(module)])
    used = {name.split(".")[1] for name in imports(PACKAGE / f"{module}.py") if name.startswith("promptdb.")}
    assert used <= below, f"{module} imports {sorted(used - below)}, which stand above it"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_where_they_belong(module):
    used = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")}
    for library, owners in OWNERS.items():
        assert library not in used or module in owners, f"{module} imports {library}"


def test_nothing_in_the_library_imports_the_command_line():
    for module in MODULES:
        used = imports(PACKAGE / f"{module}.py")
        assert not {name for name in used if name.startswith(("cli", "promptdb.cli", "click", "rich"))}


def test_public_names():
    names = ["Engine", "PromptDB", "Recorder", "Representation", "Text", "__version__", "cached", "run"]
    assert promptdb.__all__ == names
    for name in promptdb.__all__:
        assert getattr(promptdb, name) is not None
    assert dir(promptdb) == sorted(promptdb.__all__)
    with pytest.raises(AttributeError, match="Promptdb"):
        _ = promptdb.Promptdb


def test_importing_and_looking_up_needs_neither_torch_nor_numpy(tmp_path):
    code = f"""
import sys
from promptdb import PromptDB
with PromptDB({str(tmp_path / "store")!r}) as db:
    assert db.lookup([1, 2, 3], model="00" * 32, tokenizer="11" * 32).num_tokens == 0
    db.stat(), db.verify()
heavy = {{"torch", "transformers", "numpy", "click", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_documented_errors_are_builtins_as_well():
    from promptdb import errors

    tree = errors.__doc__
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.PromptDBError)
        assert name in tree, f"{name} is not in the tree at the top of errors.py"
        assert "hint" in str(kind("message", "hint"))
        if name != "PromptDBError":
            builtin = [base for base in kind.__mro__ if base.__module__ == "builtins" and base is not Exception]
            assert len(builtin) > 2, f"{name} is no builtin error besides"


def test_nothing_depends_on_what_users_do_not_have():
    for path in [*PACKAGE.rglob("*.py"), *CLI.glob("*.py")]:
        assert "../shared" not in path.read_text(encoding="utf-8")
