"""Losses in chunks: equal to full-logit cross entropy, in value and in every gradient, and as frugal as promised."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from longlora.errors import UserError
from longlora.model import lm_head as losses
from longlora.model.lm_head import causal_lm_loss, final_hidden_states, token_losses

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "phi, whose head has a bias": ("phi", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"final_logit_softcapping": 2.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "mixtral, whose router has a loss": ("mixtral", {"num_local_experts": 3, "output_router_logits": True}),
}


def make_model(family: str, **overrides: Any) -> Any:
    """A random float64 decoder of two layers in training mode."""
    architecture, peculiarities = FAMILIES[family]
    config = AutoConfig.for_model(architecture, **(SIZES | peculiarities | overrides))
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    config._experts_implementation = "eager"  # the one that computes in float64
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()


def add_lora(model: Any, target_modules: list[str], modules_to_save: list[str] | None, tied: bool = False) -> Any:
    torch.manual_seed(1)
    lora = LoraConfig(
        r=3,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        ensure_weight_tying=tied,
        init_lora_weights=False,
    )
    return get_peft_model(model, lora).double()


def make_inputs(rows: int = 2, tokens: int = 23) -> dict[str, Tensor]:
    """Tokens with labels of which a start, an end and a scattered third are not scored."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    labels = input_ids.masked_fill(torch.rand(rows, tokens, generator=generator) < 1 / 3, -100)
    labels[0, :4] = -100
    labels[-1, -3:] = -100
    return {"input_ids": input_ids, "labels": labels}


def full_logit_loss(model: nn.Module, inputs: dict[str, Tensor], num_items: int | None = None) -> Tensor:
    """The oracle: all logits, a log-sum-exp and a gather, token by token in float64."""
    labels = inputs["labels"]
    # with a cache transformers would not look at `position_ids` for the borders of packed documents
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            if labels[row, position] != -100:
                logits = outputs.logits[row, position - 1].double()
                total = total + logits.exp().sum().log() - logits[labels[row, position]]
                count += 1
    loss = total / (num_items or count)
    if getattr(outputs, "aux_loss", None) is not None:  # that of each row by itself, by its share of the scored tokens
        if len(labels) > 1:
            rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(len(labels))]
            return torch.stack([full_logit_loss(model, row, num_items or count) for row in rows]).sum()
        share = count / (num_items or count)
        loss = loss + share * model.config.router_aux_loss_coef * outputs.aux_loss.double()
    return loss


@pytest.mark.parametrize("rows_together", [1, 2, 4])
def test_a_routers_loss_is_the_same_however_a_step_is_divided(rows_together: int) -> None:
    """Loss and gradient of a step of four rows; the coefficient is large enough for a wrong share to show."""
    model = make_model("mixtral, whose router has a loss", router_aux_loss_coef=0.5)
    inputs = make_inputs(rows=4)
    scored = int((inputs["labels"][:, 1:] != -100).sum())
    expected = full_logit_loss(model, inputs)
    expected_gradients = gradients(model, expected)
    micro_batches = [
        {name: value[first : first + rows_together] for name, value in inputs.items()}
        for first in range(0, 4, rows_together)
    ]
    loss = sum(causal_lm_loss(model, part, num_items=scored) for part in micro_batches)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rows_together", [1, 4])
def test_a_loss_of_the_logits_is_of_each_scored_token(rows_together: int) -> None:
    """Bamba's z-loss: (log of the sum of exp)² beside the cross entropy; by hand from all logits."""
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_expand": 2, "attn_layer_indices": [1]}
    config = AutoConfig.for_model("bamba", **SIZES, **mamba, z_loss_coefficient=0.5)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    inputs = make_inputs(rows=4)
    wanted = inputs["labels"][:, 1:]
    scored = wanted != -100
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].double().log_softmax(-1)
    sums = model(input_ids=inputs["input_ids"]).logits[:, :-1].double().exp().sum(-1).log()
    losses = 0.5 * sums**2 - logits.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    expected = losses[scored].mean()
    micro_batches = [
        {name: value[first : first + rows_together] for name, value in inputs.items()}
        for first in range(0, 4, rows_together)
    ]
    loss = sum(causal_lm_loss(model, part, num_items=int(scored.sum())) for part in micro_batches)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_training(model: nn.Module, inputs: dict[str, Tensor], chunk: int, num_items: int | None = None) -> None:
    expected = full_logit_loss(model, inputs, num_items)
    expected_gradients = gradients(model, expected)
    loss = causal_lm_loss(model, inputs, chunk, num_items)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(model, loss), expected_gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_all_gradients_equal_those_of_full_logits(family: str) -> None:
    model = make_model(family)
    inputs = make_inputs()
    assert_same_training(model, inputs, chunk=5)
    # transformers' own loss is computed in float32; a router's it takes of a batch, and we of a row
    inputs = {name: value[-1:] for name, value in inputs.items()}
    own = model(**inputs).loss
    torch.testing.assert_close(causal_lm_loss(model, inputs).double(), own.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 29, 10_000])
