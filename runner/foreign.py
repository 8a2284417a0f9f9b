"""Weights that another program wrote: safetensors files, read as a checkpoint that has nothing but a model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner.checkpoint.checkpoint import Checkpoint, Reader, TensorBytes
from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.sharding import Box, FileGroup
from runner.checkpoint.tensor_file import Damaged, Kind
from runner.distributed.communicator import Communicator
from runner.errors import ConfigError
from runner.names import saved_name


class _SafetensorsReader(Reader):
    def __init__(self, keys: Mapping[str, tuple[Path, str]]) -> None:
        self._keys = keys

    def read(self, wanted: Mapping[str, tuple[TensorBytes, Box]]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in {self._keys[place.name][0] for place, _ in wanted.values()}
            }
            for name, (place, box) in wanted.items():
                path, key = self._keys[place.name]
                whole = Box.whole(place.kind.shape)
                tensors[name] = files[path].get_tensor(key)[box.within(whole)].clone()
        return tensors


def read_weights(files: Sequence[Path], comm: Communicator) -> Checkpoint:
    """The tensors of these files under the names of a model: without the prefixes of torch.compile, and of
    DistributedDataParallel where all names have it. Raises ConfigError.
    """
    keys: dict[str, tuple[Path, str]] = {}
    kinds: dict[str, Kind] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in sorted(file.keys()):
                    stored = file.get_slice(key)
                    name = saved_name(f"model/{key}")
                    keys[name], kinds[name] = (path, key), Kind(stored.get_dtype(), tuple(stored.get_shape()))
        except (SafetensorError, Damaged, OSError) as error:
            raise ConfigError(f"run.parent: {path} cannot be read as safetensors: {error}") from error
    if all(name.startswith("model/module.") for name in keys):
        keys, kinds = ({n.replace("/module.", "/", 1): v for n, v in each.items()} for each in (keys, kinds))  # type: ignore[assignment]
    group = FileGroup((), kinds)
    like = {name.removeprefix("model/"): torch.empty(0) for name in kinds}  # only their names are encoded
    places = {name: TensorBytes(group, name, 0) for name in kinds}
    value, _ = encode(like, "model")
    return Checkpoint(CommitId(0, 0, ""), 1, {}, {"model": value}, places, {}, _SafetensorsReader(keys), comm)
