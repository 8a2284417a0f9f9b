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
        self._copied: list[torch.cuda.Event] = []  # one for each device that holds a part of the state

    def stage(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its tensors as they are at this moment, on the host.

        From CUDA they are copied into pinned memory in the order of the stream: kernels that are launched later see the
        copy done, and this thread does not wait for it. ``wait`` does.
        """
        return replace(snapshot, tensors=self._copy(snapshot.tensors))

    def wait(self) -> None:
        """Return when everything that was staged has arrived."""
        for event in self._copied:
            event.synchronize()

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first: dict[object, str] = {}
        alias = {name: first.setdefault(memory_key(tensor), name) for name, tensor in tensors.items()}
        rooms = {name: self._room(name, tensors[name]) for name in first.values()}
        self._rooms = rooms  # what is no longer part of the state is given back
        for name, room in rooms.items():
            room.copy_(tensors[name], non_blocking=True)
        devices = {tensors[name].device for name in rooms if tensors[name].is_cuda}
        # An event alone would be of the current device, whatever device the copies come from.
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        return {name: rooms[alias[name]] for name in tensors}

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        room = self._rooms.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return room
