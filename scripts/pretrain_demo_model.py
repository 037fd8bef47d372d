"""Pretrain the small Llama that the package ships as `demo`, from nothing but the standard library's source.

    python scripts/pretrain_demo_model.py --output build/demo-model --compile

The defaults are those of the shipped weights. One resumable run: stopped at any point, the same command goes on from
the last checkpoint (a larger `--steps` is allowed while the learning rate is still on its plateau). The modules held
out by `longlora.corpus.standard_library` are never seen. The result is a plain Hugging Face folder in bfloat16; copy it
to `src/longlora/assets/demo_model/`.

The schedule is warm-up, plateau, linear decay to zero. Hidden matrices are trained with Muon
(Jordan et al., 2024; Liu et al., arXiv 2502.16982 for the step scale), embeddings and norms with AdamW.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longlora.corpus.standard_library import standard_library_files

END_OF_TEXT = "<|endoftext|>"


def read_documents(held_out: bool) -> list[str]:
    """The UTF-8 sources of one side of the split."""
    texts = []
    for path in standard_library_files(held_out):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue
    return texts


def train_tokenizer(texts: list[str], vocabulary: int, window: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=window,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, ended by the end-of-text token."""
    end = tokenizer.eos_token_id
    return [encoding.ids + [end] for encoding in tokenizer._tokenizer.encode_batch(texts)]


def learning_rate_share(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """The share of the peak rate at `step`: linear warm-up, plateau, linear decay to zero."""
    decay_from = steps * (1 - decay_share)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    return max(0.0, (steps - step) / (steps - decay_from))


def batches(stream: numpy.ndarray, rows: int, window: int, seed: int):
    """Endless (rows, window) batches: each epoch cuts the stream at a new offset and draws windows in a new order."""
    epoch = 0
    while True:
        draw = numpy.random.default_rng((seed, epoch))
        offset = int(draw.integers(window))
        starts = draw.permutation(numpy.arange(offset, len(stream) - window, window))
        for first in range(0, len(starts) - rows + 1, rows):
            yield numpy.stack([stream[s : s + window] for s in starts[first : first + rows]]).astype(numpy.int64)
        epoch += 1


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, documents: list[list[int]], window: int) -> float:
    """Mean negative log-likelihood per token over non-overlapping windows of the held-out documents."""
    model.eval()
    total, count = 0.0, 0
    for ids in documents:
        whole = len(ids) // window * window
        if not whole:
            continue
        rows = torch.tensor(ids[:whole]).view(-1, window)
        for chunk in rows.split(16):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=chunk, labels=chunk, use_cache=False).loss
            total += loss.item() * chunk.shape[0] * (window - 1)
            count += chunk.shape[0] * (window - 1)
    model.train()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run and of its result")
    parser.add_argument("--steps", type=int, default=1350)
    parser.add_argument("--rows", type=int, default=16, help="sequences a step")
    parser.add_argument("--window", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--feed-forward", type=int, default=704)
    parser.add_argument("--lr", type=float, default=6e-3, help="peak rate of Muon (scaled to AdamW's update size)")
    parser.add_argument("--embedding-lr", type=float, default=6e-3, help="peak rate of AdamW")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--decay-share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; about a third faster")
    parser.add_argument("--save-every", type=int, default=100)
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint_file = arguments.output / "checkpoint.pt"
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)

    train_texts, held_out_texts = read_documents(False), read_documents(True)
    tokenizer_folder = arguments.output / "tokenizer"
    if tokenizer_folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    else:
        tokenizer = train_tokenizer(train_texts, arguments.vocabulary, arguments.window)
        tokenizer.save_pretrained(tokenizer_folder)
    documents = encode(tokenizer, train_texts)
    random.shuffle(documents)
    stream = numpy.array([token for document in documents for token in document], dtype=numpy.uint16)
    held_out = [ids for ids in encode(tokenizer, held_out_texts) if len(ids) >= 8 * arguments.window]

    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.feed_forward,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=arguments.window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=arguments.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [arguments.lr, arguments.embedding_lr]

    step, seconds = 0, 0.0
    if checkpoint_file.exists():
        state = torch.load(checkpoint_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
    print(
        f"{model.num_parameters():,} parameters, {len(stream):,} training tokens, "
        f"{len(held_out)} held-out documents, from step {step}",
        flush=True,
    )

    feed = batches(stream, arguments.rows, arguments.window, arguments.seed)
    for _ in range(step):
        next(feed)
    compiled = torch.compile(model) if arguments.compile else model
    model.train()
    log = (arguments.output / "log.jsonl").open("a")
    recent: list[float] = []
    while step < arguments.steps:
        began = time.monotonic()
        share = learning_rate_share(step, arguments.steps, arguments.warmup, arguments.decay_share)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        rows = torch.from_numpy(next(feed))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append(loss.item())
        seconds += time.monotonic() - began
        if step % 25 == 0:
            record = {"step": step, "loss": sum(recent) / len(recent), "lr_share": share, "seconds": round(seconds)}
            recent.clear()
            if step % 250 == 0 or step == arguments.steps:
                record["held_out_loss"] = held_out_loss(model, held_out, arguments.window)
                record["held_out_perplexity"] = math.exp(record["held_out_loss"])
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), flush=True)
        if step % arguments.save_every == 0 or step == arguments.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "seconds": seconds,
            }
            torch.save(state, checkpoint_file.with_suffix(".new"))
            checkpoint_file.with_suffix(".new").replace(checkpoint_file)

    model.to(torch.bfloat16).save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    print(f"saved {arguments.output / 'model'} after {seconds / 60:.0f} minutes of training", flush=True)


if __name__ == "__main__":
    main()
