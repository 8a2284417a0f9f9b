"""How the model is distributed over several processes: replicated or sharded (``communicator.Parallelism``).

*Replicated*: every process has the whole model, and gradients are summed during the backward pass. torch's
``DistributedDataParallel`` rebuilds its buckets after the first step of a process, and with three or more processes the
place of a gradient in its bucket decides the order of its sum, so the first step after a resume would differ in the
last bits. Here buckets never change. The model is not wrapped either: a task may use all its attributes, and need not
use all its parameters in every step.

*Sharded* (FSDP2): each process keeps a slice of every parameter, of its gradient and of its moments. ``shard``
processes together hold one replica of the model; there are world size / ``shard`` replicas. Repeated layers
(``blocks``) are gathered one at a time, the rest of the model as one unit.

Buffers, such as running means, are equal in all processes: rank 0's values are copied to the others after each step.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from runner.distributed.communicator import Parallelism
from runner.errors import ConfigError, TaskError
from runner.optimizers import blocks


class _SeveralProcesses(Parallelism):
    """``micro_batches``: how many a step has, if its last backward pass is in the last of them; None if in any."""

    def __init__(self, models: list[nn.Module], *, micro_batches: int | None) -> None:
        self._models: list[Any] = models  # modules of FSDP once they are sharded
        self._micro_batches = micro_batches
        self._first_buffers = {(module, name) for module in self._modules() for name in module._buffers}

    def all_true(self, verdict: Tensor) -> Tensor:
        verdict = self.full_tensor(verdict).int()
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return verdict

    def sync_buffers(self) -> None:
        """Buffers are looked up at each step, since a model may replace or add a tensor. Non-persistent buffers
        that are added after the start are left alone: they may be caches of any size.
        """
        buffers = {}
        for module in self._modules():
            for name, buffer in module._buffers.items():
                cache = name in module._non_persistent_buffers_set and (module, name) not in self._first_buffers
                if buffer is not None and not cache:
                    buffers[id(buffer)] = buffer
        copy_from_rank_zero([*buffers.values()])

    def _modules(self) -> Iterable[nn.Module]:
        return (module for model in self._models for module in model.modules())


def copy_from_rank_zero(tensors: Sequence[Tensor]) -> None:
    """Set these tensors to their values on rank 0, with one broadcast."""
    if not tensors:
        return
    # The largest elements first, so that each tensor begins at a multiple of its element size, as view() needs it.
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())
    pieces = [tensor.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8) for tensor in ordered]
    message = torch.cat(pieces)
    dist.broadcast(message, 0)
    for tensor, piece in zip(ordered, torch.split(message, [len(piece) for piece in pieces]), strict=True):
        tensor.detach().copy_(piece.view(tensor.dtype).view(tensor.shape))


_BUCKET_BYTES = 25 << 20  # as in torch: large enough for the bandwidth, small enough to overlap with the backward pass


@dataclass(slots=True)
class _Bucket:
    """Parameters whose gradients are summed in one message, ``flat``; its tail counts the ranks with a gradient."""

    parameters: list[nn.Parameter]
    ready: set[int] = field(default_factory=set)
    flat: Tensor | None = None
    work: Any = None


class Replicated(_SeveralProcesses):
    """The whole model in every process."""

    def __init__(self, models: list[nn.Module], *, micro_batches: int | None) -> None:
        self.description = f"ddp: {dist.get_world_size()} processes, each with the whole model"
        super().__init__(models, micro_batches=micro_batches)
        weights_to_train = {name: weight for name, weight in models[0].named_parameters() if weight.requires_grad}
        self._buckets = [_Bucket(parameters) for parameters in _split(weights_to_train)]
        self._shared = {*models[0].parameters()}  # parameters with the values of rank 0
        self._in_buckets = {*weights_to_train.values()}
        self._last = False
        self._next = 0  # the next bucket to be sent; all processes send buckets in the same order
        for number, bucket in enumerate(self._buckets):
            for position, parameter in enumerate(bucket.parameters):
                hook = partial(self._ready, number, position)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        for tensor in (tensor for model in models for tensor in (*model.parameters(), *model.buffers())):
            copy_from_rank_zero([tensor])

    def iterate(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        added = [weight for weight in self._models[0].parameters() if weight not in self._shared]
        copy_from_rank_zero(added)  # each rank has drawn its own values
        self._shared.update(added)
        for number, micro_batch in enumerate(micro_batches, 1):
            self._last = number == self._micro_batches
            yield micro_batch
        self._last = False  # a task that collects its micro-batches first may go backward any number of times

    def reduce_gradients(self) -> None:
        """Gradients of weights that were frozen or absent at the start go last, in buckets made anew at each step."""
        weights = self._models[0].named_parameters()
        late = {name: weight for name, weight in weights if weight.requires_grad and weight not in self._in_buckets}
        late_buckets = [_Bucket(parameters) for parameters in _split(late)]
        for bucket in (*self._buckets[self._next :], *late_buckets):
            _send(bucket)
        for bucket in (*self._buckets, *late_buckets):
            _receive(bucket)
        self._next, self._last = 0, False

    def _ready(self, number: int, position: int, parameter: Tensor) -> None:
        """Hook: a gradient is complete. Send the buckets that are complete, in order."""
        if not self._last:
            return
        if number < self._next:
            remedy = "Differentiate each micro-batch once, with all of its losses together"
            raise RuntimeError(f"a gradient was added to after it had been sent to the other processes. {remedy}")
        self._buckets[number].ready.add(position)
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if len(bucket.ready) < len(bucket.parameters):
                return
            _send(bucket)
            self._next += 1


def _split(weights: dict[str, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Buckets of one dtype and device, in about the order in which the backward pass completes gradients."""
    bucket: list[nn.Parameter] = []
    size = 0
    for name, parameter in reversed(weights.items()):
        if parameter.layout != torch.strided:
            raise ConfigError(f"model: {name} is a {parameter.layout} parameter; several processes need dense ones")
        differs = bucket and (bucket[0].dtype != parameter.dtype or bucket[0].device != parameter.device)
        if differs or size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket


