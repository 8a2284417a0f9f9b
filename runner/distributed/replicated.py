"""Data parallel training: every process has the whole model, and gradients are summed during the backward pass.

torch's ``DistributedDataParallel`` rebuilds its buckets after the first step of a process, in the order in which
gradients arrived. With three or more processes the place of a gradient in its bucket decides the order of its sum, so
the first step after a resume would differ in the last bits from the same step of an uninterrupted run. Here buckets
never change. The model is not wrapped either: a task may use all its attributes, and need not use all its parameters
in every step.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runner.distributed.buffers import Buffers, take_over
from runner.errors import ConfigError, TaskError

_BUCKET_BYTES = 25 << 20


@dataclass(slots=True)
class _Bucket:
    """Parameters whose gradients are summed in one message: ``flat``, which also holds which gradients exist."""

    parameters: list[nn.Parameter]
    ready: set[int] = field(default_factory=set)
    flat: Tensor | None = None
    work: Any = None


class Replicated:
    """Implements ``layout.Layout``: the whole model in every process."""

    def __init__(self, models: list[nn.Module], *, micro_batches: int) -> None:
        self.told = f"ddp: {dist.get_world_size()} processes, each with the whole model"
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

    def each(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        came = [weight for weight in self._model.parameters() if weight not in self._shared]
        take_over(came)  # each rank has drawn its own
        self._shared.update(came)
        for number, micro_batch in enumerate(micro_batches, 1):
            self._last = number == self._micro_batches
            yield micro_batch

    def gather_gradients(self) -> None:
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

    def whole(self, value: Tensor) -> Tensor:
        return value

    def all(self, verdict: Tensor) -> Tensor:
        verdict = verdict.int()
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return verdict

    def settle(self) -> None:
        self._buffers.settle()

    def state_of(self, optimizer: Any) -> Any:
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
