"""AdamW whose moments live in the host's memory, and which steps there.

Half of what a trained weight takes besides itself is AdamW's two moments (8 bytes a weight in float32). Here they stay
on the host, where PyTorch's fused CPU kernel takes the step; a tensor at a time, weight and gradient come over and the
weight goes back, 12 bytes a weight for each optimiser step. For one step in many rows of a long context that is
little. torchao's CPUOffloadOptimizer keeps its state under keys of its own, steps as gradients come and so leaves out
clipping; DeepSpeed's brings its own engine; bitsandbytes' paged AdamW moves nothing until the GPU is full. This one is
`torch.optim.AdamW` in everything but the place, its checkpoints included.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

HOST = torch.device("cpu")


class OffloadedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` on any device's parameters, with its moments and its arithmetic on the CPU.

    `state_dict` is that of `torch.optim.AdamW`: a run may go on with either.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, device=HOST, memory_format=torch.preserve_format)
        weight = _on_host(parameter)
        adamw(
            [weight],
            [_on_host(parameter.grad)] if parameter.grad is not None else [],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if parameter.device != HOST:
            parameter.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a `torch.optim.AdamW` too; none of it goes by way of the device."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                stored = state_dict["state"][number]
                self.state[parameter] = {name: value.to(HOST, copy=True) for name, value in stored.items()}


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory (PyTorch keeps such blocks for the next one), or the tensor itself on the CPU."""
    if tensor.device == HOST:
        return tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)
