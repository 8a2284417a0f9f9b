"""How the model is distributed over the processes (not at all, replicated, sharded), and what follows for a step.

Buffers that must be equal in all processes, such as running means: rank 0's values are copied to the others.

Data parallel training: every process has the whole model, and gradients are summed during the backward pass.

torch's ``DistributedDataParallel`` rebuilds its buckets after the first step of a process, in the order in which
gradients arrived. With three or more processes the place of a gradient in its bucket decides the order of its sum, so
the first step after a resume would differ in the last bits from the same step of an uninterrupted run. Here buckets
never change. The model is not wrapped either: a task may use all its attributes, and need not use all its parameters
in every step.

Fully sharded training (FSDP2): each process keeps a slice of every parameter, its gradient and its moments.

``shard`` processes together hold one replica of the model; there are world size / ``shard`` replicas. Repeated layers
(``blocks``) are gathered one at a time, the rest of the model as one unit.
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

from runner.errors import ConfigError, TaskError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the children of a ``ModuleList`` or ``Sequential``, where there are two or more,
    all of one class and with parameters. Blocks within blocks do not count.
    """
    found: list[nn.Module] = []
    for child in model.children():
        inner: Sequence[nn.Module] = [*child.children()] if isinstance(child, nn.ModuleList | nn.Sequential) else []
        repeated = len(inner) > 1 and len({type(one) for one in inner}) == 1
        found += inner if repeated and all(any(True for _ in one.parameters()) for one in inner) else blocks(child)
    return found


class Buffers:
    """The buffers of models, by their places: a model may put another tensor there in every step. Those that came after
    the start are looked for at each step; but not those that no checkpoint has, which may be caches of any size.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._models = [*models]
        self._first = {(module, name) for module in self._modules() for name in module._buffers}

    def sync(self) -> None:
        """Give them the values that they have in rank 0."""
        found = {
            id(buffer): buffer
            for module in self._modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and (name not in module._non_persistent_buffers_set or (module, name) in self._first)
        }
        take_over([*found.values()])

    def _modules(self) -> Iterable[nn.Module]:
        return (module for model in self._models for module in model.modules())


def take_over(tensors: Sequence[Tensor]) -> None:
    """Set these tensors to their values on rank 0, with one broadcast."""
    if not tensors:
        return
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())  # each begins at a multiple of its size
    pieces = [tensor.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8) for tensor in ordered]
    message = torch.cat(pieces)
    dist.broadcast(message, 0)
    for tensor, piece in zip(ordered, torch.split(message, [len(piece) for piece in pieces]), strict=True):
        tensor.detach().copy_(piece.view(tensor.dtype).view(tensor.shape))


_BUCKET_BYTES = 25 << 20


@dataclass(slots=True)
class _Bucket:
    """Parameters whose gradients are summed in one message: ``flat``, which also holds which gradients exist."""

    parameters: list[nn.Parameter]
    ready: set[int] = field(default_factory=set)
    flat: Tensor | None = None
    work: Any = None


class Replicated:
    """Implements ``Parallelism``: the whole model in every process."""

    def __init__(self, models: list[nn.Module], *, micro_batches: int) -> None:
        self.description = f"ddp: {dist.get_world_size()} processes, each with the whole model"
        self._model = models[0]
        self._micro_batches = micro_batches
        self._buffers = Buffers(models)
        trained = {name: weight for name, weight in models[0].named_parameters() if weight.requires_grad}
        self._buckets = [_Bucket(parameters) for parameters in _split(trained)]
        self._shared = {*models[0].parameters()}  # whose values are those of rank 0
        self._sent = {*trained.values()}  # that are in a bucket
        self._last = False
        self._next = 0  # the next bucket to be sent; all processes send buckets in the same order
        for number, bucket in enumerate(self._buckets):
            for place, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._ready, number, place)
                )
        for tensor in (tensor for model in models for tensor in (*model.parameters(), *model.buffers())):
            take_over([tensor])

    def iterate(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        came = [weight for weight in self._model.parameters() if weight not in self._shared]
        take_over(came)  # each rank has drawn its own
        self._shared.update(came)
        for number, micro_batch in enumerate(micro_batches, 1):
            self._last = number == self._micro_batches
            yield micro_batch

    def reduce_gradients(self) -> None:
        """Those of weights that were frozen at the start, or were not there, go last and at each step anew."""
        for bucket in self._buckets[self._next :]:
            _send(bucket)
        late = {name: p for name, p in self._model.named_parameters() if p.requires_grad and p not in self._sent}
        thawed = [_Bucket(parameters) for parameters in _split(late)]
        for bucket in thawed:
            _send(bucket)
        for bucket in (*self._buckets, *thawed):
            _receive(bucket)
        self._next, self._last = 0, False

    def full_tensor(self, value: Tensor) -> Tensor:
        return value

    def all_true(self, verdict: Tensor) -> Tensor:
        verdict = verdict.int()
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return verdict

    def sync_buffers(self) -> None:
        self._buffers.sync()

    def optimizer_part(self, optimizer: Any) -> Any:
        return optimizer

    def _ready(self, number: int, place: int, parameter: Tensor) -> None:
        """A gradient is complete: send all buckets whose turn it is and that are complete."""
        if not self._last:
            return
        if number < self._next:
            raise RuntimeError(
                "a gradient was added to after it had been sent to the other processes. Differentiate each micro-batch "
                "once, with all of its losses together"
            )
        self._buckets[number].ready.add(place)
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if len(bucket.ready) < len(bucket.parameters):
                return
            _send(bucket)
            self._next += 1


def _split(trained: dict[str, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in about the order of their gradients, in buckets of one dtype and device."""
    bucket: list[nn.Parameter] = []
    size = 0
    for name, parameter in reversed(trained.items()):
        if parameter.layout != torch.strided:
            raise ConfigError(
                f"model: {name} is a {parameter.layout} parameter; several processes train dense ones only"
            )
        other = bucket and (bucket[0].dtype != parameter.dtype or bucket[0].device != parameter.device)
        if other or size >= _BUCKET_BYTES:
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
        raise TaskError(
            "a gradient is sparse, as that of nn.Embedding(sparse=True); several processes bring together dense ones "
            "only. Build it with sparse=False, or train in one process"
        )
    pieces = [
        torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
        for parameter, gradient in zip(bucket.parameters, gradients, strict=True)
    ]
    here = torch.tensor([float(gradient is not None) for gradient in gradients], dtype=pieces[0].dtype)
    bucket.flat = torch.cat([*pieces, here.to(pieces[0].device, non_blocking=True)])
    bucket.work = dist.all_reduce(bucket.flat, async_op=True)


