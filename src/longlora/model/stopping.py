"""Where an answer ends, for whoever generates with the model: stock generate, vLLM and TGI read generation_config."""

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The added token that the chat template writes after what the assistant said, if it does."""
    if not tokenizer.chat_template:
        return set()
    said = {"user": "a question", "assistant": "the answer"}
    plain: list[Any] = [{"role": role, "content": words} for role, words in said.items()]
    in_parts: list[Any] = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    for turns in (plain, in_parts):
        try:
            written = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template is a program of its own; one that takes no second turn ends none
            continue
        _, there, after = written.rpartition(said["assistant"])
        if there:
            end = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
            return set(end) & set(tokenizer.added_tokens_decoder)
    return set()


def stop_at_end_of_turn(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add what ends a turn to the `eos_token_id` of `generation`: a base model's names the end of a text alone."""
    given = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    known = given if isinstance(given, list) else [] if given is None else [given]
    if more := sorted(ends_of_turn(tokenizer) - set(known)):
        generation.eos_token_id = [*known, *more]
