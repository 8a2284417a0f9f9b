"""Fully sharded training (FSDP2): each process keeps a slice of every parameter, its gradient and its moments.

``shard`` processes together hold one replica of the model; there are world size / ``shard`` replicas. Repeated layers
(``layout.blocks``) are gathered one at a time, the rest of the model as one unit.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from runner.distributed.buffers import Buffers
from runner.distributed.layout import blocks
from runner.errors import ConfigError, TaskError

_CANNOT = "runtime.parallel=fsdp cannot shard"
_OTHERWISE = "Or use runtime.parallel=ddp, which keeps the whole model in each process"


class Sharded:
    """Implements ``layout.Layout``: a slice of the model in every process."""

    def __init__(self, models: list[nn.Module], *, device: torch.device, shard: int, micro_batches: int) -> None:
        replicas = dist.get_world_size() // shard
        shape, names = ((replicas, shard), ("replicate", "shard")) if replicas > 1 else ((shard,), ("shard",))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        _require_shapes(models[0])
        for model in models:
            found = blocks(model)
            for part in (*found, model):
                try:
                    fully_shard(part, mesh=mesh)
                except (ValueError, NotImplementedError, AssertionError) as error:
                    raise ConfigError(f"{_CANNOT} {type(part).__name__}: {error}. {_OTHERWISE}") from error
                _add_up(part)
        self.told = f"fsdp: {replicas} x {shard} processes (replicas x slices), {len(found)} repeated layers"
        self._models: list[Any] = models
        self._micro_batches = micro_batches
        self._buffers = Buffers(models)

    def each(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        for number, micro_batch in enumerate(micro_batches, 1):
            last = number == self._micro_batches
            self._models[0].set_is_last_backward(last)
            self._models[0].set_requires_gradient_sync(last)
            yield micro_batch

    def gather_gradients(self) -> None:
        """Done by the hooks of FSDP. But a pass without a backward one, as in evaluation, leaves the weights whole that
        are not in repeated layers: neither the optimizer nor a moving average would know them.
        """
        for model in self._models:
            model.reshard()
        whole = [n for n, p in self._models[0].named_parameters() if p.grad is not None and not isinstance(p, DTensor)]
        if whole:
            raise TaskError(
                f"model: {', '.join(whole)} came after the start, and each process would train its own. Give it to the "
                f"model in its constructor. {_OTHERWISE}"
            )

    def whole(self, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def all(self, verdict: Tensor) -> Tensor:
        verdict = self.whole(verdict).int()
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return verdict

    def settle(self) -> None:
        self._buffers.settle()

    def state_of(self, optimizer: Any) -> Any:
        return _ShardedOptimizer(optimizer)


class _ShardedOptimizer:
    """The optimizer as a part of the state. Knows how its state will be sharded even before its first step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer, for callbacks that change rates."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def like(self) -> dict[str, Any]:
        """A state with the tensors of one that has made a step, each as it lies on the processes. The weights may be
        loaded already and stay as they are, whatever the optimizer does at a rate of zero.
        """
        if self.optimizer.state:
            return self.state_dict()
        groups = [dict(group) for group in self.param_groups]
        weights = [[parameter.detach().clone() for parameter in group["params"]] for group in self.param_groups]
        for group in self.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)  # it may have been thawed since the start
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state = self.optimizer.state_dict()
        self.optimizer.state.clear()
        for group, before, kept in zip(self.param_groups, groups, weights, strict=True):
            group.update(before)
            for parameter, weight in zip(group["params"], kept, strict=True):
                parameter.detach().copy_(weight)
        return state


def _require_shapes(model: nn.Module) -> None:
    """Raise ConfigError for parameters that cannot be cut into slices."""
    single = [name for name, parameter in model.named_parameters() if not parameter.dim()]
    if single:
        raise ConfigError(
            f"{_CANNOT} {', '.join(single)}: a parameter of shape [] has nothing to divide. Give it the shape [1]. "
            f"{_OTHERWISE}"
        )
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]
    if sparse:
        raise ConfigError(f"{_CANNOT} {', '.join(sparse)}: its gradients are sparse. Build it with sparse=False")


def _add_up(part: Any) -> None:
    """Sum gradients instead of averaging them, because every loss is weighted by its share of the batch."""
    if hasattr(part, "set_gradient_divide_factor"):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale
    else:  # torch before 2.8
        part.set_reduce_scatter_divide_factor(1.0)
