"""`longlora plan`: operations against the paper and PyTorch's own counter, shapes, what fits, recipes, mistakes."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import ARCHITECTURES
from tiny_runs import make_run, save_base
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from longlora import cli
from longlora.errors import UserError
from longlora.model.adapters import add_adapters, trainable_summary
from longlora.planner.anatomy import Anatomy
from longlora.planner.command import plan
from longlora.planner.duration import duration
from longlora.planner.fitting import STEP_TOKENS, Fit
from longlora.planner.flops import attention_pairs, causal_flops, forward_flops, training_flops
from longlora.planner.reading import read_anatomy
from longlora.planner.recipe import recipe_text
from longlora.planner.shapes import SHAPES, find_config
from longlora.settings import AttentionSettings, LoadSettings, PatternOptions, PlanSettings, TrainableSettings

TABLE_7 = {
    # context: attention, with S2-Attn, projection, FFN, others, total, with S2-Attn (LongLoRA, table 7, Llama-2 7B)
    8192: (35.2, 8.8, 35.2, 70.9, 2.2, 143.5, 117.1),
    16384: (140.7, 35.2, 70.4, 141.8, 4.3, 357.2, 251.7),
    32768: (562.9, 140.7, 140.7, 283.7, 8.7, 996.0, 573.8),
    65536: (2251.8, 562.9, 281.5, 567.4, 17.3, 3118.0, 1429.1),
}

PARAMETERS = {
    # as the models' cards and safetensors indices state them
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
}


@cache
def shape(name: str, train: tuple[str, ...] = ("lora", "norm", "embed")) -> Anatomy:
    return read_anatomy(find_config(name, LoadSettings()), TrainableSettings(train=train))


def settings(*arguments: str) -> PlanSettings:
    name, parsed = cli.parse(["plan", *arguments])
    assert name == "plan"
    return parsed


def run(*arguments: str) -> dict:
    """The JSON document of `longlora plan`, having gone through JSON."""
    return json.loads(json.dumps(plan(settings(*arguments, "--json"))))


# --------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("context", TABLE_7)
def test_table_7_of_the_paper_to_a_tenth_of_a_teraflop(context):
    attention, s2_attention, projection, ffn, other, total, s2_total = TABLE_7[context]
    full, s2 = (forward_flops(shape("llama2-7b"), context, group) for group in (None, context // 4))
    assert full.table7() == {
        "attention": attention,
        "projection": projection,
        "ffn": ffn,
        "other": other,
        "total": total,
    }
    assert s2.table7() == full.table7() | {"attention": s2_attention, "total": s2_total}
    # unrounded: the paper's total of 16,384 tokens, 357.2, is the sum of rounded parts; without rounding it is 357.28
    assert abs(full.total / 1e12 - total) < 0.1
    assert abs(s2.total / 1e12 - s2_total) < 0.1


SMALL = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "starcoder2": {"num_key_value_heads": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
}


def small_config(architecture: str, tiny_model):
    if architecture in SMALL:
        common = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
        common |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
        return AutoConfig.for_model(architecture, **(common | {"pad_token_id": None} | SMALL[architecture]))
    return tiny_model(architecture).config


def counted(config, tokens: int) -> int:
    """Operations of matrix products in one forward pass over `tokens` tokens, by PyTorch's counter."""
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(97, (1, tokens)), use_cache=False)
    return without_angles(counter)


def without_angles(counter: FlopCounterMode) -> int:
    """All that was counted, less the product of positions and frequencies that some rotary embeddings are."""
    by_module = counter.get_flop_counts()
    angles = sum(sum(found.values()) for name, found in by_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SMALL])
def test_operations_are_those_that_pytorch_counts(tiny_model, name):
    config, tokens = small_config(name, tiny_model), 23
    anatomy = read_anatomy(config, TrainableSettings())
    flops = forward_flops(anatomy, tokens)
    gates = tokens * sum(layer.up - layer.middle for layer in anatomy.layers)
    products = flops.attention + flops.projection + flops.ffn - gates + 2 * tokens * anatomy.head_weights
    assert counted(config, tokens) == products
    assert flops.other >= 2 * tokens * anatomy.head_weights


