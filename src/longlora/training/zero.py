"""DeepSpeed ZeRO-2 and ZeRO-3 as checkpoints see them: whole tensors by name, whichever process holds which part."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from longlora import ranks

if TYPE_CHECKING:
    from longlora.training.trainer import ContextTrainer

MOMENTS = ("exp_avg", "exp_avg_sq")


def holds(parameter: nn.Parameter) -> bool:
    """Whether a ZeRO optimizer trains `parameter`."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def whole_weight(parameter: nn.Parameter) -> Tensor:
    """All of a weight, as the optimizer keeps it in float32, on the CPU; every process must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).detach().cpu()


def state_on_first(trainer: "ContextTrainer") -> dict[str, Tensor]:
    """What trains and AdamW's state of it, in the first process; every process must call."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(trainer)
    step = torch.tensor(float(trainer.state.global_step))
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(trainer):
        parts = {f"weight/{name}": whole_weight(parameter), f"step/{name}": step.clone()}
        for moment in MOMENTS:
            parts[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).detach().cpu()
        if ranks.rank() == 0:
            found |= parts
    return found


def empty_state(trainer: "ContextTrainer") -> dict[str, Tensor]:
    """Tensors on the CPU to load what `state_on_first` wrote into."""
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(trainer):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        found |= {f"{part}/{name}": torch.zeros(shape) for part in ("weight", *MOMENTS)}
        found[f"step/{name}"] = torch.tensor(0.0)
    return found


def take_over(trainer: "ContextTrainer", state: dict[str, Tensor]) -> None:
    """Give the engine's optimizer and model what `state` holds; every process must call with all of it."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    steps = {float(value) for name, value in state.items() if name.startswith("step/")}
    _link(trainer)
    for kept in cast(Any, trainer.model_wrapped).optimizer.optimizer.state.values():
        kept["step"] = torch.tensor(max(steps))
    for name, parameter in _trained(trainer):
        safe_set_full_fp32_param(parameter, state[f"weight/{name}"])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[f"{moment}/{name}"], moment)
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with torch.no_grad(), GatheredParameters(gathered, modifier_rank=0):
            if not gathered or ranks.rank() == 0:
                parameter.copy_(state[f"weight/{name}"])


def _link(trainer: "ContextTrainer") -> None:
    """Let every parameter find its moments, and make those that there are none of yet.

    ZeRO-2 links them after the step of the first group, when the others have none (DeepSpeed 0.19).
    """
    engine = cast(Any, trainer.model_wrapped).optimizer
    flats = getattr(engine, "fp32_partitioned_groups_flat", None)  # ZeRO-3's
    if flats is None:
        flats = [flat for group in engine.optimizer.param_groups for flat in group["params"]]
    for flat in flats:
        if not engine.optimizer.state.get(flat):
            moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
            engine.optimizer.state[flat] = {"step": torch.tensor(0.0), **moments}
    if hasattr(engine, "_lazy_init_hp_params_optimizer_state"):
        engine._hp_optimizer_states_linked = False
        engine._lazy_init_hp_params_optimizer_state()


def _trained(trainer: "ContextTrainer") -> list[tuple[str, nn.Parameter]]:
    parameters = cast(nn.Module, trainer.model).named_parameters()
    return [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
