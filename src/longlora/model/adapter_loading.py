"""An adapter onto its base, as stock PEFT puts it there, where each tensor must find its place."""

import logging
from pickle import UnpicklingError

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from longlora.errors import UserError
from longlora.model.precision import keep_trainable_in_float32
from longlora.model.reading import quiet, reading
from longlora.model.source import OLD_WEIGHTS, TRAINED_PARTS, ModelSource, first_line

logger = logging.getLogger(__name__)


def with_adapter(base: PreTrainedModel, source: ModelSource, trainable: bool) -> PeftModel:
    """`base` with the adapter on, as `PeftModel.from_pretrained` does, where each tensor must find its place."""
    with reading(f"adapter '{source.name}'"):
        config = PeftConfig.from_pretrained(source.location)
    config.inference_mode = not trainable
    config.base_model_name_or_path = base.name_or_path
    _put_in_trained_parts(base, source, trainable)
    misfit = f"adapter '{source.name}' does not fit its base '{source.base}'"
    try:
        with quiet():
            model = get_peft_model(base, config)
            if trainable:
                keep_trainable_in_float32(model)
            result = model.load_adapter(
                source.location, "default", is_trainable=trainable, torch_device=str(base.device)
            )
    except UnpicklingError as error:
        raise UserError(
            f"adapter '{source.name}' has more than tensors in its {OLD_WEIGHTS}, and a pickle can run code when read: "
            "save it again with PEFT's save_pretrained."
        ) from error
    except (KeyError, RuntimeError, ValueError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        lines = str(error).splitlines()
        detail = next((line.strip() for line in lines if "size mismatch" in line), first_line(error))
        raise UserError(f"{misfit}: {detail.rstrip('.')}.") from error
    if result.missing_keys or result.unexpected_keys:
        lost = f"{len(result.unexpected_keys)} of its tensors have no place there and {len(result.missing_keys)} lack"
        raise UserError(f"{misfit}: {lost}, such as {[*result.unexpected_keys, *result.missing_keys][0]}.")
    return model


def _put_in_trained_parts(base: PreTrainedModel, source: ModelSource, trainable: bool) -> None:
    """The norms and embeddings of the original LongLoRA's adapters, which lie beside them; PEFT passes them over."""
    file = source.file(TRAINED_PARTS)
    if not file.is_file():
        return
    if trainable:
        raise UserError(
            f"adapter '{source.name}' keeps its norms and embeddings in {TRAINED_PARTS}, where PEFT would lose them: "
            f"merge it first (`longlora merge {source.name} --output FOLDER`) and train the folder."
        )
    with reading(f"'{file}'"):
        trained = torch.load(file, map_location="cpu", weights_only=True)
    own = base.state_dict()
    for name, tensor in trained.items():
        place = own.get(name.removeprefix("base_model.model."))
        # a padding token that the original added for its training has a row of its own, which no text reaches
        more = 0 if place is None else len(tensor) - len(place)
        if place is None or place.shape[1:] != tensor.shape[1:] or more < 0 or (more and place.ndim == 1):
            raise UserError(
                f"'{file}' does not fit the base '{source.base}': {name} is {tuple(tensor.shape)} there and "
                f"{'nowhere' if place is None else tuple(place.shape)} in the base."
            )
        place.copy_(tensor[: len(place)])
    logger.info("%s: %d trained norms and embeddings of %s put in", source.name, len(trained), TRAINED_PARTS)
