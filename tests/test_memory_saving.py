"""Switches that save memory: the same loss, gradients and run as without them, and as much saved as the plan says."""

import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils

from longlora.cli import main
from longlora.errors import UserError
from longlora.model.adapters import add_adapters
from longlora.model.lm_head import causal_lm_loss
from longlora.model.memory_saving import liger_loss, offloaded_optimizer
from longlora.model.memory_saving.four_bit_base import four_bit_is_here, quantise_base
from longlora.model.memory_saving.offloaded_activations import checkpoint_layers
from longlora.model.memory_saving.offloaded_optimizer import OffloadedAdamW
from longlora.model.memory_saving.tiled_mlp import TiledForward, tile_mlp
from longlora.model.saving import save_adapter
from longlora.planner import choosing
from longlora.planner.choosing import MemoryNeed, choose_memory
from longlora.planner.fitting import Fit
from longlora.planner.measure import LiveBytes, Run, Trainee, build, measure, with_layers
from longlora.planner.memory import peak, step_memory
from longlora.planner.reading import read_anatomy
from longlora.planner.shapes import find_config
from longlora.run_directory import RunDirectory
from longlora.settings import (
    AttentionSettings,
    LoadSettings,
    MemorySettings,
    PlanSettings,
    PositionSettings,
    TrainableSettings,
    TrainingSettings,
)

PARTS = ("norm", "embed")
WHOLE = TrainableSettings(train=("full",))
ROWS = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(3))


