"""What users give to an artifact, as bytes: tensors, columns, a config. Imports torch for torch's."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from promptdb.artifact_records import NUMBER, TEXT, column_name, ends_name
from promptdb.blobs import TensorSpec, TensorView
from promptdb.errors import CorruptDataError, InputTypeError

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "BOOL": "bool",
}  # fmt: skip
_OF_TORCH = {f"torch.{name}": dtype for dtype, name in TORCH_NAMES.items()}
_OF_NUMPY = {name: dtype for dtype, name in TORCH_NAMES.items() if not name.startswith(("bfloat", "float8"))}

Part = tuple[TensorSpec, bytes | memoryview]


def named(what: str, value: Any) -> dict[str, Any]:
    """Return a dict of named things, or none; raises :class:`InputTypeError` for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise InputTypeError(f"{what} must be a dict whose keys are names", f"{what}={{'name': ...}}")
    if "__metadata__" in value:  # safetensors keeps it for itself
        raise InputTypeError(f"{what} cannot have the name '__metadata__'")
    return dict(value)


def as_json(config: Any) -> Any:
    """Return a config as JSON will give it back; raises :class:`InputTypeError` for what JSON has not."""
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputTypeError(f"the config cannot be kept: {error}", "numbers, texts, lists and dicts can") from error


def tensor_part(name: str, value: Any) -> Part:
    """Return a torch tensor or numpy array as bytes; raises :class:`InputTypeError` for what cannot be kept."""
    if hasattr(value, "detach"):  # torch's, which is not imported for those who have none
        dtype = _OF_TORCH.get(str(value.dtype))
        if dtype is not None and str(value.layout) == "torch.strided" and not value.is_meta:
            import torch

            found = value.detach().cpu().contiguous()
            data = memoryview(found.reshape(-1).view(torch.uint8).numpy()) if found.numel() else b""
            return TensorSpec(name, dtype, tuple(found.shape)), data
    elif hasattr(value, "__array_interface__"):
        import numpy

        array = numpy.asarray(value)
        dtype = _OF_NUMPY.get(array.dtype.name)
        if dtype is not None:
            return TensorSpec(name, dtype, array.shape), array.astype(array.dtype.newbyteorder("<")).tobytes()
    kind = getattr(value, "dtype", type(value).__name__)
    raise InputTypeError(
        f"tensor {name[2:]!r} of {kind} cannot be kept", "tensors of torch and arrays of numpy can; lists are columns"
    )


def column_parts(number: int, name: str, values: Sequence[Any]) -> tuple[str, list[Part]]:
    """Return the kind of a column, and its parts of the blob; raises :class:`InputTypeError`."""
    values = [
        value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value for value in values
    ]
    rows, kinds = (len(values),), {type(value) for value in values}
    at = column_name(number)
    try:
        if kinds <= {str}:
            texts = [value.encode() for value in values]
            ends, total = array("q"), 0
            for text in texts:
                total += len(text)
                ends.append(total)
            content = b"".join(texts)
            return TEXT, [
                (TensorSpec(at, "U8", (total,)), content),
                (TensorSpec(ends_name(number), "I64", rows), _little(ends)),
            ]
        if kinds == {bool}:
            return NUMBER, [(TensorSpec(at, "BOOL", rows), bytes(values))]
        if kinds == {int}:
            return NUMBER, [(TensorSpec(at, "I64", rows), _little(array("q", values)))]
        if kinds <= {int, float}:
            return NUMBER, [(TensorSpec(at, "F64", rows), _little(array("d", values)))]
    except (OverflowError, UnicodeEncodeError) as error:
        raise InputTypeError(f"column {name!r} cannot be kept: {error}") from error
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise InputTypeError(f"column {name!r} holds {found}", "columns are of numbers, of truth values, or of texts")


def _little(values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def integers(view: TensorView) -> list[int]:
    """Return the numbers of a column of I64; raises :class:`CorruptDataError` for another."""
    if view.dtype != "I64":
        raise CorruptDataError(f"a column of an artifact is {view.dtype}")
    values = array("q")
    values.frombytes(view.data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
