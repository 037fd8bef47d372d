"""Memory as `longlora plan` predicts it, beside memory as it is counted and measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from several_processes import together
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from longlora.cli import main
from longlora.planner.layer_memory import Step
from longlora.planner.measure import LiveBytes, Run, Trainee, build, measure, with_layers
from longlora.planner.memory import QUANTISED, host_bytes, peak, step_memory
from longlora.planner.reading import read_anatomy
from longlora.planner.shapes import find_config
from longlora.settings import AttentionSettings, LoadSettings, TrainableSettings, TrainingSettings

PARTS = ("lora", "norm", "embed")


def shape(name: str, layers: int) -> PreTrainedConfig:
    return with_layers(find_config(name, LoadSettings()), layers)


def family(architecture: str, **sizes: object) -> PreTrainedConfig:
    """Two layers of a family at widths where activations weigh more than weights."""
    common = {"vocab_size": 4001, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 8, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(architecture, **(common | {"pad_token_id": None} | sizes))


def trainee(config: PreTrainedConfig, train: tuple[str, ...] = PARTS, accumulates: bool = True, **training) -> Trainee:
    chosen = TrainableSettings(train=train)
    return Trainee(config, chosen, TrainingSettings(**training), AttentionSettings(), accumulates)


def predicted(subject: Trainee, context: int) -> tuple[int, int]:
    """Bytes at the peak, and those that stand there before a step: weights, gradients, moments."""
    training = subject.training
    step = Step(
        context=context,
        rows=training.device_batch,
        group_size=subject.attention.tokens_per_group(context),
        low_precision=training.dtype != "float32",
        loss_chunk=training.loss_chunk,
        accumulates=subject.accumulates,
        gradient_checkpointing=training.gradient_checkpointing,
        foreach=False,
    )
    moments = step_memory(read_anatomy(subject.config, subject.trainable), step)
    standing = moments["optimizer"]
    return moments[peak(moments)].total, standing.weights + standing.gradients + standing.optimizer


CASES = {
    "smollm2-135m": (trainee(shape("smollm2-135m", 3)), 8192),
    "smollm2-135m, every layer kept": (trainee(shape("smollm2-135m", 3), gradient_checkpointing=False), 4096),
    "llama2-7b": (trainee(shape("llama2-7b", 2)), 8192),
    "llama2-7b, every weight": (trainee(shape("llama2-7b", 2), ("full",)), 4096),
    "llama2-7b, LoRA, float32": (trainee(shape("llama2-7b", 2), ("lora",), dtype="float32"), 4096),
    "qwen3-8b, every layer, small chunks": (
        trainee(shape("qwen3-8b", 2), gradient_checkpointing=False, loss_chunk=256),
        8192,
    ),
    "qwen3-0.6b, one row a step": (trainee(shape("qwen3-0.6b", 2), accumulates=False), 16384),
    "qwen3-30b-a3b, experts": (trainee(shape("qwen3-30b-a3b", 1)), 8192),
    "mistral-7b, two rows": (trainee(shape("mistral-7b", 2), device_batch=2), 8192),
    "gpt_neox": (trainee(family("gpt_neox")), 16384),
    "phi3": (trainee(family("phi3", num_key_value_heads=4, original_max_position_embeddings=4096)), 16384),
    "llama, a narrow middle": (trainee(family("llama", intermediate_size=256), ("lora",)), 16384),
    "gemma": (trainee(family("gemma", num_key_value_heads=1, head_dim=128)), 16384),
    "olmo2": (trainee(family("olmo2"), gradient_checkpointing=False), 8192),
    "gemma2, scores written out": (trainee(family("gemma2", head_dim=64, sliding_window=1024)), 8192),
    "qwen2, windows": (
        trainee(
            family(
                "qwen2",
                num_key_value_heads=4,
                layer_types=["sliding_attention", "full_attention"],
                sliding_window=1024,
                use_sliding_window=True,
            )
        ),
        16384,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_within_five_per_cent_of_what_fake_tensors_count(name):
    subject, context = CASES[name]
    (found,) = measure(subject, "fake", [context], 10**15)
    assert found.bytes is not None
    total, standing = predicted(subject, context)
    assert total == pytest.approx(found.bytes, rel=0.05)
    assert total - standing == pytest.approx(found.bytes - standing, rel=0.1)


def test_growing_stops_where_it_no_longer_fits():
    subject = trainee(shape("smollm2-135m", 1), ("lora",))
    limit = predicted(subject, 4096)[0]
    found = measure(subject, "fake", [1024, 2048, 8192, 16384], limit)
    assert [each.context for each in found] == [1024, 2048, 8192]
    assert found[1].bytes <= limit < found[2].bytes


# ----------------------------------------------------------------------------------------------- the way of counting


def test_live_bytes_are_those_of_pytorchs_own_tracker(tiny_model):
    """MemTracker serves models that train in full (it hooks every parameter's gradient), so this one does."""
    ids = torch.randint(97, (2, 23))
    with MemTracker() as tracker, LiveBytes() as live:
        model = AutoModelForCausalLM.from_config(tiny_model("llama").config, dtype=torch.float32)
        model(ids, labels=ids, use_cache=False).loss.backward()
        held = live.live
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert live.peak == found["Total"]
    assert live.peak > held > sum(parameter.nbytes for parameter in model.parameters())


def test_fake_tensors_count_what_real_ones_take():
    subject = trainee(family("llama", vocab_size=997, hidden_size=64, intermediate_size=176), loss_chunk=64)
    context = 512
    with LiveBytes() as live:
        run = Run(subject, build(subject, torch.device("cpu")), torch.device("cpu"))
        run.step(context)
        real, _ = live.most(lambda: run.step(context))
    (fake,) = measure(subject, "fake", [context], 10**15)
    # the fake run scores the last token of a row too; the real one keeps masks and positions as small tensors besides
    assert fake.bytes == pytest.approx(real, rel=0.01)
    assert run.held_bytes() < real


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_predicted_within_ten_per_cent_of_the_peak_of_a_process(tmp_path):
    command = (
        "plan smollm2-135m --context 1024 --measure --measure-by process --measure-layers 2 --dtype float32 --json"
    )
    assert together(1, lambda: main(command.split()), tmp_path / "out") == [0]
    out = (tmp_path / "out").read_text()
    measured = json.loads(out[out.index("{") : out.rindex("}") + 1])["measured"]
    assert (measured["by"], measured["layers"], measured["of_layers"]) == ("process", 2, 30)
    assert [result["context"] for result in measured["results"]] == [1024]
    for result in measured["results"]:
        assert result["predicted_bytes"] == pytest.approx(result["measured_bytes"], rel=0.1)
        assert result["seconds"] > 0


# ---------------------------------------------------------------------------------------------------------- switches


@pytest.fixture(scope="module")
def llama():
    return read_anatomy(shape("llama2-7b", 32), TrainableSettings())


LONG = Step(context=65536, group_size=16384)


def needs(anatomy, step: Step):
    moments = step_memory(anatomy, step)
    return moments[peak(moments)]


def test_what_stands_there_in_closed_form(llama):
    trainable = 131_072_000 + 8_388_608 + 266_240
    memory = needs(llama, LONG)
    assert memory.weights == 2 * 6_738_415_616 + 4 * trainable  # PEFT keeps the originals of what is retrained
    assert (memory.gradients, memory.optimizer) == (4 * trainable, 8 * trainable)
    quantised = needs(llama, replace(LONG, base_bits=4))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert quantised.weights == pytest.approx(memory.weights - linear * (2 - QUANTISED), abs=2)


def test_each_switch_takes_less(llama):
    steps = [
        replace(LONG, loss_chunk=None, gradient_checkpointing=False),
        replace(LONG, gradient_checkpointing=False),
        LONG,
        replace(LONG, tiled_mlp=True),
        replace(LONG, tiled_mlp=True, offload_activations=True),
        replace(LONG, tiled_mlp=True, offload_activations=True, offload_optimizer=True),
        replace(LONG, tiled_mlp=True, offload_activations=True, offload_optimizer=True, base_bits=4),
    ]
    totals = [needs(llama, step).total for step in steps]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_offloading_moves_bytes_to_the_host(llama):
    inputs = 65536 * 4096 * 2
    moved = replace(LONG, offload_activations=True)
    assert host_bytes(llama, LONG) == 0
    assert host_bytes(llama, moved) == 32 * inputs
    assert needs(llama, LONG).total - needs(llama, moved).total == 32 * inputs  # at the peak none is there
    kept = step_memory(llama, LONG)["loss"].activations - step_memory(llama, moved)["loss"].activations
    assert kept == 31 * inputs  # what enters the LM head stays
    both = replace(moved, offload_optimizer=True)
    assert host_bytes(llama, both) - host_bytes(llama, moved) == needs(llama, moved).optimizer
    assert needs(llama, both).optimizer == 0


def test_gpus_share_what_they_are_said_to_share(llama):
    one = step_memory(llama, LONG)["layer"]
    copied = step_memory(llama, replace(LONG, gpus=8))["layer"]
    assert (copied.weights, copied.activations) == (one.weights, one.activations)
    assert copied.gradients == 2 * one.gradients  # buckets
    sharded = step_memory(llama, replace(LONG, gpus=8, shard=True))["layer"]
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, part) == pytest.approx(getattr(one, part) / 8, abs=1)
    assert sharded.workspace > one.workspace
    parallel = step_memory(llama, replace(LONG, gpus=8, sequence_parallel=8))["layer"]
    halo = 2 * 2 * 4096 * (16384 - 1)  # keys and values in two bytes
    assert parallel.activations == pytest.approx(one.activations / 8 + halo, abs=1)
    assert replace(LONG, context=65537, sequence_parallel=8).tokens == 8193


def test_memory_grows_with_context_and_rows(llama):
    totals = [needs(llama, replace(LONG, context=context)).total for context in (256, 1024, 8192, 65536, 131072)]
    assert totals == sorted(totals)
    two = replace(LONG, context=8192, rows=2)
    assert needs(llama, two).activations == needs(llama, replace(LONG, context=16384)).activations


def test_reading_a_config_leaves_it_as_it_was():
    config = family("llama")
    read_anatomy(config, TrainableSettings())
    # else a model made of it next would train with S2-Attn, untold
    assert config._attn_implementation != "s2_attn"
