"""`longlora bench step`: steps that agree before they are timed, memory counted and planned."""

import json

import pytest
import torch
import transformers
from attention_oracle import cut_of_head, sees
from transformers import AutoConfig

from longlora import cli
from longlora.bench import correctness, trainers
from longlora.bench import step as step_bench
from longlora.bench.step import Cost, bench_step, read_config
from longlora.bench.trainers import Taken, Way, make_ways, random_rows
from longlora.errors import UserError
from longlora.model.memory_saving.tiled_mlp import TiledForward
from longlora.settings import (
    AttentionSettings,
    BenchStepSettings,
    MemorySettings,
    PatternOptions,
    TrainableSettings,
)

CPU = torch.device("cpu")
HEADS, KEY_HEADS = 4, 2


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A folder that holds a config and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 128}
    sizes |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    AutoConfig.for_model("llama", **sizes).save_pretrained(folder)
    return str(folder)


def settings(shape, **changes):
    usual = {"model": shape, "context": (75,), "attention": AttentionSettings(group_size=20), "dtype": "float32"}
    return BenchStepSettings(**(usual | {"repeats": 1, "json": True} | changes))


def ways_of(wanted, tmp_path, names=("s2", "full", "plain")):
    return make_ways(read_config(wanted)[0], wanted, CPU, str(tmp_path), names)


# ------------------------------------------------------------------------------------------------ three ways, one model


def test_the_three_share_what_is_frozen_and_begin_alike(shape, tmp_path):
    models = {name: way.trainer.model for name, way in ways_of(settings(shape), tmp_path).items()}
    ours = dict(models["full"].named_parameters())
    for name in ("s2", "plain"):
        others = dict(models[name].named_parameters())
        assert others.keys() == ours.keys()
        for key, weight in others.items():
            assert weight.requires_grad == ours[key].requires_grad, key
            torch.testing.assert_close(weight, ours[key], rtol=0, atol=0)
            assert (weight.data_ptr() == ours[key].data_ptr()) != weight.requires_grad, key


