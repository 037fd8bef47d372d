"""Tiny tokenizers in the manner of well-known families, with those families' chat templates in short."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' "
    "and not loop.last %}{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that takes the reasoning out of every answer but the last, as Qwen3's does."""


def byte_level(
    specials: list[str],
    template: str | None,
    bos: str | None,
    eos: str,
    adds_bos: bool = False,
    merges: str = "þÿ",
    use_regex: bool = True,
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer: the specials, then each byte; `merges` are pairs of characters, such as "ab cd"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(pair[0], pair[1]) for pair in merges.split()]
    entries = [*specials, *alphabet, *("".join(pair) for pair in pairs)]
    core = Tokenizer(models.BPE(vocab={entry: number for number, entry in enumerate(entries)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, specials.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, additional_special_tokens=specials, chat_template=template
    )


def sentencepiece_like(template: str | None, prepend: str = "first", merges: str = "") -> "PreTrainedTokenizerFast":
    """A tokenizer in the manner of Llama 2's: `▁` for a blank, each printable ASCII character, bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = ["▁", *map(chr, range(33, 127))]
    pairs = [(pair[0], pair[1]) for pair in merges.split()]
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    entries += ["".join(pair) for pair in pairs]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def chatml() -> "PreTrainedTokenizerFast":
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, None, "<|im_end|>")


def llama3() -> "PreTrainedTokenizerFast":
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(specials, LLAMA3, "<|begin_of_text|>", "<|eot_id|>", adds_bos=True)


def llama2() -> "PreTrainedTokenizerFast":
    return sentencepiece_like(LLAMA2)


def mistral() -> "PreTrainedTokenizerFast":
    return sentencepiece_like(MISTRAL)


def untemplated() -> "PreTrainedTokenizerFast":
    """Llama 2's base model: it puts `<s>` before a text by itself and has no chat template."""
    return sentencepiece_like(None)


def ids_by_hand(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Tokens of `text`, found without the tokenizers library: special tokens whole, other characters one by one."""
    vocabulary = tokenizer.get_vocab()
    pieces_of_sentencepiece = "▁" in vocabulary
    specials = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
    found = []
    for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text):
        if part in specials:
            found.append(vocabulary[part])
        elif pieces_of_sentencepiece:
            for character in part.replace(" ", "▁"):
                known = [character] if character in vocabulary else [f"<0x{b:02X}>" for b in character.encode()]
                found += [vocabulary[each] for each in known]
        else:
            found += [vocabulary[_letter_of_byte(byte)] for byte in part.encode()]
    return found


def _letter_of_byte(byte: int) -> str:
    """GPT-2's letter for a byte: itself where it is printable, else the next unused code point from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sum(each not in printable for each in range(byte)))