def test_any_chunk_and_any_divisor(chunk: int) -> None:
    model = make_model("llama")
    assert_same_training(model, make_inputs(), chunk, num_items=1000)
    loss = causal_lm_loss(model, make_inputs(), chunk, num_items=torch.tensor(1000))
    torch.testing.assert_close(loss, full_logit_loss(model, make_inputs(), 1000), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "target_modules", "modules_to_save", "tied"),
    [
        ("llama", ["q_proj"], ["embed_tokens", "norm", "lm_head"], False),
        ("llama tied", ["q_proj"], ["embed_tokens", "norm"], True),
        ("llama", ["q_proj", "lm_head"], ["norm"], False),
        ("gemma2", ["q_proj", "lm_head"], None, False),
        ("gpt_neox", ["query_key_value"], ["embed_in", "embed_out", "lm_head"], False),
    ],
)
def test_adapters_on_the_head_count(
    family: str, target_modules: list[str], modules_to_save: list[str] | None, tied: bool
) -> None:
    model = add_lora(make_model(family), target_modules, modules_to_save, tied)
    with torch.no_grad():  # trained parts that differ from the frozen ones: reading the wrong one shows
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert_same_training(model, make_inputs(), chunk=5)


def test_positions_and_masks_reach_the_model() -> None:
    """Two documents packed in a row, and a row padded on the left: -100 at each start keeps their borders unscored."""
    model = make_model("llama")
    inputs = make_inputs(rows=1)
    inputs["position_ids"] = torch.cat([torch.arange(9), torch.arange(14)])[None]
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, [0, 9]] = -100
    assert_same_training(model, inputs, chunk=4)
    documents = [{name: value[:, span] for name, value in inputs.items()} for span in (slice(9), slice(9, 23))]
    apart = sum(full_logit_loss(model, document, num_items=1) for document in documents)
    torch.testing.assert_close(causal_lm_loss(model, inputs, num_items=1), apart, rtol=0, atol=1e-11)

    padded = make_inputs()
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][0, :4] = 0
    assert_same_training(model, padded, chunk=4)


def test_token_losses_leave_nothing_at_ignored_labels() -> None:
    model = make_model("granite")
    inputs = make_inputs()
    hidden, last_logits = final_hidden_states(model, input_ids=inputs["input_ids"])
    logits = model(input_ids=inputs["input_ids"]).logits
    assert hidden.shape == (2, 23, 32)
    assert last_logits.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(last_logits, logits[:, -1:])
    expected = -logits.log_softmax(-1).gather(-1, inputs["labels"].clamp(min=0)[..., None])[..., 0]
    expected = expected * (inputs["labels"] != -100)
    for grad in (torch.enable_grad(), torch.no_grad()):
        with grad:
            nll = token_losses(model, hidden, inputs["labels"], chunk=5)
            torch.testing.assert_close(nll, expected, rtol=0, atol=1e-12)
    assert token_losses(model.float(), hidden.float(), inputs["labels"]).dtype == torch.float32
    assert token_losses(model.bfloat16(), hidden.bfloat16(), inputs["labels"]).dtype == torch.float32


def test_a_batch_with_nothing_to_score_trains_nothing() -> None:
    model = make_model("llama")
    inputs = make_inputs()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = causal_lm_loss(model, inputs)
    assert loss.item() == 0
    # gradients that exist, so that DDP's and FSDP's other processes are not kept waiting
    assert all((gradient == 0).all() for gradient in gradients(model, loss).values())


class LargestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor of width V that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


