"""The programs of precompute's readme run with the import line changed (and local checkpoints); so do its idioms."""

import pytest
import torch
from cli_tools import write_checkpoint
from transformers import AutoTokenizer

from promptdb.errors import InputTypeError
from promptdb.hooks import (
    Hook,
    HookedGPTNeoXForCausalLM,
    HookedModel,
    HookedOPTForCausalLM,
    HookVariableNames,
    PrecomputeContext,
)


def log_post_mlp(x: torch.Tensor, pctx: PrecomputeContext) -> torch.Tensor:
    if "post-mlp" not in pctx.context:
        pctx.context["post-mlp"] = torch.zeros(pctx.config.num_hidden_layers, *x.shape, device="cpu")
    pctx.context["post-mlp"][pctx.context["layer"]] = x.detach()
    return x


@pytest.fixture(scope="module", params=["opt", "gpt_neox"])
def checkpoint(request, tmp_path_factory):
    return request.param, write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def test_the_readme_program(checkpoint):
    _, model_name = checkpoint
    hooks = [Hook(HookVariableNames.POST_MLP, log_post_mlp)]
    # The readme loads both checkpoints with the same class.
    model = HookedOPTForCausalLM.from_pretrained(model_name).to("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    inputs = tokenizer("Saturating the compute and memory hierarchy.", return_tensors="pt")

    pctx = PrecomputeContext(model.config, hooks=hooks)
    output = model(inputs.input_ids.to("cpu"), pctx=pctx)

    fft = torch.fft.rfft(pctx.context["post-mlp"], dim=2)
    mean_power_spectrum = torch.mean(fft.abs() ** 2, dim=(1, 3))
    assert mean_power_spectrum.shape == (2, len(torch.fft.rfftfreq(pctx.context["post-mlp"].shape[2])))
    states = model.unhooked(inputs.input_ids, output_hidden_states=True)
    assert torch.equal(output.logits, states.logits)
    assert torch.equal(pctx.context["post-mlp"][0], states.hidden_states[1])


def test_idioms_of_its_research_programs(checkpoint):
    arch, model_name = checkpoint
    model = (HookedOPTForCausalLM if arch == "opt" else HookedGPTNeoXForCausalLM).from_pretrained(
        model_name, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))

    def high_pass(x, pctx):
        freqs = torch.fft.fftfreq(x.shape[1])
        mask = torch.where(torch.abs(freqs) >= pctx.context["cutoff"], 1, 0).unsqueeze(0).unsqueeze(-1)
        return torch.fft.ifft(torch.fft.fft(x, dim=1) * mask, dim=1).real

    def log_loss(unreduced_loss, pctx):
        pctx.context.setdefault("loss", []).append(unreduced_loss.mean().item())
        return unreduced_loss

    names = HookVariableNames
    pctx = PrecomputeContext(model.config, [Hook(names.ATTN_RESIDUAL, high_pass), Hook(names.UNREDUCED_LOSS, log_loss)])
    for cutoff in (1, 0):
        pctx.context["cutoff"] = cutoff
        with torch.no_grad():
            loss = model(ids, labels=ids, pctx=pctx).loss
        assert pctx.context["loss"][-1] == pytest.approx(float(loss), rel=1e-5)
    with torch.no_grad():
        assert float(loss) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)
    assert pctx.context["loss"][0] != pytest.approx(pctx.context["loss"][1], rel=1e-4)

    # An optimiser sees the wrapped model's parameters, and train mode reaches it.
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(ids, labels=ids, pctx=pctx).loss
    before.backward()
    optimizer.step()
    model.eval()
    assert not model.unhooked.training
    assert float(model(ids, labels=ids, pctx=pctx).loss) < float(before)
    assert model.lm_head is model.unhooked.lm_head
    assert model.device.type == "cpu"
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.no_such
    assert HookedModel(model).unhooked is model.unhooked
    with pytest.raises(InputTypeError, match="a hook must be"):
        pctx.add_hooks([log_loss])
