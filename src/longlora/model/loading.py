"""MODEL -> (model, tokenizer): one way to load whatever `longlora.model.source` finds.

Weights come from safetensors or GGUF, never from a pickle. An adapter is loaded as stock PEFT loads it, on its base
under the *extended* config.json that lies beside the adapter, but what PEFT only warns about is an error here.
"""

import copy
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longlora.errors import UserError, check_choice
from longlora.model.adapter_loading import with_adapter
from longlora.model.adapters import merge_adapters
from longlora.model.gguf_positions import read_positions
from longlora.model.positions import follow_each_length
from longlora.model.positions import window as window
from longlora.model.precision import keep_trainable_in_float32
from longlora.model.reading import quiet, reading
from longlora.model.source import ModelSource, base_of, first_line, locate, resolve
from longlora.settings import DTYPES

__all__ = ["ModelSource", "load", "load_config", "load_tokenizer", "locate", "resolve", "window"]

SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
"""Config fields in which an adapter's config.json must agree with its base."""

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    adapters: bool = True,
    merge: bool = False,
    trainable: bool = False,
    attn_implementation: str | None = None,
    blank: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that `model` names (see `longlora.model.source`), in eval mode.

    Args:
        model: MODEL.
        dtype: of the weights; `auto` is the checkpoint's own (float32 for GGUF, whose blocks are unpacked).
        device: torch device; `None` leaves the model on the CPU, `auto` takes this process's GPU where there is one.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit of a hub model.
        adapters: apply the adapter of a run or adapter folder; without it comes the base model with the positions
            extended but untrained.
        merge: fold the adapter in, for a plain model (float32 arithmetic, rounded once to `dtype`).
        trainable: leave what trained trainable, and in float32, to go on training; otherwise all is frozen.
        attn_implementation: as transformers' `from_pretrained` takes it, `s2_attn` among them.
        blank: read no weights; every parameter is on the meta device, for one that another process hands over.

    Raises:
        UserError: MODEL cannot be found or read, is no causal language model, its adapter does not fit its base,
            its tokenizer does not fit its embedding, or it does not take the attention implementation.
    """
    check_choice("dtype", dtype, DTYPES)
    place = _device(device)
    source = locate(model, revision)
    config = _config(source, trust_remote_code)
    tokenizer = _tokenizer(source, trust_remote_code)
    _require_matching_vocabulary(source, config, tokenizer)
    tokenizer.model_max_length = max(tokenizer.model_max_length, window(config) or 0)
    if blank:
        network = _blank(source, config, dtype, trust_remote_code, adapters=adapters and not merge, trainable=trainable)
    else:
        network = _network(source, config, dtype, trust_remote_code, adapters=adapters, trainable=trainable)
    _refuse_tokens_without_a_row(network, len(tokenizer), source)
    follow_each_length(network)
    if merge and isinstance(network, PeftModel):
        network = _merged(network, source)
    if not trainable:
        network.requires_grad_(False)
    if attn_implementation is not None:
        _set_attention(network, attn_implementation)
    if not blank:
        cast(torch.nn.Module, network).to(place)
    return network.eval(), tokenizer


def _set_attention(network: PreTrainedModel | PeftModel, implementation: str) -> None:
    try:
        plain = network.get_base_model() if isinstance(network, PeftModel) else network
        cast(PreTrainedModel, plain).set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise UserError(f"attn_implementation '{implementation}' cannot be used: {first_line(error)}") from error


def load_config(model: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """The config of MODEL, for a run or adapter folder the extended one; reads no weights. Raises as `load`."""
    return _config(locate(model, revision), trust_remote_code)


def load_tokenizer(
    model: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of MODEL, for a run or adapter folder without one its base's. Raises as `load`."""
    return _tokenizer(locate(model, revision), trust_remote_code)


def _device(device: str | None) -> torch.device:
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used ({first_line(error)}): give cpu, cuda or cuda:N.") from error
    return place