@contextmanager
def kept_for_the_backward_pass() -> Iterator[list[int]]:
    """Rows of each tensor of width V that autograd keeps; the LM head's transposed weight is not one of those."""
    rows: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (VOCABULARY,) and tensor.shape != (SIZES["hidden_size"], VOCABULARY):
            rows.append(tensor.numel() // VOCABULARY)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield rows


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_logits_never_exist_as_a_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    inputs = make_inputs(rows=3, tokens=64)
    chunk = 40  # more than the 32 rows of the transposed LM head, which is V wide too
    scored = int((inputs["labels"][:, 1:] != -100).sum())
    assert scored > 2 * chunk

    with LargestLogits() as ours:
        causal_lm_loss(model, inputs, chunk).backward()
    assert ours.rows == chunk
    with LargestLogits() as plain:
        model(**inputs).loss.backward()
    assert plain.rows == 3 * 64  # so the instrument works

    with kept_for_the_backward_pass() as rows:
        causal_lm_loss(model, inputs, chunk)
    assert sum(rows) <= inputs["input_ids"].shape[0]  # at most the last token's logits that the model itself makes
    monkeypatch.setattr(losses, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    with kept_for_the_backward_pass() as rows:
        causal_lm_loss(model, inputs, chunk)
    assert sum(rows) >= scored


def test_only_scored_tokens_go_through_the_head() -> None:
    model = make_model("llama")
    inputs = make_inputs()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        causal_lm_loss(model, inputs, chunk=10)
    scored = int((inputs["labels"][:, 1:] != -100).sum())
    *chunks, proof, last_tokens = seen
    assert sum(chunks) == scored
    assert max(chunks) == 10
    assert proof == last_tokens == 2


class LouderLlama(LlamaForCausalLM):
    """A model with a post-processing of its own."""

    def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        outputs = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        outputs.logits = outputs.logits * 1.1
        return outputs


class WholeLlama(LlamaForCausalLM):
    """A model that always makes all of its logits."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_head_that_is_not_understood_is_refused(dtype: torch.dtype) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    input_ids = make_inputs()["input_ids"]
    plain, louder = LlamaForCausalLM(config).to(dtype), LouderLlama(config).to(dtype)
    final_hidden_states(plain, input_ids=input_ids)
    for _ in range(2):
        with pytest.raises(UserError, match=r"LouderLlama cannot be scored.*another architecture"):
            final_hidden_states(louder, input_ids=input_ids)


def test_the_proof_is_made_once_and_not_by_a_head_that_drops_out() -> None:
    model, input_ids = make_model("llama"), make_inputs()["input_ids"]
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: calls.append(args[0].shape[:-1].numel()))
    for _ in range(2):
        final_hidden_states(model, input_ids=input_ids)
    assert calls == [2, 2, 2]
    lora = LoraConfig(r=3, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(make_model("llama"), lora).double()
    final_hidden_states(model, input_ids=input_ids)


def test_models_that_cannot_be_served_are_refused() -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    with pytest.raises(UserError, match=r"WholeLlama.*logits_to_keep"):
        final_hidden_states(WholeLlama(config), input_ids=make_inputs()["input_ids"])
    twice = LlamaForCausalLM(config)
    twice.register_forward_hook(lambda module, _args, _output: module.model(make_inputs()["input_ids"]) and None)
    with pytest.raises(UserError, match="2 times"):
        final_hidden_states(twice, input_ids=make_inputs()["input_ids"])
    assert not twice.model._forward_hooks  # nothing stays behind


def test_what_trains_in_float32_inside_a_bfloat16_model() -> None:
    """Embedding, norm and LoRA in float32, the rest in bfloat16: the forward of a Trainer runs under autocast."""
    model = add_lora(make_model("llama"), ["q_proj"], ["embed_tokens", "norm", "lm_head"])
    expected = full_logit_loss(model, make_inputs())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    forward = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(forward)  # what Accelerate does
    loss = causal_lm_loss(model, make_inputs(), chunk=5)
    plain = model(**make_inputs()).loss
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=0.05)
    ours, theirs = gradients(model, loss), gradients(model, plain)
    for name in ours:
        difference = (ours[name] - theirs[name]).norm() / theirs[name].norm()
        assert difference < 0.02, f"{name}: {difference}"
    # and outside the Trainer
    del model.forward
    with losses.mixed_precision(model):
        torch.testing.assert_close(causal_lm_loss(model, make_inputs()), plain, rtol=0, atol=1e-5)


def test_gradients_of_a_trained_head_are_summed_in_float32() -> None:
    """In one-token chunks they are as near to the exact ones as those of all logits at once."""
    model = make_model("llama")
    head = model.lm_head
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 256, 32, generator=generator).bfloat16()
    labels = torch.randint(VOCABULARY, (1, 256), generator=generator)
    probabilities = (hidden.double() @ head.weight.T).softmax(-1)
    exact = ((probabilities - functional.one_hot(labels, VOCABULARY))[0].T @ hidden[0].double()).detach()
    head.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = functional.cross_entropy(head(hidden)[0].float(), labels[0], reduction="sum")
        chunked = token_losses(model, hidden, labels, chunk=1).sum()
    errors = [(gradients(head, loss)["weight"] - exact).norm() / exact.norm() for loss in (whole, chunked)]
    assert errors[1] < 1.2 * errors[0], errors


def test_mixed_precision_is_for_mixed_models_only() -> None:
    model = make_model("llama")
    assert isinstance(losses.mixed_precision(model), nullcontext)
    assert isinstance(losses.mixed_precision(model.bfloat16()), nullcontext)
    model.model.norm.float()
    with losses.mixed_precision(model):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrapper", "family"),
    [("ddp", "llama"), ("ddp", "llama tied"), ("fsdp", "llama"), ("fsdp", "llama tied"), ("fsdp, head apart", "llama")],
)
@pytest.mark.filterwarnings("ignore")
def test_distributed_wrappers_keep_working(process_group: None, wrapper: str, family: str) -> None:
    """One process of DDP, and of FSDP2 grouped as Accelerate groups it: the final norm and the head are one unit."""
    model, inputs = make_model(family), make_inputs()
    expected = gradients(model, full_logit_loss(model, inputs))
    wrapped: Any = model
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        ends = [model.model.embed_tokens] if "tied" in family else []
        if wrapper == "fsdp":
            fully_shard([model.model.norm, *ends, model.lm_head], reshard_after_forward=False)
        else:
            fully_shard(model.lm_head)
        fully_shard(model)
    for _ in range(2):
        wrapped.zero_grad()
        causal_lm_loss(wrapped, inputs, chunk=5).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad if wrapper == "ddp" else parameter.grad.full_tensor()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
