from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from promptdb.checkpoint import describe, file_key, resolve, tokenizer_files_present
from promptdb.errors import ModelNotFoundError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    (path / "model.safetensors").write_bytes(b"0" * 1000)
    return path


def test_key_is_stable_and_depends_on_options(checkpoint: Path) -> None:
    key = file_key(checkpoint)
    assert len(key) == 32
    assert key == file_key(checkpoint) == file_key(Path(f"{checkpoint}/../model"))
    assert len({key, file_key(checkpoint, dtype="float32"), file_key(checkpoint, dtype="bfloat16")}) == 3
    assert file_key(checkpoint, a="bc") != file_key(checkpoint, ab="c")


def test_key_in_another_process(checkpoint: Path) -> None:
    code = "import sys; from pathlib import Path; from promptdb.checkpoint import file_key; "
    code += "print(file_key(Path(sys.argv[1]), dtype='x').hex(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [file_key(checkpoint, dtype="x").hex(), "False"]


def test_replaced_file_of_equal_size_and_restored_time(checkpoint: Path) -> None:
    key, path = file_key(checkpoint), checkpoint / "model.safetensors"
    before = path.stat()
    replacement = checkpoint / "replacement"
    replacement.write_bytes(b"1" * 1000)
    os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))
    replacement.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert file_key(checkpoint) != key


def test_file_written_in_place_with_restored_time(checkpoint: Path) -> None:
    key, path = file_key(checkpoint), checkpoint / "model.safetensors"
    before = path.stat()
    path.write_bytes(b"1" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_key(checkpoint) != key


def test_added_renamed_and_nested_files_count(checkpoint: Path) -> None:
    keys = {file_key(checkpoint)}
    (checkpoint / "sub").mkdir()
    (checkpoint / "sub" / "modeling.py").write_text("x = 1")
    keys.add(file_key(checkpoint))
    (checkpoint / "sub" / "modeling.py").rename(checkpoint / "sub" / "other.py")
    keys.add(file_key(checkpoint))
    assert len(keys) == 3


def test_what_loading_never_opens_does_not_count(checkpoint: Path) -> None:
    key = file_key(checkpoint)
    (checkpoint / "README.md").write_text("hello")
    (checkpoint / ".git").mkdir()
    (checkpoint / ".git" / "HEAD").write_text("ref")
    assert file_key(checkpoint) == key


def test_links_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"2" * 10)
    (checkpoint / "linked.bin").symlink_to(blob)
    (checkpoint / "loop").symlink_to(checkpoint)
    key = file_key(checkpoint)
    blob.write_bytes(b"3" * 10)
    assert file_key(checkpoint) != key
    blob.unlink()
    with pytest.raises(ModelNotFoundError, match="complete"):
        file_key(checkpoint)


def test_copy_has_another_key(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert file_key(copy) != file_key(checkpoint)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        file_key(tmp_path / "nothing")


def test_resolve_directory_and_cached_hub_id(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert resolve(checkpoint) == checkpoint
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(checkpoint, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    with pytest.raises(ModelNotFoundError, match="download"):
        resolve("someone/absent")
    import inspect

    import huggingface_hub

    # The cache directory is a default argument of some versions: pass the check only where the patch reaches it.
    if inspect.signature(huggingface_hub.snapshot_download).parameters["cache_dir"].default is None:
        assert resolve("someone/tiny") == repo / "snapshots" / ("a" * 40)


@pytest.mark.parametrize("name", ["", "./nothing", "/nothing/at/all", "a/b/c", "..", "no such model!", "x" * 300])
def test_resolve_refuses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "..":
        assert resolve(name) == Path("..")
        return
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    assert caught.value.hint


def test_resolve_refuses_a_file(checkpoint: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve(checkpoint / "config.json")


def test_describe(checkpoint: Path) -> None:
    assert describe(checkpoint) == {"model_type": "gpt2", "n_layer": 2}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 3}', "\xff", "[" * 100_000])
def test_describe_refuses(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelNotFoundError) as caught:
        describe(checkpoint)
    assert caught.value.hint
    assert isinstance(caught.value, ValueError)


def test_describe_names_what_is_missing(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="has no config"):
        describe(checkpoint)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="adapter"):
        describe(checkpoint)
    with pytest.raises(ModelNotFoundError, match="not a directory"):
        describe(checkpoint / "model.safetensors")


def test_describe_reads_no_huge_file(checkpoint: Path) -> None:
    with (checkpoint / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelNotFoundError, match="bytes"):
        describe(checkpoint)


def test_tokenizer_files_present(checkpoint: Path) -> None:
    assert not tokenizer_files_present(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    assert tokenizer_files_present(checkpoint)