def _where(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """First argument and options of the Auto classes' `from_pretrained`."""
    if source.kind == "gguf":
        path = Path(source.location)
        return str(path.parent), {"gguf_file": path.name}
    if source.kind == "hub":
        return source.location, {"revision": source.revision, "local_files_only": source.local_only}
    return source.location, {}


def _config(source: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    with reading(f"the config of '{source.name}'"):
        if source.kind == "gguf":
            path = Path(source.location)
            config = copy.deepcopy(_gguf_config(path, path.stat().st_mtime_ns))
        else:
            where, options = _where(source)
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    stated = config.architectures or [str(expected)]
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    decoder = any(name == expected or name.endswith(endings) for name in stated)
    if not remote and (expected is None or config.is_encoder_decoder or not decoder):
        raise UserError(
            f"MODEL '{source.name}' is a {', '.join(config.architectures or [config.model_type])}: "
            "it must be a decoder with a language-model head (…ForCausalLM)."
        )
    if "text_config" in config.sub_configs and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        # Qwen3.5's checkpoints hold a vision tower too, and AutoModelForCausalLM loads the text model alone
        text = config.get_text_config(decoder=True)
        if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "config_class", None) is type(text):
            text.dtype = text.dtype or config.dtype
            return text
    return config


@lru_cache(maxsize=1)
def _gguf_config(path: Path, changed_ns: int) -> PreTrainedConfig:
    """Remembered while the file stays as it is, because reading a GGUF's header takes seconds."""
    with quiet(gguf=True):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    read_positions(config, path)
    vars(config).pop("_model_name_or_path", None)  # its title, which would be saved as if it were a path
    return config


def _tokenizer(source: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if source.kind not in ("hub", "gguf"):
        own = any(any(Path(source.location).glob(pattern)) for pattern in TOKENIZER_FILES)
        if not own and source.base is not None:
            return _tokenizer(base_of(source), trust_remote_code)
        if not own:
            raise UserError(
                f"MODEL '{source.name}' has no tokenizer: put its tokenizer.json and tokenizer_config.json there."
            )
    where, options = _where(source)
    with reading(f"the tokenizer of '{source.name}'"), quiet(source.kind == "gguf"):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options)


def _require_matching_vocabulary(
    source: ModelSource, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Added tokens that no text contains may lie outside (Gemma 3's image token does); nothing else may."""
    rows = config.get_text_config().vocab_size
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    needed = 1 + max([tokenizer.vocab_size - 1, *(token for token in special if token is not None)])
    if needed > rows:
        raise UserError(
            f"the tokenizer of '{source.name}' has {needed:,} tokens but its embedding {rows:,} rows: "
            "give the tokenizer that the model was trained with."
        )


def _refuse_tokens_without_a_row(model: nn.Module, tokens: int, source: ModelSource) -> None:
    """Make such a token a sentence when it is met: most that lie outside never are."""
    embedding = cast(nn.Embedding, cast(PreTrainedModel, model).get_input_embeddings())
    rows = embedding.weight.shape[0]
    if tokens <= rows:
        return

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        largest = int(inputs[0].max()) if inputs and inputs[0].numel() else 0
        if largest >= rows:
            raise UserError(
                f"the tokenizer of '{source.name}' makes token {largest:,} but the model embeds only {rows:,}: give "
                "the tokenizer that belongs to it, or resize its embedding and train the new rows."
            )

    embedding.register_forward_pre_hook(look)


def _network(
    source: ModelSource,
    config: PreTrainedConfig,
    dtype: str,
    trust_remote_code: bool,
    adapters: bool = True,
    trainable: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model of `source` under `config`; adapters below the topmost one are merged."""
    if not source.is_adapter:
        return _weights(source, config, dtype, trust_remote_code)
    below = base_of(source)
    base_config = _config(below, trust_remote_code)
    for field in SHAPE_FIELDS:
        given, needed = getattr(base_config, field, None), getattr(config, field, None)
        if given != needed:
            raise UserError(
                f"adapter '{source.name}' does not fit its base '{below.name}': {field} is {given} there and "
                f"{needed} in the adapter's config.json."
            )
    for field in ("dtype", "use_cache"):  # in the adapter's config they are what it was trained with
        if hasattr(base_config, field):
            setattr(config, field, getattr(base_config, field))
    base = _network(below, config, dtype, trust_remote_code)
    if isinstance(base, PeftModel):
        base = _merged(base, below)
    return with_adapter(base, source, trainable) if adapters else base


def _blank(
    source: ModelSource,
    config: PreTrainedConfig,
    dtype: str,
    trust_remote_code: bool,
    *,
    adapters: bool,
    trainable: bool,
) -> PreTrainedModel | PeftModel:
    """What `_network` returns, without its weights; merged adapters leave no trace in the shapes of a model."""
    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    model.tie_weights()
    if not (source.is_adapter and adapters):
        return model
    adapter = PeftConfig.from_pretrained(source.location)
    adapter.inference_mode = not trainable
    wrapped = get_peft_model(model, adapter)
    return keep_trainable_in_float32(wrapped) if trainable else wrapped


def _merged(model: PeftModel, source: ModelSource) -> PreTrainedModel:
    """The plain model, which goes by the name of the adapter in it, so that an adapter trained on it finds it."""
    plain = merge_adapters(model)
    plain.name_or_path = plain.config.name_or_path = source.location
    return plain


def _weights(source: ModelSource, config: PreTrainedConfig, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    where, options = _where(source)
    if source.kind == "gguf":
        options["quantization_config"] = GgufConfig(dequantize=True)
    with reading(f"the weights of '{source.name}'"), quiet(source.kind == "gguf"):
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            where,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to name the weight in our own words below
            output_loading_info=True,
            **options,
        )
    if info["mismatched_keys"]:
        name, stored, wanted = sorted(info["mismatched_keys"], key=str)[0]
        raise UserError(
            f"the weights of '{source.name}' do not fit its config.json: {name} is {tuple(stored)} in the file and "
            f"{tuple(wanted)} by the config."
        )
    if info["missing_keys"]:
        raise UserError(
            f"the weights of '{source.name}' are incomplete: {len(info['missing_keys'])} tensors of its config.json "
            f"are missing, the first {sorted(info['missing_keys'])[0]}."
        )
    if source.kind == "gguf":
        model.name_or_path = model.config.name_or_path = source.location
    return model