def step(model: nn.Module, ids: torch.Tensor = ROWS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one pass in training mode."""
    model.train().zero_grad()
    loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids}, chunk=7)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, **tolerance):
    assert first[1].keys() == second[1].keys()
    torch.testing.assert_close(first[0], second[0], **tolerance)
    for name, gradient in first[1].items():
        torch.testing.assert_close(
            second[1][name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# ------------------------------------------------------------------------------------------------------- tiled MLP


@pytest.mark.parametrize("train", [PARTS, ("full",)])
def test_tiles_change_neither_loss_nor_gradients(tiny_model, architecture, train):
    """46 tokens in tiles of 7: the last has 4, and one holds the end of a row and the start of the next."""
    torch.manual_seed(0)
    model = add_adapters(tiny_model(architecture), rank=3, train=train).double()
    whole = step(model)
    plain = model.get_base_model() if train == PARTS else model
    assert tile_mlp(plain, 7) == 7
    assert_same(whole, step(model), rtol=0, atol=1e-12)  # measured: 2e-14
    checkpoint_layers(model)
    assert_same(whole, step(model), rtol=0, atol=1e-12)


def test_a_feed_forward_part_sees_one_tile_at_a_time(tiny_model):
    model = tiny_model("llama")
    assert tile_mlp(model) == 64  # the width of the hidden states
    tile_mlp(model, 10)  # not a tile within a tile
    widths = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    with torch.no_grad():
        model(ROWS)
    assert widths == 2 * (4 * [(1, 10, 80)] + [(1, 6, 80)])


def test_gradients_of_trained_matrices_are_summed_in_float32_over_tiles(tiny_model):
    """In bfloat16 a sum over 256 tiles would lose more than one product does."""
    ids = torch.randint(97, (1, 256), generator=torch.Generator().manual_seed(4))
    model = add_adapters(tiny_model("llama", max_position_embeddings=256), train=("full",))
    exact = step(model, ids)[1]
    errors = []
    for tile in (256, 1):
        tile_mlp(model, tile)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients = step(model, ids)[1]
        name = "model.layers.1.mlp.down_proj.weight"
        errors.append(((gradients[name] - exact[name]).norm() / exact[name].norm()).item())
    assert errors[1] < 1.05 * errors[0]  # 1.00; with a cast of the weights that all tiles share 1.21


def test_tiles_cost_the_forward_pass_of_the_feed_forward_part_once_more(tiny_model):
    """Not quite: what is computed anew stops where nothing after it is needed, and one tile of twelve is skipped."""
    model = tiny_model("llama")
    checkpoint_layers(add_adapters(model, rank=3, train=("full",)))
    step(model)
    counts = []
    for tile in (46, 4):
        tile_mlp(model, tile)
        with FlopCounterMode(display=False) as counter:
            step(model)
        counts.append(counter.get_total_flops())
    once = 2 * ROWS.numel() * sum(layer.feedforward_weights for layer in read_anatomy(model.config, WHOLE).layers)
    assert 0.5 * once < counts[1] - counts[0] <= once


def test_experts_and_layers_of_other_makes_are_not_tiled(tiny_model):
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    with pytest.raises(UserError, match="experts route"):
        tile_mlp(mixtral)
    assert not read_anatomy(mixtral.config, TrainableSettings()).tiles
    sizes = {"vocab_size": 97, "hidden_size": 64, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", word_embed_proj_dim=64, **sizes))
    with pytest.raises(UserError, match="no module called mlp"):
        tile_mlp(opt)
    assert not any(isinstance(module.forward, TiledForward) for module in [*mixtral.modules(), *opt.modules()])


# ------------------------------------------------------------------------------------------------------- optimizer


def groups(model: nn.Module) -> list[dict]:
    decay, none = [], []
    for parameter in model.parameters():
        (decay if parameter.ndim > 1 else none).append(parameter)
    return [{"params": decay, "lr": 3e-2, "weight_decay": 0.1}, {"params": none, "lr": 1e-2, "weight_decay": 0.0}]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("host", ["cpu", "cpu:0"])
def test_offloaded_adamw_takes_the_steps_of_pytorchs_and_goes_on_from_its_state(monkeypatch, host):
    """Tensors say `cpu` of their device; to a host called `cpu:0` everything has to be copied."""
    monkeypatch.setattr(offloaded_optimizer, "HOST", torch.device(host))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))

    ours, theirs = model(), model()
    optimizers = [
        kind(groups(each), betas=(0.9, 0.95)) for kind, each in ((OffloadedAdamW, ours), (torch.optim.AdamW, theirs))
    ]
    for steps in (range(5), range(5, 9)):
        for found, expected in zip(
            trained(ours, optimizers[0], steps), trained(theirs, optimizers[1], steps), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # measured: 1e-7
        states = [optimizer.state_dict() for optimizer in optimizers]
        assert states[0]["state"].keys() == states[1]["state"].keys()
        for optimizer, state in zip(optimizers, reversed(states), strict=True):  # each goes on from the other's
            optimizer.load_state_dict(state)


def test_frozen_and_unused_parameters_are_left_alone():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = OffloadedAdamW([used, unused], lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(used, unused)
    assert torch.equal(unused, torch.ones(3))
    assert set(optimizer.state) == {used}


# ----------------------------------------------------------------------------------------------------- activations


@pytest.fixture
def pageable(monkeypatch):
    """`save_on_cpu` without pinned memory, which a machine without a GPU cannot have."""
    monkeypatch.setattr(modeling_utils, "save_on_cpu", lambda **_: torch.autograd.graph.save_on_cpu())


@pytest.mark.usefixtures("pageable")
def test_offloaded_activations_change_neither_loss_nor_gradients(tiny_model, architecture):
    model = add_adapters(tiny_model(architecture), rank=3, train=PARTS)
    whole = step(model)
    checkpoint_layers(model, offload=True)
    assert_same(whole, step(model), rtol=0, atol=1e-6)
    tile_mlp(model.get_base_model(), 7)
    assert_same(whole, step(model), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------- measured and predicted


def trainee(name: str, layers: int, train=("lora", "norm", "embed"), **training) -> Trainee:
    config = with_layers(find_config(name, LoadSettings()), layers)
    return Trainee(config, TrainableSettings(train=train), TrainingSettings(**training), AttentionSettings(), True)


def predicted(subject: Trainee, context: int) -> int:
    settings = PlanSettings(
        model="smollm2-135m",
        positions=PositionSettings(context=context),
        trainable=subject.trainable,
        training=subject.training,
        memory=subject.memory,
    )
    fit = Fit(read_anatomy(subject.config, subject.trainable), settings)
    moments = step_memory(fit.anatomy, replace(fit.step(context, fit.given()), foreach=False))
    return moments[peak(moments)].total


SWITCHED = {
    "tiled": ({"tiled_mlp": True}, trainee("llama2-7b", 2), 16384, 0.1),
    "tiles of 1000": ({"tiled_mlp": True, "mlp_tile": 1000}, trainee("llama2-7b", 2, ("lora",)), 8192, 0.05),
    "tiled, every weight": ({"tiled_mlp": True}, trainee("llama2-7b", 1, ("full",), dtype="float32"), 8192, 0.01),
    "activations": ({"offload_activations": True}, trainee("smollm2-135m", 6, loss_chunk=2048), 32768, 0.05),
    "optimizer": ({"offload_optimizer": True}, trainee("smollm2-135m", 2), 4096, 0.1),
    "all": (
        {"tiled_mlp": True, "offload_activations": True, "offload_optimizer": True},
        trainee("llama2-7b", 3),
        16384,
        0.2,
    ),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_a_switch_saves_what_the_plan_predicts(name):
    """Measured on fake tensors; each case takes `least` less of the whole at least."""
    memory, subject, context, least = SWITCHED[name]
    switched = replace(subject, memory=MemorySettings(**memory))
    (before,), (after,) = (measure(each, "fake", [context], 10**15) for each in (subject, switched))
    assert after.bytes < (1 - least) * before.bytes
    assert predicted(switched, context) == pytest.approx(after.bytes, rel=0.05)
    saved = predicted(subject, context) - predicted(switched, context)
    assert saved == pytest.approx(before.bytes - after.bytes, rel=0.3)  # measured: 0.28 where every weight trains


def test_the_plan_measures_switches(capsys):
    main(
        "plan smollm2-135m --context 4096 --measure --measure-by fake --measure-layers 2 --tiled-mlp "
        "--offload-activations --offload-optimizer --mlp-tile 512 --json".split()
    )
    results = json.loads(capsys.readouterr().out)["measured"]["results"]
    assert [result["context"] for result in results] == [1024, 2048, 4096]
    assert all(0.9 < result["ratio"] < 1.1 for result in results)


# ------------------------------------------------------------------------------------------------------ 4-bit base

four_bit = pytest.mark.skipif(not four_bit_is_here(), reason="bitsandbytes is not installed: the extra quant")


def dequantised(model: nn.Module) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    return {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


@four_bit
def test_a_four_bit_base_computes_with_its_rounded_weights(tiny_model):
    """Oracle: the full-precision model with the rounded weights in it."""
    model = quantise_base(tiny_model("llama", intermediate_size=128))
    rounded = tiny_model("llama", intermediate_size=128)
    weights = dequantised(model)
    assert len(weights) == 2 * 7
    for name, weight in weights.items():
        plain = rounded.get_parameter(name)
        assert 0 < (plain - weight).norm() / plain.norm() < 0.1  # NF4 rounds normal numbers to 0.092
        plain.data = weight
    torch.manual_seed(1)
    model = add_adapters(model, rank=3, train=PARTS)
    torch.manual_seed(1)
    rounded = add_adapters(rounded, rank=3, train=PARTS)
    model.eval()(ROWS)  # what is evaluated first must train still
    assert_same(step(rounded), step(model), rtol=1e-4, atol=1e-5)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}


@four_bit
def test_an_adapter_of_a_four_bit_base_goes_on_the_full_base(tiny_model, tmp_path):
    from peft import PeftModel

    model = add_adapters(
        quantise_base(tiny_model("llama", tie_word_embeddings=True, intermediate_size=128)), rank=3, train=PARTS
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(step(model)[0].item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    save_adapter(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    base = tiny_model("llama", tie_word_embeddings=True, intermediate_size=128)
    for name, weight in dequantised(model.get_base_model()).items():
        base.get_parameter(name.replace(".base_layer", "")).data = weight
    full = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(full.eval()(ROWS).logits, model.eval()(ROWS).logits, rtol=1e-4, atol=1e-4)


@four_bit
def test_a_four_bit_base_takes_what_the_plan_predicts():
    """Real tensors on the CPU, counted while they live."""
    sizes = {"vocab_size": 997, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, pad_token_id=None)
    subject = Trainee(
        config,
        TrainableSettings(train=("lora",)),
        TrainingSettings(dtype="float32", loss_chunk=64),
        AttentionSettings(),
        True,
        MemorySettings(base_bits=4),
    )
    with LiveBytes() as live:
        run = Run(subject, build(subject, torch.device("cpu")), torch.device("cpu"))
        held = live.live
        run.step(512)
        found, _ = live.most(lambda: run.step(512))
    assert predicted(subject, 512) == pytest.approx(found, rel=0.1)
    full = read_anatomy(config, subject.trainable).trainees.frozen * 4
    assert held < 0.5 * full


@four_bit
def test_a_width_that_bitsandbytes_rounds_wrongly_is_refused(tiny_model):
    with pytest.raises(UserError, match="reads 80 numbers"):
        quantise_base(tiny_model("llama"))


@pytest.mark.skipif(four_bit_is_here(), reason="bitsandbytes is installed")
def test_a_four_bit_base_without_bitsandbytes_is_refused(tiny_model):
    with pytest.raises(UserError, match=r"longlora\[quant\]"):
        quantise_base(tiny_model("llama"))


# ------------------------------------------------------------------------------------------------------------ loss


def test_what_keeps_liger_away_is_said(tiny_model, monkeypatch, caplog):
    model = tiny_model("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert liger_loss.choose_loss_kernel("auto", model) == "chunked"
    assert "no GPU here" in caplog.text
    with pytest.raises(UserError, match="--loss-kernel liger cannot act here"):
        liger_loss.choose_loss_kernel("liger", model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger_loss.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in liger_loss.why_not_liger(model)
    monkeypatch.setattr(liger_loss.importlib.util, "find_spec", lambda name: object())
    assert liger_loss.why_not_liger(model) is None
    assert liger_loss.choose_loss_kernel("auto", model) == "liger"
    assert liger_loss.choose_loss_kernel("chunked", model) == "chunked"
    tied = add_adapters(tiny_model("llama", tie_word_embeddings=True), train=PARTS).get_base_model()
    assert liger_loss.plain_head(tied).weight is tied.get_input_embeddings().modules_to_save["default"].weight
    model.config.logit_scale = 0.5
    assert "scales its logits" in liger_loss.why_not_liger(model)


LIGER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import make_tiny_model
from longlora.model.adapters import add_adapters
from longlora.model.lm_head import causal_lm_loss

device = "cuda" if torch.cuda.is_available() else "cpu"
ids = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(3)).to(device)
for train, tied in ((("norm", "embed"), True), ((), False), (("full",), False)):
    model = add_adapters(make_tiny_model("llama", tie_word_embeddings=tied), rank=3, train=train).to(device).train()
    found = []
    for kernel in ("chunked", "liger"):
        model.zero_grad()
        loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids}, chunk=7, kernel=kernel)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("liger_kernel") or not find_spec("triton"), reason="needs Liger: the extra gpu")
def test_ligers_loss_is_the_chunked_one():
    """Measured: 1e-6. Without a GPU its kernels run in Triton's interpreter, which wants to be asked at import."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", LIGER, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | interpreted, check=False)
    assert done.stdout == "same\n", done.stderr


# -------------------------------------------------------------------------------------------------- --memory auto


def need(context: int, **memory) -> MemoryNeed:
    return MemoryNeed(
        name="smollm2-135m",
        config=find_config("smollm2-135m", LoadSettings()),
        context=context,
        attention=AttentionSettings(),
        trainable=TrainableSettings(),
        training=TrainingSettings(),
        memory=MemorySettings(memory="auto", **memory),
    )


def test_auto_turns_on_no_more_than_is_needed(monkeypatch, caplog):
    monkeypatch.setattr(choosing, "not_here", dict)
    chosen = []
    with caplog.at_level(logging.INFO):
        for size in ("200GB", "8GB", "4GB", "3GB"):
            choice = choose_memory(need(32768, gpu_memory=size))
            settings = replace(
                PlanSettings(model="smollm2-135m", positions=PositionSettings(context=32768)),
                memory=replace(choice.memory, gpu_memory=size),
                training=TrainingSettings(gradient_checkpointing=choice.gradient_checkpointing),
            )
            fit = Fit(read_anatomy(need(1).config, TrainableSettings()), settings) if size else None
            assert fit.fits(32768, fit.given())
            assert choice.memory.memory == "manual"
            chosen.append(
                (
                    choice.gradient_checkpointing,
                    *(
                        getattr(choice.memory, name)
                        for name in ("tiled_mlp", "offload_activations", "offload_optimizer")
                    ),
                )
            )
    assert chosen[0] == (False, False, False, False)
    assert chosen[1][0]
    assert sum(map(sum, chosen[1:])) > 3
    assert "no switch is turned on" in caplog.text
    assert "chosen, as the cheapest that fits: loss in chunks + gradient checkpointing" in caplog.text


def test_auto_keeps_what_was_asked_for_and_says_what_is_not_to_be_had(monkeypatch, caplog):
    monkeypatch.setattr(choosing, "not_here", lambda: {"offload_activations": "there is no GPU"})
    with caplog.at_level(logging.INFO):
        choice = choose_memory(need(32768, gpu_memory="8GB", tiled_mlp=True, mlp_tile=512))
    assert (choice.memory.tiled_mlp, choice.memory.mlp_tile) == (True, 512)
    assert "activations offloaded: there is no GPU" in caplog.text
    with pytest.raises(UserError, match=r"tokens would fit: shorten --context"):
        choose_memory(need(10**7, gpu_memory="8GB"))


def test_auto_fits_into_what_is_free_here(monkeypatch, caplog):
    monkeypatch.setattr(choosing, "device_bytes", lambda: (8 * 10**9, "free on a test"))
    with caplog.at_level(logging.INFO):
        choose_memory(need(32768))
    assert "8.0 GB free on a test, 7.2 GB of it to use" in caplog.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mlp-tile 512", "is the tile of --tiled-mlp"),
        ("--tiled-mlp --mlp-tile 0", "at least 1"),
        ("--gpu-memory 8GB", "is for --memory auto"),
        ("--reserve 0.2", "is for --memory auto"),
        ("--memory auto --gpu-memory 8", "80GB or 24GiB"),
        ("--memory best", "manual"),
        ("--loss-kernel fused", "chunked"),
        ("--offload-activations --no-gradient-checkpointing", "no effect without gradient checkpointing"),
        ("--base-bits 4 --train full", "every weight trains"),
        ("--offload-optimizer", "training runs on the CPU"),
        ("--offload-activations", "training runs on the CPU"),
        ("--loss-kernel liger", "cannot act here"),
    ],
)
def test_mistakes_are_sentences(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as failed:
        main(
            [
                "extend",
                "demo",
                "--data",
                "stdlib",
                "--context",
                "1024",
                "--output",
                str(tmp_path / "run"),
                *flags.split(),
            ]
        )
    assert failed.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_model, tiny_tokenizer) -> tuple[Path, Path]:
    """A tiny model's folder and a folder of documents."""
    folder = tmp_path_factory.mktemp("data")
    tiny_model("llama", vocab_size=257, tie_word_embeddings=True).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "documents").mkdir()
    draw = random.Random(0)
    for number in range(30):
        words = [draw.choice("tree sum node left right token window".split()) for _ in range(90)]
        (folder / "documents" / f"{number:02}.txt").write_text(" ".join(words))
    return folder / "model", folder / "documents"


