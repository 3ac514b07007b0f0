"""What the tests of ``promptdb.cached`` share."""

from __future__ import annotations

import torch
from conftest import TEXT, shared_tokenizer
from transformers import DynamicCache

CLOSE = {"rtol": 0, "atol": 1e-5}


def prompt(text=TEXT):
    return torch.tensor([shared_tokenizer()(text).input_ids])


def plain(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def check_cache(got, expected, *, same_class=False):
    assert (got is None) == (expected is None)
    if got is None:
        return
    assert isinstance(got, DynamicCache)
    assert got.get_seq_length() == expected.get_seq_length()
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        kept = theirs.keys.shape[-2]  # a layer with a sliding window drops the others
        assert not same_class or (type(ours) is type(theirs) and ours.keys.shape == theirs.keys.shape)
        torch.testing.assert_close(ours.keys[:, :, -kept:], theirs.keys, **CLOSE)
        torch.testing.assert_close(ours.values[:, :, -kept:], theirs.values, **CLOSE)


def check_output(got, expected):
    assert type(got) is type(expected)
    assert list(got.keys()) == list(expected.keys())
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    assert got.logits.requires_grad == expected.logits.requires_grad
    check_cache(got.get("past_key_values"), expected.get("past_key_values"))


def outcome(model, kwargs, mode=torch.no_grad):
    """Return a call's output, or its error."""
    try:
        with mode():
            output = model(**kwargs)
    except Exception as error:  # noqa: BLE001 - whatever the model raises
        return type(error), str(error), type(error.__context__)
    tensors = [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]
    nested = [part for value in output.to_tuple() if isinstance(value, tuple) for part in value]
    return type(output), list(output.keys()), tensors + nested