def seen(context: int, group: int, heads: int, shifted_from: int) -> int:
    """Pairs of S2-Attn by its definition: same block and not later, or a document of one group at most."""
    if context <= group:
        return heads * context * (context + 1) // 2
    pairs = 0
    for head in range(heads):
        by = group - group // 2 if head >= shifted_from else 0
        block = [(token + by) // group for token in range(context)]
        pairs += sum(block[i] == block[j] for i in range(context) for j in range(i + 1))
    return pairs


@pytest.mark.parametrize(("context", "group"), [(23, 8), (40, 7), (16, 16), (31, 2)])
def test_pairs_are_those_of_the_definition(tiny_model, context, group):
    anatomy = read_anatomy(tiny_model("llama").config, TrainableSettings())  # 4 heads on 2, 2 layers
    attention = AttentionSettings(group_size=group)
    assert attention_pairs(anatomy, context, attention, "shift", group) == 2 * seen(context, group, 4, 2)
    whole = context * (context + 1) // 2
    assert attention_pairs(anatomy, context, attention, "full", group) == 2 * 4 * whole
    kept = replace(attention, full_attention_layers=(-1,))
    assert attention_pairs(anatomy, context, kept, "shift", group) == seen(context, group, 4, 2) + 4 * whole
    flops = causal_flops(anatomy, context, attention, "shift", group)
    assert flops.attention == 2 * (16 + 16) * 2 * seen(context, group, 4, 2)


def test_layers_with_a_window_keep_it(tiny_model):
    config = tiny_model("qwen2").config
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 5
    anatomy = read_anatomy(config, TrainableSettings())
    assert [layer.window for layer in anatomy.layers] == [5, None]
    context, group = 23, 6
    local = 4 * sum(min(token + 1, 5) for token in range(context))
    attention = AttentionSettings(group_size=group)
    assert attention_pairs(anatomy, context, attention, "shift", group) == local + seen(context, group, 4, 2)
    full, s2 = (forward_flops(anatomy, context, tokens).attention for tokens in (None, group))
    assert full == 2 * (16 + 16) * 4 * context * (5 + context)
    assert s2 == 2 * (16 + 16) * 4 * context * (5 + group)


def test_more_is_computed_with_sinks_and_scattered_pieces():
    anatomy = shape("smollm2-135m")
    plain = AttentionSettings()
    more = AttentionSettings(options=PatternOptions(sink_tokens=16, scatter_pieces=1))
    assert attention_pairs(anatomy, 4096, more, "shift", 1024) > attention_pairs(anatomy, 4096, plain, "shift", 1024)
    assert attention_pairs(anatomy, 4096, more, "full", 1024) == attention_pairs(anatomy, 4096, plain, "full", 1024)


def test_operations_of_training_are_those_that_pytorch_counts(tiny_model):
    """Every weight trains, layers and head run twice: forward, forward again, and twice that backward."""
    config, tokens = tiny_model("llama").config, 24
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    ids = torch.randint(97, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    anatomy = read_anatomy(config, TrainableSettings(train=("full",)))
    forward = forward_flops(anatomy, tokens)
    head = 2 * tokens * anatomy.head_weights
    layers = forward.attention + forward.projection + 2 * tokens * sum(x.feedforward_weights for x in anatomy.layers)
    assert without_angles(counter) == 3 * (layers + head)
    predicted = training_flops(anatomy, forward, tokens, gradient_checkpointing=True)
    elementwise = forward.total - layers - head
    expected = 3 * (layers + head) + layers + head + 0.5 * forward.attention  # fused attention computes scores anew
    assert expected < predicted <= expected + 4 * elementwise


# ------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_that_the_models_have(name):
    assert shape(name).parameters == PARAMETERS[name]


def test_counts_are_those_of_the_model_itself(tiny_model, architecture):
    model = tiny_model(architecture)
    parts = ("lora", "norm", "embed")
    anatomy = read_anatomy(model.config, TrainableSettings(train=parts, rank=3))
    assert anatomy.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.weights for layer in anatomy.layers) < anatomy.parameters
    trained = add_adapters(model, rank=3, train=("norm", "embed"))
    assert anatomy.trainees.groups == trainable_summary(trained)["groups"]
    frozen = [parameter.numel() for parameter in trained.parameters() if not parameter.requires_grad]
    assert anatomy.trainees.frozen == sum(frozen)


def test_every_shape_names_a_model_on_the_hub_and_can_be_built():
    for name, (hub, _, _) in SHAPES.items():
        assert hub.count("/") == 1
        config = find_config(name, LoadSettings())
        assert config.max_position_embeddings >= 4096


def test_a_config_is_enough(tmp_path, tiny_model):
    tiny_model("llama").config.save_pretrained(tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        document = run(str(model), "--context", "256")
        assert document["architecture"] == "LlamaForCausalLM"
    assert run("demo", "--context", "4096")["parameters"] == 5_868_800


# ------------------------------------------------------------------------------------------------------ what fits


def test_the_longest_context_fits_and_the_next_does_not():
    fit = Fit(shape("llama2-7b"), settings("llama2-7b", "--context", "32768"))
    longest = [fit.longest(switches) for switches in fit.ladder()]
    for switches, context in zip(fit.ladder(), longest, strict=True):
        assert context % STEP_TOKENS == 0
        assert fit.fits(context, switches)
        assert not fit.fits(context + STEP_TOKENS, switches)
    assert all(shorter <= longer for shorter, longer in pairwise(longest))
    assert longest[-1] > 2 * longest[2] > 0


def test_nothing_fits_where_the_weights_do_not():
    fit = Fit(shape("llama2-70b"), settings("llama2-70b", "--context", "8192"))
    assert fit.longest(("chunked_loss", "gradient_checkpointing")) == 0
    assert "base_bits" in fit.cheapest(set(fit.possible()))
    eight = Fit(shape("llama2-70b"), settings("llama2-70b", "--context", "16384", "--gpus", "8", "--shard"))
    assert eight.fits(16384, eight.given())


def test_every_combination_once_and_the_cheapest_that_fits():
    fit = Fit(shape("llama2-7b"), settings("llama2-7b", "--context", "65536", "--gpus", "2"))
    found = list(fit.all_combinations())
    # an MLP tiled or not; with checkpointing that, or layers in tiles, each offloaded or not
    assert len(found) == len(set(found)) == 2**4 * (2 + 2 * 3)
    assert found[0] == ()
    able = {"chunked_loss", "gradient_checkpointing"}
    assert fit.cheapest(able) == ("chunked_loss", "gradient_checkpointing")
    short = Fit(shape("llama2-7b"), settings("llama2-7b", "--context", "4096"))
    assert short.cheapest(able) == ("chunked_loss",)
    long = Fit(shape("llama2-7b"), settings("llama2-7b", "--context", "1000000"))
    assert long.cheapest(able) is None


def test_time_follows_from_operations_and_rate():
    flags = ("smollm2-135m", "--context", "16384", "--steps", "40", "--batch", "8", "--gpus", "2")
    slow = settings(*flags, "--flops-per-second", "1e12", "--utilisation", "0.5")
    found = duration(shape("smollm2-135m"), slow, True)
    forward = causal_flops(shape("smollm2-135m"), 16384, slow.attention, "shift", 4096)
    row = training_flops(shape("smollm2-135m"), forward, 16384, True)
    assert found["s2"]["seconds_per_step"] == pytest.approx(8 * row / 1e12)
    assert found["s2"]["tokens_per_second"] == pytest.approx(16384 * 1e12 / row)
    assert found["full"]["seconds"] > 1.5 * found["s2"]["seconds"]
    mixed = duration(shape("smollm2-135m"), settings(*flags, "--full-attention-steps", "10"), True)
    only = duration(shape("smollm2-135m"), settings(*flags), True)
    expected = 0.75 * only["s2"]["seconds"] + 0.25 * only["full"]["seconds"]
    assert mixed["s2"]["seconds"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------- command, recipe


def test_rows_in_pieces_send_half_a_group_of_half_the_heads_and_full_layers_all():
    """Llama-2 7B: 32 heads of 128, pieces that end where groups do; three passes with gradient checkpointing."""
    flags = ("llama2-7b", "--context", "32768", "--batch", "4", "--gpus", "4", "--sequence-parallel", "4")
    time = run(*flags)["time"]
    boundary = 2 * 16 * (8192 // 2) * 128 * 2
    assert time["s2"]["sent_bytes_per_step"] == 4 * 3 * 32 * 3 * boundary
    assert time["s2"]["transfer_seconds"] == pytest.approx(4 * 3 * 32 * boundary / 50e9)
    assert 1 <= time["s2"]["imbalance"] < 1.2
    assert time["full"]["sent_bytes_per_step"] == 4 * 3 * 32 * (1 + 2 + 3) * 2 * 32 * 8192 * 128 * 2
    assert time["full"]["imbalance"] == pytest.approx((2 * 4 - 1) / 4, rel=1e-3)
    alone = run(*flags[:-2])["time"]["s2"]
    assert (alone["sent_bytes_per_step"], alone["imbalance"]) == (0, 1.0)
    assert time["s2"]["flops_per_step"] == alone["flops_per_step"]
    assert time["s2"]["seconds_per_step"] > alone["seconds_per_step"] + time["s2"]["transfer_seconds"] - 1e-9


def test_what_extend_measures_is_counted(capsys):
    """A tenth of what is trained, as forward passes over full rows with full attention."""
    asked = ("llama2-7b", "--context", "32768", "--gpus", "8")
    document = plan(settings(*asked))
    printed = capsys.readouterr().out
    counted = document["evaluation"]
    assert counted["tokens"] == 1000 * 64 * 32768 // 10
    rows = counted["tokens"] / 32768
    assert counted["flops"] == pytest.approx(rows * document["causal_flops"]["full"]["total"])
    assert counted["seconds"] == pytest.approx(counted["flops"] / (8 * 0.4 * 312e12))
    assert "stretched and after: at most 209,715,200 tokens (--evaluation-tokens), 76.3 min." in printed
    assert plan(settings(*asked, "--evaluation-tokens", "0", "--json"))["evaluation"]["seconds"] == 0
    assert plan(settings(*asked, "--stride", "256"))["evaluation"]["tokens"] is None
    assert "before, stretched and after: what --stride and --max-documents ask for." in capsys.readouterr().out


def test_the_document():
    document = run("llama2-7b", "--context", "8192", "--gpu-memory", "80GB")
    parts = ["attention", "projection", "ffn", "other", "total"]
    assert list(document["flops"]["full"]) == list(document["flops"]["s2"]) == parts
    assert document["flops"]["full"]["total"] == sum(document["flops"]["full"][part] for part in parts[:-1])
    memory = document["memory_bytes"]
    assert {"weights", "gradients", "optimizer", "activations", "logits", "total"} <= set(memory)
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert memory["total"] == max(moment["total"] for moment in document["moments"].values())
    assert document["parameters"] == PARAMETERS["llama2-7b"]
    assert document["fits"] is True
    assert document["max_context"] > 100_000
    assert len(document["contexts"]) == 64
    assert document["pairs"]["s2"] / document["pairs"]["full"] == pytest.approx(0.234, abs=0.001)


def test_the_table_says_what_the_document_says(capsys):
    plan(settings("llama2-7b", "--context", "65536", "--gpus", "8", "--shard"))
    said = capsys.readouterr().out
    for words in ("2,251.8", "1,429.1", "6,738,415,616", "sharded over the GPUs", "8 × 80 GB", "recipe"):
        assert words in said
    plan(settings("llama2-7b", "--context", "2000000"))
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "More GPUs" in said


def test_the_recipe_is_one_that_extend_reads(tmp_path):
    given = ("--context", "65536", "--group-size", "8192", "--rank", "16", "--lr", "1e-4", "--method", "linear")
    more = ("--train", "lora,norm", "--full-attention-steps", "7", "--data", "a.txt", "b c.txt", "--seed", "3")
    planned = settings("llama3-8b", *given, *more)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(planned, ["a note"]), encoding="utf-8")
    name, read = cli.parse(["extend", "--config", str(path), "--output", "RUN"])
    assert name == "extend"
    assert read.model == "meta-llama/Meta-Llama-3-8B"
    assert (read.positions, read.training, read.corpus) == (planned.positions, planned.training, planned.corpus)
    assert (read.attention, read.trainable) == (planned.attention, planned.trainable)


def test_what_is_recommended_fits_and_is_read_by_extend(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    document = plan(settings("llama2-7b", "--context", "32768", "--no-gradient-checkpointing"))
    assert document["fits"] is False
    assert document["recommended"]["recipe"]["gradient_checkpointing"] is True
    recipe = capsys.readouterr().out.partition("recipe\n\n")[2]
    assert yaml.safe_load(recipe) == document["recommended"]["recipe"]
    path.write_text(recipe, encoding="utf-8")
    _, read = cli.parse(["extend", "--config", str(path), "--data", "stdlib", "--output", "RUN"])
    assert read.training.gradient_checkpointing
    assert read.attention.group_size == 8192
    again = plan(cli.parse(["plan", "--config", str(path), "--json"])[1])
    assert again["fits"] is True


def test_a_recipe_of_extend_can_be_planned(tmp_path):
    recipe = {"model": "smollm2-135m", "data": ["a", "b"], "context": 16384, "rank": 4, "max_tokens": 1000, "steps": 3}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    document = plan(cli.parse(["plan", "--config", str(path), "--json"])[1])
    assert document["context"] == 16384
    assert document["recommended"]["recipe"]["data"] == ["a", "b"]


# ----------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("llama2-8b", "--context", "8192"), "Did you mean 'llama3-8b'"),
        (("no/such", "--context", "8192"), "no/such"),
        (("llama2-7b", "--context", "8192", "--group-size", "9000"), "at most the context, 8,192"),
        (("llama2-7b", "--context", "8192", "--gpu-memory", "much"), "80GB or 24GiB"),
        (("llama2-7b", "--context", "8192", "--gpu-memory", "80"), "80GB or 24GiB"),
        (("llama2-7b", "--context", "8192", "--gpu-memory", "-1GB"), "80GB or 24GiB"),
        (("llama2-7b", "--context", "8192", "--gpu-memory", "0GB"), "80GB or 24GiB"),
        (("llama2-7b", "--context", "8192", "--gpus", "0"), "at least 1"),
        (("llama2-7b", "--context", "8192", "--device", "h20"), "Did you mean 'h200'"),
        (("llama2-7b", "--context", "8192", "--shard"), "at least 2"),
        (("llama2-7b", "--context", "8192", "--gpus", "3"), "multiple of the rows"),
        (("llama2-7b", "--context", "8192", "--gpus", "4", "--sequence-parallel", "3"), "must divide"),
        (("llama2-7b", "--context", "8192", "--utilisation", "1.5"), "a share from 0 to 1"),
        (("llama2-7b", "--context", "8192", "--flops-per-second", "-1"), "above 0"),
        (("llama2-7b", "--context", "8192", "--base-bits", "8"), "it must be 4"),
        (("llama2-7b", "--context", "8192", "--base-bits", "4", "--train", "full"), "every weight trains"),
        (
            ("llama2-7b", "--context", "8192", "--offload-activations", "--no-gradient-checkpointing"),
            "gradient checkpointing",
        ),
        (("llama2-7b", "--context", "8192", "--measure-layers", "2"), "is for --measure"),
        (("smollm2-135m", "--context", "16384", "--measure", "--measure-layers", "31"), "at most the model's, 30"),
        (
            ("smollm2-135m", "--context", "16384", "--measure", "--measure-by", "fake", "--base-bits", "4"),
            "made of real numbers",
        ),
        (
            ("smollm2-135m", "--context", "16384", "--measure", "--measure-by", "process", "--offload-optimizer"),
            "nowhere to offload to",
        ),
    ],
)
def test_mistakes_are_sentences(arguments, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
        plan(settings(*arguments, "--json"))
    assert str(error.value).endswith((".", "?"))


def test_models_that_cannot_be_served_are_refused(tmp_path, tiny_model):
    windows = tiny_model("mistral").config
    windows.sliding_window = 32
    windows.save_pretrained(tmp_path / "windows")
    with pytest.raises(UserError, match="last 32 tokens only"):
        run(str(tmp_path / "windows"), "--context", "256")
    AutoConfig.for_model("bloom", hidden_size=64, n_layer=2, n_head=4).save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match="ALiBi"):
        run(str(tmp_path / "bloom"), "--context", "256")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"not a model's config"):
        run(str(tmp_path), "--context", "256")


def test_a_run_directory_is_planned_with_its_stretched_positions(tmp_path, tiny_model, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    make_run(tmp_path / "run", base, tokenizer, rank=2)
    document = run(str(tmp_path / "run"), "--context", "512")
    assert document["window"] == 4 * 64
    assert document["recommended"]["recipe"]["model"] == str(tmp_path / "run")