def test_plain_has_nothing_of_ours_in_it(shape, tmp_path):
    plain = ways_of(settings(shape), tmp_path, ("plain",))["plain"]
    assert type(plain.trainer) is transformers.Trainer
    own = [module for module in plain.trainer.model.modules() if "longlora" in type(module).__module__]
    hooks = [
        hook
        for module in plain.trainer.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert own == hooks == []
    assert plain.trainer.model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("train", [("lora", "norm", "embed"), ("lora",), ("full",)])
def test_steps_agree_and_leave_the_weights_as_they_were(shape, tmp_path, train):
    wanted = settings(shape, trainable=TrainableSettings(train=train))
    ways = ways_of(wanted, tmp_path)
    rows = random_rows(read_config(wanted)[0], 1, 75, 0)
    first = {name: way.step(rows) for name, way in ways.items()}
    again = {name: way.step(rows) for name, way in ways.items()}
    for one in (first, again):
        assert one["full"].loss == pytest.approx(one["plain"].loss, rel=1e-6)
        assert one["full"].gradient_norm == pytest.approx(one["plain"].gradient_norm, rel=1e-5)
    for name, taken in first.items():
        assert (taken.loss, taken.gradient_norm) == (again[name].loss, again[name].gradient_norm)
    assert first["s2"].loss != pytest.approx(first["full"].loss, rel=1e-4)


def test_the_loss_of_s2_is_the_stock_models_under_a_dense_mask(shape, tmp_path):
    wanted = settings(shape)
    ways = ways_of(wanted, tmp_path)
    rows = random_rows(read_config(wanted)[0], 1, 75, 0)
    masks = [sees(*cut_of_head("shift", head, HEADS, KEY_HEADS, 0), 75, 20) for head in range(HEADS)]
    ids = rows[0]["input_ids"][None]
    plain = ways["plain"].trainer.model
    with torch.no_grad():
        logits = plain(input_ids=ids, attention_mask=torch.stack(masks)[None], use_cache=False).logits[0, :-1]
    # the Trainer divides by the tokens that have a label, the first one's among them or not as transformers has it
    total = torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum").item()
    found = ways["s2"].step(rows).loss
    assert min(abs(found - total / 75), abs(found - total / 74)) < 1e-5


def test_standing_bytes_are_weights_buffers_and_moments(shape, tmp_path):
    ways = ways_of(settings(shape), tmp_path)
    way = ways["full"]
    before = way.standing_bytes()
    way.step(random_rows(read_config(settings(shape))[0], 1, 8, 0))
    trained = [weight for weight in way.trainer.model.parameters() if weight.requires_grad]
    # two moments in float32, and a count of steps in float32 for each tensor
    assert way.standing_bytes() - before == sum(8 * weight.numel() + 4 for weight in trained)
    held = {weight.data_ptr(): weight.nbytes for weight in way.trainer.model.parameters()}
    assert before >= sum(held.values())


def test_switches_are_ours_alone(shape, tmp_path):
    wanted = settings(shape, memory=MemorySettings(tiled_mlp=True, mlp_tile=16))
    ways = ways_of(wanted, tmp_path)
    tiled = {
        name: sum(isinstance(vars(module).get("forward"), TiledForward) for module in way.trainer.model.modules())
        for name, way in ways.items()
    }
    assert tiled == {"s2": 2, "full": 2, "plain": 0}


# ------------------------------------------------------------------------------------------- wrong results get no speed


def test_a_step_is_timed_and_told(shape, capsys):
    document = bench_step(settings(shape, repeats=2, json=False))
    (result,) = document["results"]
    assert result["correct"] is True
    assert (result["context"], result["group_size"]) == (75, 20)
    assert list(result["ways"]) == ["s2", "full", "plain"]
    for cost in result["ways"].values():
        assert len(cost["rounds"]) == 2
        assert cost["tokens_per_second"] == pytest.approx(75 / cost["seconds"])
        assert cost["memory_bytes"] > cost["standing_bytes"] > 0
    checked = result["checked"]
    assert checked["tokens"] == 75
    assert checked["loss"]["full"] == pytest.approx(checked["loss"]["plain"], rel=1e-5)
    assert (document["layers"], document["of_layers"]) == (2, 2)
    said = capsys.readouterr().out
    for words in ("full attention", "Trainer + PEFT", "times as fast as", "thread"):
        assert words in said
    json.dumps(document)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_loss_that_is_not_plains_is_refused(shape, monkeypatch, capsys, factor):
    right = trainers.ContextTrainer.compute_loss
    monkeypatch.setattr(
        trainers.ContextTrainer, "compute_loss", lambda self, *given, **named: right(self, *given, **named) * factor
    )
    monkeypatch.setattr(step_bench, "_warm_up", lambda *_: pytest.fail("a wrong step was timed"))
    with pytest.raises(UserError, match=r"disagree at 75 tokens in float32: loss .* No speed is given"):
        bench_step(settings(shape, json=False))
    assert capsys.readouterr().out == ""


class HalvedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def test_a_gradient_that_is_not_plains_is_refused(shape, monkeypatch):
    right = trainers.ContextTrainer.compute_loss
    monkeypatch.setattr(
        trainers.ContextTrainer,
        "compute_loss",
        lambda self, *given, **named: HalvedGradient.apply(right(self, *given, **named)),
    )
    with pytest.raises(UserError, match=r"gradient norm .* No speed is given"):
        bench_step(settings(shape))


def test_attention_that_is_not_the_pattern_is_refused(shape, monkeypatch):
    right = correctness.shifted_attention
    monkeypatch.setattr(correctness, "shifted_attention", lambda q, k, v, _, **named: right(q, k, v, 21, **named))
    with pytest.raises(UserError, match=r"--pattern shift is computed wrongly at 75 tokens in groups of 20"):
        bench_step(settings(shape))


# ----------------------------------------------------------------------------------------------------------- the rounds


def test_ways_take_turns_and_only_those_asked_for(shape, monkeypatch):
    order = []
    right = Way.step

    def record(self, rows):
        name = "plain" if self.schedule is None else {"shift": "s2"}.get(self.schedule.attention.pattern, "full")
        order.append((name, len(rows[0]["input_ids"])))
        return right(self, rows)

    monkeypatch.setattr(Way, "step", record)
    monkeypatch.setattr(step_bench, "CHECK_TOKENS", 30)
    (result,) = bench_step(settings(shape, ways=("full", "s2"), repeats=2))["results"]
    assert sorted(order[:3]) == [("full", 30), ("plain", 30), ("s2", 30)]  # the check
    assert order[3:] == [("full", 75), ("s2", 75)] * 3  # the warm-up and two rounds
    assert list(result["ways"]) == ["full", "s2"]
    assert result["s2_over_plain"] is result["full_over_plain"] is None


def test_ratios_are_medians_over_the_rounds():
    def cost(*seconds):
        return Cost(Taken(0, 0, 0, 0), 0, 0, [Taken(each, 0, 0, 0) for each in seconds])

    costs = {"s2": cost(1.0, 2.0, 4.0), "full": cost(3.0, 4.0, 40.0)}
    assert step_bench._faster(costs, "s2", "full") == {"median": 3.0, "least": 2.0, "most": 10.0}
    assert step_bench._faster(costs, "s2", "plain") is None


def test_a_way_that_does_not_fit_is_left_out(shape, monkeypatch, capsys):
    right = Way.step

    def step(self, rows):
        if self.schedule is None and len(rows[0]["input_ids"]) == 75:
            raise torch.OutOfMemoryError("too much")
        return right(self, rows)

    monkeypatch.setattr(Way, "step", step)
    monkeypatch.setattr(step_bench, "CHECK_TOKENS", 30)
    (result,) = bench_step(settings(shape, json=False))["results"]
    assert result["ways"]["plain"] is None
    assert result["s2_over_plain"] is None
    assert result["s2_over_full"]["median"] > 0
    assert "does not fit in memory" in capsys.readouterr().out


def test_a_context_too_long_for_the_machine_is_refused_first(shape, monkeypatch):
    monkeypatch.setattr(step_bench, "free_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(step_bench, "make_ways", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match=r"--context 75 .* of 2 layers needs about 0\.\d GiB"):
        bench_step(settings(shape))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention": AttentionSettings(pattern="full")}, "--pattern is full"),
        ({"attention": AttentionSettings(full_attention_steps=3)}, "--full-attention-steps changes attention"),
        ({"attention": AttentionSettings(options=PatternOptions(sink_tokens=4))}, "--sink-tokens cannot be measured"),
        ({"trainable": TrainableSettings(lora_dropout=0.1)}, "--lora-dropout"),
        ({"ways": ("s2", "ful")}, "unknown --ways part 'ful'.*Did you mean 'full'"),
        ({"ways": ()}, "--ways is empty"),
        ({"memory": MemorySettings(memory="auto")}, "--memory auto"),
        ({"dtype": "float16"}, "unknown --dtype"),
        ({"repeats": 0}, "--repeats is 0"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        settings("demo", **changes)


def test_more_layers_than_there_are(shape):
    with pytest.raises(UserError, match=r"--layers is 3: .* has 2"):
        bench_step(settings(shape, layers=3))


def test_the_command_line(shape, capsys):
    cli.main(["bench", "step", shape, *"--context 40 --layers 1 --ways s2 --repeats 1 --json".split()])
    document = json.loads(capsys.readouterr().out)
    assert document["layers"] == 1
    assert document["results"][0]["group_size"] == 10
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "step", shape, "--layers", "9"])
    assert caught.value.code == 2


def test_real_steps_take_what_the_plan_says(tmp_path):
    folder = tmp_path / "wide"
    sizes = {"vocab_size": 1009, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    AutoConfig.for_model("llama", **sizes).save_pretrained(folder)
    cases = ((False, False, ("s2",)), (True, False, ("plain", "s2")), (True, True, ("s2",)))
    for checkpointing, tiled, ways in cases:
        wanted = BenchStepSettings(
            model=str(folder),
            context=(700,),
            ways=ways,
            repeats=1,
            gradient_checkpointing=checkpointing,
            memory=MemorySettings(tiled_mlp=tiled),
            json=True,
        )
        for way, cost in bench_step(wanted)["results"][0]["ways"].items():
            ratio = cost["predicted_bytes"] / cost["memory_bytes"]
            assert ratio == pytest.approx(1, abs=0.15 if way == "plain" else 0.1), (way, checkpointing, tiled)
