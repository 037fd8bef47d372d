"""In which precision a model computes, and what trains is kept: float32 masters, one cast for q, k and v."""

import logging
from typing import Any, cast

import psutil
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU has arithmetic of `dtype`; where not, it takes several times as long as float32 (measured with
    AVX2 alone: bfloat16 3.7 times)."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def quick_training_dtype() -> str:
    """bfloat16, or float32 where training is on a CPU that has no arithmetic of bfloat16."""
    return "bfloat16" if torch.cuda.is_available() or cpu_computes(torch.bfloat16) else "float32"


def to_quick_dtype(model: nn.Module) -> None:
    """Turn `model` to float32, in place, where it is on a CPU that cannot compute in its dtype and memory is free for
    as much again as it has, and once more."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    slow = {weight.dtype for weight in weights if weight.device.type == "cpu" and not cpu_computes(weight.dtype)}
    needed = 2 * sum(weight.numel() * weight.element_size() for weight in weights)
    if slow and not getattr(model, "is_quantized", False) and psutil.virtual_memory().available > needed:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in slow))
        logger.info("computing in float32, as this CPU has no arithmetic of %s; --dtype says otherwise", names)
        model.float()


def keep_trainable_in_float32(model: PeftModel) -> PeftModel:
    """Turns the trainable weights of `model` to float32 in place; retrained modules still fit a low-precision model.

    LoRA layers cast by themselves (PEFT), each for itself; here those of one attention module share the cast
    (`_SharedCast`). A retrained norm or embedding gets hooks: its input goes up to float32, its output down to the
    dtype of the layer that it stands for. So the hidden states keep their dtype and memory, and tied weights stay one
    tensor.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            dtype = next(wrapper.original_module.parameters()).dtype
            for module in wrapper.modules_to_save.values():
                if dtype != torch.float32:
                    module.register_forward_pre_hook(_inputs_to_float32)
                    module.register_forward_hook(_OutputTo(dtype))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _share_casts(model)
    # TRL turns to bfloat16 whatever trains in a model that says it is quantised. PEFT, which has to know that it is
    # when it makes further adapters, asks the model inside.
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, name, False):
            setattr(model, name, False)
    return model


def _inputs_to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


class _OutputTo:
    """Forward hook that casts a module's output; a class, so that the model can still be pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self.dtype)


def _share_casts(model: nn.Module) -> None:
    """Let the LoRA layers that stand directly in one module, such as q, k and v of attention, share their inputs."""
    for module in model.modules():
        layers = [child for child in module.children() if isinstance(child, LoraLayer)]
        if len(layers) > 1:
            cast_once = _SharedCast()
            for layer in layers:
                cast(Any, layer)._cast_input_dtype = cast_once
            module.register_forward_hook(cast_once.forget, always_call=True)


class _SharedCast:
    """What LoRA layers read in the dtype that they compute in, cast once where several of them read the same.

    For the gradient of its first matrix each keeps what it read: three copies of the hidden states for q, k and v, if
    each casts for itself. Under autocast the dtype is autocast's, which would cast anyway.
    """

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.made: Tensor | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        if x.dtype == dtype or torch.compiler.is_compiling():  # a compiler finds what is computed twice by itself
            return x.to(dtype)
        if self.given is not x:
            self.given, self.made = x, x.to(dtype)
        return cast(Tensor, self.made)

    def forget(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the module around the layers: nothing is held longer than it runs."""
        self.given = self.made = None
