"""A frozen base in 4-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314), by bitsandbytes.

The weights of a model that is loaded already are quantised in place, so that every MODEL can be the base (a GGUF file,
a merged run), and its config says nothing of it: the adapter that is trained goes on the base in full precision, as
QLoRA's do. The linear layers of the decoder are quantised; embedding, norms, LM head and what trains are not.
"""

import importlib.util
import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from longlora.errors import UserError

BLOCK = 64
"""Numbers of a row that share a scale."""


def four_bit_is_here() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantise_base(model: PreTrainedModel, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Quantise the linear layers of a plain decoder, but for its LM head, in place, and move all of it to `device`.

    Layer by layer, so that the device never holds more than one matrix in full precision. What `add_adapters` and PEFT
    make of the model is QLoRA: LoRA in float32 beside 4-bit matrices that compute in the model's own dtype.

    Args:
        model: on the CPU, in the dtype that it computes in.
        device: where it trains; bitsandbytes serves CPUs too.

    Raises:
        UserError: bitsandbytes is missing, adapters are there, or there is no linear layer to quantise, or one whose
            width bitsandbytes cannot cut into blocks.
    """
    if not four_bit_is_here():
        raise UserError("--base-bits 4 needs bitsandbytes, which is not installed: pip install 'longlora[quant]'.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses a kernel that it can do without
    from bitsandbytes.nn import Linear4bit, Params4bit

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            "--base-bits 4 quantises a base without adapters, and this one has some: merge them first "
            "(`longlora merge`), or leave it out."
        )
    head = model.get_output_embeddings()
    odd = [module.in_features for module in model.modules() if type(module) is nn.Linear and module.in_features % BLOCK]
    if odd:
        raise UserError(
            f"--base-bits 4 cannot serve {type(model).__name__}: a linear layer reads {odd[0]} numbers, which is no "
            f"multiple of {BLOCK}, the block that shares a scale (bitsandbytes gets such layers wrong on CPUs)."
        )
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    if not names:
        raise UserError(f"--base-bits 4 finds no linear layer in {type(model).__name__} to quantise: leave it out.")
    for name in names:
        full = cast(nn.Linear, model.get_submodule(name))
        with torch.device("meta"):
            small = Linear4bit(
                full.in_features, full.out_features, full.bias is not None, model.dtype, quant_type="nf4"
            )
        small.weight = Params4bit(full.weight.data, quant_type="nf4", module=small)
        small.bias = full.bias
        # bitsandbytes packs the weights anew for such a processor when it evaluates, and then computes no gradients
        small.support_avx512bf16_for_cpu = False
        model.set_submodule(name, small.requires_grad_(False).to(device).train(full.training))
    cast(Any, model).is_loaded_in_4bit = True  # by this PEFT knows that its LoRA layers stand beside 4-bit ones
    cast(nn.Module, model).to(device)
    return model