def _receive(bucket: _Bucket) -> None:
    """Finish the sum and store it as gradients; parameters without a gradient in any process keep none."""
    assert bucket.flat is not None
    bucket.work.wait()
    count = len(bucket.parameters)
    sums = torch.split(bucket.flat[:-count], [parameter.numel() for parameter in bucket.parameters])
    absent = [number for number, parameter in enumerate(bucket.parameters) if parameter.grad is None]
    somewhere = bucket.flat[-count:].tolist() if absent else [1.0] * count
    for parameter, total, found in zip(bucket.parameters, sums, somewhere, strict=True):
        if found:
            total = total.view_as(parameter)
            parameter.grad = parameter.grad.copy_(total) if parameter.grad is not None else total.clone()
    bucket.flat, bucket.work, bucket.ready = None, None, set()


_CANNOT = "runtime.parallel=fsdp cannot shard"
_OTHERWISE = "Or use runtime.parallel=ddp, which keeps the whole model in each process"


class Sharded:
    """Implements ``Parallelism``: a slice of the model in every process."""

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
        self.description = f"fsdp: {replicas} x {shard} processes (replicas x slices), {len(found)} repeated layers"
        self._models: list[Any] = models
        self._micro_batches = micro_batches
        self._buffers = Buffers(models)

    def iterate(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        for number, micro_batch in enumerate(micro_batches, 1):
            last = number == self._micro_batches
            self._models[0].set_is_last_backward(last)
            self._models[0].set_requires_gradient_sync(last)
            yield micro_batch

    def reduce_gradients(self) -> None:
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

    def full_tensor(self, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def all_true(self, verdict: Tensor) -> Tensor:
        verdict = self.full_tensor(verdict).int()
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return verdict

    def sync_buffers(self) -> None:
        self._buffers.sync()

    def optimizer_part(self, optimizer: Any) -> Any:
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
