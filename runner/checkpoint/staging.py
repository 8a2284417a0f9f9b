"""Copies of the state in reused host memory: the only part of saving for which training waits."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.tensors import memory_key


class Staging:
    """Room for one copy of the state. Tensors that share all their memory share it in the copy."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def stage(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its tensors as they are at this moment, on the host.

        From CUDA they are copied into pinned memory in the order of the stream: kernels that are launched later see the
        copy done, and this thread does not wait for it. ``wait`` does.
        """
        return replace(snapshot, tensors=self._copy(snapshot.tensors))

    def wait(self) -> None:
        """Return when everything that was staged has arrived."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first: dict[object, str] = {}
        alias = {name: first.setdefault(memory_key(tensor), name) for name, tensor in tensors.items()}
        rooms = {name: self._room(name, tensors[name]) for name in first.values()}
        self._rooms = rooms  # what is no longer part of the state is given back
        on_device = False
        for name, room in rooms.items():
            room.copy_(tensors[name], non_blocking=True)
            on_device = on_device or tensors[name].is_cuda
        if on_device:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return {name: rooms[alias[name]] for name in tensors}

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        room = self._rooms.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return room
