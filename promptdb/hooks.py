"""Read and change any variable of a decoder's forward pass, by name. See docs/hooks.md.

::

    model = HookedModel.from_pretrained("path-or-hub-id")           # or hooked(model)
    pctx = PrecomputeContext(model.config, [Hook(HookVariableNames.POST_MLP, lambda x, pctx: x * 2, layers=3)])
    model(ids, pctx=pctx)
"""

from promptdb.hook_context import Hook, HookHandles, PrecomputeContext
from promptdb.hook_places import supported_architectures
from promptdb.hook_points import HookVariableNames
from promptdb.hooked_model import HookedGPTNeoXForCausalLM, HookedModel, HookedOPTForCausalLM, hooked

__all__ = [
    "Hook",
    "HookHandles",
    "HookVariableNames",
    "HookedGPTNeoXForCausalLM",
    "HookedModel",
    "HookedOPTForCausalLM",
    "PrecomputeContext",
    "hooked",
    "supported_architectures",
]