def _send(bucket: _Bucket) -> None:
    """Start the sum. A parameter without a gradient here contributes zeros."""
    gradients = [parameter.grad for parameter in bucket.parameters]
    if any(gradient is not None and gradient.is_sparse for gradient in gradients):
        remedy = "Build its layer, such as nn.Embedding, with sparse=False, or train in one process"
        raise TaskError(f"a gradient is sparse; several processes add up dense gradients only. {remedy}")
    pairs = zip(bucket.parameters, gradients, strict=True)
    pieces = [(torch.zeros_like(weight) if gradient is None else gradient).flatten() for weight, gradient in pairs]
    present = torch.tensor([float(gradient is not None) for gradient in gradients], dtype=pieces[0].dtype)
    bucket.flat = torch.cat([*pieces, present.to(pieces[0].device, non_blocking=True)])
    bucket.work = dist.all_reduce(bucket.flat, async_op=True)


def _receive(bucket: _Bucket) -> None:
    """Finish the sum and store it as gradients; parameters without a gradient in any process keep none."""
    assert bucket.flat is not None
    bucket.work.wait()
    count = len(bucket.parameters)
    sums = torch.split(bucket.flat[:-count], [parameter.numel() for parameter in bucket.parameters])
    absent = [number for number, parameter in enumerate(bucket.parameters) if parameter.grad is None]
    somewhere = bucket.flat[-count:].tolist() if absent else [1.0] * count
    for parameter, total, present in zip(bucket.parameters, sums, somewhere, strict=True):
        if present:
            total = total.view_as(parameter)
            parameter.grad = parameter.grad.copy_(total) if parameter.grad is not None else total.clone()
    bucket.flat, bucket.work, bucket.ready = None, None, set()


