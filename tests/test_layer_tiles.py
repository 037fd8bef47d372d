"""Layers in tiles: the loss and every gradient of layers on whole rows, whatever the architecture and the pattern."""

import gc
import weakref

import pytest
import torch
from test_transformers_backend import ARCHITECTURES, build, padded_batch
from torch import nn

from longlora.attention.patterns import Draw
from longlora.attention.transformers_backend import draw_from, use_shifted_attention
from longlora.errors import UserError
from longlora.model.adapters import add_adapters
from longlora.model.lm_head import causal_lm_loss, unwrapped
from longlora.model.memory_saving import offloaded_activations
from longlora.model.memory_saving.layer_tiles import tile_layers
from longlora.settings import PatternOptions


def step(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Loss and gradients of one pass."""
    model.zero_grad()
    loss = causal_lm_loss(model, inputs | {"labels": inputs["input_ids"]}, chunk=7)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_tiles_change_nothing(model: nn.Module, inputs: dict, tile: int, offload: bool = False) -> None:
    whole = step(model, inputs)
    tile_layers(unwrapped(model), tile, offload)
    assert_same(whole, step(model, inputs))


def assert_same(whole: dict[str, torch.Tensor], tiled: dict[str, torch.Tensor]) -> None:
    assert whole.keys() == tiled.keys()
    for name, expected in whole.items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(tiled[name], expected, rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """Some norms compute in float32 whatever the model's dtype, and would hide differences behind their rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_change_neither_loss_nor_gradients(architecture):
    """Three rows, two of them padded, 25 tokens in tiles of 7 and groups of 6; every weight trains."""
    model = use_shifted_attention(build(architecture), 6)
    assert_tiles_change_nothing(model, padded_batch(), 7)


PATTERNS = {
    "shift, groups end with tiles": {"group_size": 8},
    "shift, odd": {"group_size": 5},
    "one tile": {"group_size": 8, "tile": 50},
    "tokens one by one": {"group_size": 8, "tile": 1},
    "layers": {"group_size": 8, "pattern": "shift-layers"},
    "full": {"group_size": 8, "pattern": "full"},
    "dilated": {"group_size": 4, "pattern": "dilated"},
    "strided": {"group_size": 6, "pattern": "strided"},
    "scatter": {"group_size": 6, "pattern": "scatter"},
    "scatter, weighted": {"group_size": 6, "pattern": "scatter", "options": PatternOptions(scatter_weighted=True)},
    "offsets drawn": {"group_size": 6, "options": PatternOptions(vary_offset=True)},
    "a full layer drawn": {"group_size": 6, "full_layers_share": 0.5},
    "sinks": {"group_size": 6, "options": PatternOptions(sink_tokens=2)},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_on_packed_rows(name):
    """Two rows of documents whose positions start again; what is drawn for a pass is drawn once."""
    settings = dict(PATTERNS[name])
    tile = settings.pop("tile", 8)
    torch.manual_seed(0)
    model = add_adapters(build("Llama"), rank=3, dropout=0.0).double().train()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter)
    positions = torch.cat([torch.arange(11), torch.arange(18)]).expand(2, -1)
    ids = torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(1))
    use_shifted_attention(model, **settings)
    steps = []
    for tiled in (False, True):
        if tiled:
            tile_layers(unwrapped(model), tile)
        draw_from(model, Draw(seed=3, step=5))
        steps.append(step(model, {"input_ids": ids, "position_ids": positions}))
    assert_same(*steps)


def test_what_a_tile_keeps_is_gone_with_it(monkeypatch):
    """Not when Python collects garbage: on a device there would be no room until then."""
    model = use_shifted_attention(build("Llama"), 8)
    tile_layers(model, 8, offload=True)
    gone: list[int] = []
    alive: list[int] = []

    def from_host(tensor, _):
        tensor = tensor.clone()
        alive.append(len(gone))
        weakref.finalize(tensor.untyped_storage(), gone.append, 1)
        return tensor

    monkeypatch.setattr(offloaded_activations, "from_host", from_host)
    gc.collect()
    gc.disable()
    try:
        step(model, {"input_ids": torch.randint(3, 97, (1, 30))})
    finally:
        gc.enable()
    assert alive == list(range(2 * (3 + 4)))  # of two layers, three tiles for their keys and all four


def test_dropout_is_the_same_when_a_tile_is_computed_anew():
    model = add_adapters(build("Llama"), rank=3, dropout=0.4, train=()).double().train()
    use_shifted_attention(model, 8)
    tile_layers(unwrapped(model), 8)
    seen: list[torch.Tensor] = []
    projection = unwrapped(model).model.layers[0].self_attn.v_proj.lora_A["default"]
    projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    step(model, {"input_ids": torch.randint(3, 97, (1, 30))})
    forward, keys, backward = seen[:4], seen[4:7], seen[:6:-1]
    assert len(backward) == 4
    assert (torch.cat(forward, 1) == 0).double().mean() > 0.3
    for first, *again in zip(forward, [*keys, forward[3]], backward, strict=True):
        for other in again:
            assert torch.equal(first, other)


def test_experts_and_layers_that_cannot_be_served_are_refused():
    model = use_shifted_attention(build("Mixtral", output_router_logits=True), 8)
    with pytest.raises(UserError, match="router's loss"):
        tile_layers(model, 8)
    model = build("Llama")  # which computes its ordinary attention
    tile_layers(model, 8)
    with pytest.raises(UserError, match="no attention that knows of tiles"):
        step(model, {"input_ids": torch.randint(3, 97, (1, 30))})
