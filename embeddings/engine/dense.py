"""The dense side by parameter name: fp32 master weights and optimizer state, whatever the ZeRO stage and world size."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DenseState:
    """Reads and writes the trained state of a DeepSpeedEngine under ZeRO 1, 2 or 3.

    Every method that takes or returns whole tensors is collective: all ranks call it with the same names in the same
    order. Tensors are called `model.<parameter or buffer>` and `optimizer.<state>.<parameter>`.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        persistent = set(self.module.state_dict(keep_vars=True))
        self.buffers = {name: b for name, b in self.module.named_buffers() if name in persistent}
        self.stage = int(engine.zero_optimization_stage())

    # What there is

    def names(self) -> list[str]:
        """Parameters and persistent buffers, in the order in which checkpoints hold them."""
        return sorted([*self.parameters, *self.buffers])

    def trainable_names(self) -> list[str]:
        """Parameters that the optimizer has."""
        return sorted(name for name, parameter in self.parameters.items() if parameter.requires_grad)

    def numel(self, name: str) -> int:
        """Elements of a whole parameter or buffer."""
        return int(torch.Size(self.shape(name)).numel())

    def shape(self, name: str) -> list[int]:
        """Shape of a whole parameter or buffer, also of one that ZeRO 3 has partitioned."""
        tensor = self._tensor(name)
        return list(getattr(tensor, "ds_shape", tensor.shape))

    def state_keys(self) -> list[str]:
        """Names of the optimizer's states that are as large as their parameter; none before the first step."""
        return sorted(key for key, value in self._first_state().items() if _is_elementwise(value))

    def scalars(self) -> dict[str, float]:
        """The optimizer's states that are one number for all parameters, such as Adam's step."""
        return {key: float(value) for key, value in sorted(self._first_state().items()) if _is_scalar(value)}

    # Whole tensors out

    def gather(self, name: str, *, state: bool = True) -> dict[str, Tensor]:
        """A parameter's master weights (float32) and, with `state`, its states, or a buffer, by checkpoint name.
        Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if name in self.buffers:
            return {f"model.{name}": self.buffers[name].detach().cpu().clone()}
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            return {f"model.{name}": self._gather_frozen(parameter)}
        found = {f"model.{name}": safe_get_full_fp32_param(parameter)}
        for key in self.state_keys() if state else ():
            found[f"optimizer.{key}.{name}"] = safe_get_full_optimizer_state(parameter, key)
        return {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in found.items()}

    # Whole tensors in

    def create_states(self, keys: list[str], scalars: Mapping[str, float]) -> None:
        """Gives the optimizer, which makes its state at its first step, states to be filled by `scatter`."""
        zero = self.engine.optimizer
        if not keys and not scalars:
            return
        for flat in self._flat_partitions():
            state = zero.optimizer.state[flat]
            state.update({key: torch.zeros_like(flat) for key in keys})
            state.update({key: torch.tensor(value, dtype=torch.float32) for key, value in scalars.items()})
        if self.stage < 3:
            # Private, but without it the new states have no addresses by parameter; the public way is a step.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def scatter(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `gather(name)` returned; low-precision copies follow. Collective."""
        whole = tensors[f"model.{name}"]
        if name in self.buffers:
            self.buffers[name].copy_(whole)
            return
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            self._scatter_frozen(parameter, whole)
            return
        states = {key: tensors[f"optimizer.{key}.{name}"] for key in self.state_keys()}
        if self.stage == 3:
            self._scatter_partitioned(parameter, whole, states)
        else:
            self._scatter_replicated(parameter, whole, states)

    def _scatter_replicated(self, parameter: nn.Parameter, whole: Tensor, states: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, whole.to(parameter.device))
        for key, value in states.items():
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        parameter.copy_(whole)

    def _scatter_partitioned(self, parameter: Any, whole: Tensor, states: Mapping[str, Tensor]) -> None:
        """Stage 3 by local slices: the calls for whole tensors fail where ranks do not divide the size."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        def local(value: Tensor) -> Tensor:
            size = parameter.ds_tensor.numel()
            begin = min(size * dist.get_rank(self.engine.data_parallel_group), value.numel())
            piece = value.flatten()[begin : begin + size]
            return nn.functional.pad(piece, (0, size - piece.numel())).to(parameter.ds_tensor.device)

        safe_set_local_fp32_param(parameter, local(whole))
        for key, value in states.items():
            safe_set_local_optimizer_state(parameter, local(value), key)
        parameter.ds_tensor.copy_(local(whole))
        if parameter.numel() == whole.numel():  # small parameters stay gathered
            parameter.data.copy_(whole.view_as(parameter))

    def _gather_frozen(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().to("cpu", torch.float32).clone()

    def _scatter_frozen(self, parameter: nn.Parameter, whole: Tensor) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.data.copy_(whole)

    # DeepSpeed's flat partitions

    def _tensor(self, name: str) -> Tensor:
        return self.buffers[name] if name in self.buffers else self.parameters[name]

    def _flat_partitions(self) -> list[Tensor]:
        zero = self.engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _first_state(self) -> dict[str, Any]:
        """State of the first flat partition, which every rank has; the others hold the same keys and numbers."""
        state = self.engine.optimizer.optimizer.state
        flat = self._flat_partitions()[0]
        return {k: v for k, v in state[flat].items() if v is not None} if flat in state else {}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or isinstance(value, Tensor) and value.dim() == 0


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1