_CANNOT = "runtime.parallel=fsdp cannot shard"
_OTHERWISE = "Or use runtime.parallel=ddp, which keeps the whole model in each process"


class Sharded(_SeveralProcesses):
    """A slice of the model in every process."""

    def __init__(self, models: list[nn.Module], *, device: torch.device, shard: int, micro_batches: int | None) -> None:
        replicas = dist.get_world_size() // shard
        shape, names = ((replicas, shard), ("replicate", "shard")) if replicas > 1 else ((shard,), ("shard",))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        if single := [name for name, parameter in models[0].named_parameters() if not parameter.dim()]:
            remedy = f"Give it the shape [1]. {_OTHERWISE}"
            raise ConfigError(f"{_CANNOT} {', '.join(single)}: a parameter of shape [] has nothing to divide. {remedy}")
        if sparse := [name for name, module in models[0].named_modules() if getattr(module, "sparse", False) is True]:
            raise ConfigError(f"{_CANNOT} {', '.join(sparse)}: its gradients are sparse. Build it with sparse=False")
        for model in models:
            parts: list[Any] = [*blocks(model), model]
            for part in parts:
                try:
                    fully_shard(part, mesh=mesh)
                except (ValueError, NotImplementedError, AssertionError) as error:
                    raise ConfigError(f"{_CANNOT} {type(part).__name__}: {error}. {_OTHERWISE}") from error
                # Sum gradients instead of averaging them, because every loss is weighted by its share of the batch.
                if hasattr(part, "set_gradient_divide_factor"):
                    part.set_gradient_divide_factor(1.0)
                    part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale
                else:  # torch before 2.8
                    part.set_reduce_scatter_divide_factor(1.0)
        layers = f"{len(parts) - 1} repeated layers"
        self.description = f"fsdp: {replicas} x {shard} processes (replicas x slices), {layers}"
        super().__init__(models, micro_batches=micro_batches)

    def iterate(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        for number, micro_batch in enumerate(micro_batches, 1):
            last = self._micro_batches in (None, number)
            self._models[0].set_is_last_backward(last)
            self._models[0].set_requires_gradient_sync(last)
            yield micro_batch

    def reduce_gradients(self) -> None:
        """FSDP's hooks have reduced them. But a forward pass without a backward pass, as in evaluation, leaves the
        weights of the root unsharded, in tensors that neither the optimizer nor a moving average knows.
        """
        for model in self._models:
            model.reshard()
        whole = [n for n, p in self._models[0].named_parameters() if p.grad is not None and not isinstance(p, DTensor)]
        if whole:
            remedy = f"each process would train its own. Give it to the model in its constructor. {_OTHERWISE}"
            raise TaskError(f"model: {', '.join(whole)} came after the start, and {remedy}")

    def full_tensor(self, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def optimizer_part(self, optimizer: Any) -> Any:
        return _ShardedOptimizer(optimizer)


class _ShardedOptimizer:
    """The optimizer as a part of the state. Knows how its state will be sharded even before its first step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, for callbacks that change learning rates."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def like(self) -> dict[str, Any]:
        """A state dict as after a step, to load into: all of its tensors, each with its sharding. Before the first step
        this makes a step with a learning rate of zero, and puts the weights back, since they may be loaded already.
        """
        if self.optimizer.state:
            return self.state_dict()
        settings = [dict(group) for group in self.param_groups]
        weights = [[parameter.detach().clone() for parameter in group["params"]] for group in self.param_groups]
        for group in self.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)  # also if it was frozen at the start
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state = self.optimizer.state_dict()
        self.optimizer.state.clear()
        for group, before, copies in zip(self.param_groups, settings, weights, strict=True):
            group.update(before)
            for parameter, weight in zip(group["params"], copies, strict=True):
                parameter.detach().copy_(weight)
        return state