def extend(data, output, *flags: str) -> list[float]:
    common = "--context 128 --batch 2 --lr 1e-2 --warmup-steps 1 --dtype float32 --stride 64 --save-every 2"
    main(["extend", str(data[0]), "--data", str(data[1]), "--output", str(output), *common.split(), *flags])
    return [record["loss"] for record in RunDirectory(output).read_metrics() if "loss" in record]


@pytest.mark.usefixtures("pageable")
def test_a_run_with_every_switch_is_the_run_without_and_resumes(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choosing, "not_here", dict)
    plain = extend(data, tmp_path / "plain", "--steps", "4")
    every = ["--tiled-mlp", "--mlp-tile", "50", "--offload-activations", "--offload-optimizer"]
    assert extend(data, tmp_path / "run", "--steps", "2", *every) == pytest.approx(plain[:2], rel=1e-5)
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())["memory"]
    assert (summary["offload_activations"], summary["offload_optimizer"], summary["mlp_tile"]) == (True, True, 50)
    resumed = extend(data, tmp_path / "run", "--steps", "4", "--resume", *every)
    assert resumed == pytest.approx(plain, rel=1e-5)
    # and again from its checkpoint without any of them
    assert extend(data, tmp_path / "run", "--steps", "6", "--resume")[:4] == resumed


def test_auto_chooses_for_a_run_and_the_run_says_so(data, tmp_path, capsys):
    losses = extend(data, tmp_path / "run", "--steps", "1", "--memory", "auto", "--gpu-memory", "1GB")
    assert losses == pytest.approx(extend(data, tmp_path / "plain", "--steps", "1"), rel=1e-5)
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert summary["memory"]["gradient_checkpointing"] is False  # that much room there is
    with pytest.raises(SystemExit):
        extend(data, tmp_path / "small", "--steps", "1", "--memory", "auto", "--gpu-memory", "1MB")
    assert "--memory auto: rows of 128 tokens take" in capsys.readouterr().err
