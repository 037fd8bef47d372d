"""Saving an adapter: whoever saves it, the config of the model it was trained on goes along.

An adapter says nothing of positions, and on a base with its own window it is another model, without a word. So from
the import of this module on, PEFT's `save_pretrained` also writes that config, with the stretched positions, as
`config.json` beside the adapter. Trainer's and TRL's checkpoints and `push_to_hub` all go through it. PEFT has no place
where such a thing could be registered, so the method itself is wrapped; nothing else of PEFT is touched.
"""

import copy
import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a stock PEFT adapter folder with the (stretched) config.json, and the tokenizer, beside it.

    Args:
        model: with adapters; DDP and `torch.compile` may be around it.
        folder: made where it is not there.
        tokenizer: saved too where it is given.
        state: what trains by its name in the model's state dict, where this process holds only parts of it.

    Raises:
        UserError: the model has no adapters.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(inner, PeftModel):
        raise UserError(
            f"{type(inner).__name__} has no adapter to save: add one with longlora.add_adapters, or save the whole "
            "model with its own save_pretrained."
        )
    inner.save_pretrained(str(folder), state_dict=cast(Any, state))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


_stock_save_pretrained = PeftModel.save_pretrained
_SIGNATURE = inspect.signature(_stock_save_pretrained)


@functools.wraps(_stock_save_pretrained)
def _save_pretrained(self: PeftModel, *arguments: Any, **keywords: Any) -> None:
    given = _SIGNATURE.bind(self, *arguments, **keywords)
    given.apply_defaults()
    options = given.arguments
    base = self.get_base_model()
    if isinstance(base, PreTrainedModel) and options["save_embedding_layers"] == "auto":
        options["save_embedding_layers"] = _whether_to_save_embeddings(self, base)
    _stock_save_pretrained(*given.args, **given.kwargs)
    if isinstance(base, PreTrainedModel) and options["is_main_process"]:
        for name in options["selected_adapters"] or self.peft_config:
            folder = Path(options["save_directory"], "" if name == "default" else name)
            _config_to_save(base).save_pretrained(folder)


cast(Any, PeftModel).save_pretrained = _save_pretrained


def _whether_to_save_embeddings(model: PeftModel, base: PreTrainedModel) -> bool | str:
    """What PEFT makes of "auto" – has the vocabulary changed? – from the disk alone, where PEFT would ask the hub."""
    adapter = next(iter(model.peft_config.values()))
    targets = getattr(adapter, "target_modules", None) or ()
    if isinstance(targets, str) or not set(targets).isdisjoint(EMBEDDING_LAYER_NAMES):
        return "auto"  # PEFT sees that without asking anybody
    name = adapter.base_model_name_or_path or base.name_or_path
    try:
        known = type(base.config).from_pretrained(name, local_files_only=True) if name else base.config
    except (OSError, ValueError):
        return False
    return known.get_text_config().vocab_size != base.config.get_text_config().vocab_size


def _config_to_save(base: PreTrainedModel) -> PreTrainedConfig:
    config = copy.deepcopy(base.config)
    config.architectures = config.architectures or [type(base).__name__]  # a GGUF states none
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        del config.quantization_config  # the base on disk is in full precision
    return config
