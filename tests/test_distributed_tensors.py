"""Real processes and torch's own sharding: what four of them saved, two and one load, to the bit."""

import os
import socket
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from faults import same
from torch import nn

from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.sharding import shard
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, PerRank
from runner.errors import StateError
from runner.storage import LocalLocation


class Tied(nn.Module):
    """Uneven, empty on some ranks, shared, and without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.outer = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.outer(self.norm(self.inner(self.tokens(x)))))
        return found


class GroupRanks:
    """Over a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, value: Any) -> list[Any] | None:
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        found = [value]
        torch.distributed.broadcast_object_list(found)
        return found[0]


def trained(mesh: Any, *, steps: int) -> dict[str, Any]:
    """A model and its optimizer after some steps; sharded as ``mesh`` says."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Tied()
    if mesh is not None:
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def full(state: Any) -> Any:
    """A state with its tensors whole."""
    if isinstance(state, torch.Tensor):
        whole: Any = state.full_tensor() if hasattr(state, "full_tensor") else state
        return whole.detach().clone()
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    return type(state)(map(full, state)) if isinstance(state, list | tuple) else state


def save(folder: Path, mesh: Any, comm: Communicator) -> CommitId:
    parts = trained(mesh, steps=3)
    states = {name: part.state_dict() for name, part in parts.items()}
    whole = {name: full(state) for name, state in states.items()}
    if comm.rank == 0:
        torch.save(whole, folder / "whole")
    snapshot = Snapshot.of(3, {**states, "own": PerRank(number=comm.rank)}, comm=comm)
    held = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    assert held < 0.6 * sum(tensor.nbytes for tensor in encode(whole, "")[1].values()), "no rank writes it all"
    return CheckpointStore(LocalLocation(folder), comm).commit(snapshot, attempt=1, require_newest=lambda: None)


def load(folder: Path, commit: CommitId, mesh: Any, comm: Communicator) -> None:
    parts = trained(mesh, steps=1)
    checkpoint = CheckpointStore(LocalLocation(folder)).open(commit, comm)
    for name, part in parts.items():
        loaded = checkpoint.load(name, like=part.state_dict() if comm.size > 1 else None)
        part.load_state_dict(loaded)
    whole = torch.load(folder / "whole")
    for name, part in parts.items():
        found = full(part.state_dict())
        assert same(found, type(found)(whole[name])), f"{name} on rank {comm.rank} of {comm.size}"
    assert parts["model"].head.weight is parts["model"].tokens.weight
    assert checkpoint.load("own") == {"number": comm.rank}


def process(rank: int, port: int, folder: Path) -> None:
    """Four processes save; two of them load, and one."""
    from torch.distributed.device_mesh import init_device_mesh

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=4)
    comm = GroupRanks(rank, 4)
    commit = save(folder, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), comm)
    load(folder, commit, init_device_mesh("cpu", (4,)), comm)
    refuse(init_device_mesh("cpu", (4,)), comm)
    torch.distributed.destroy_process_group()
    if rank < 2:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/two")
        load(folder, commit, init_device_mesh("cpu", (2,)), GroupRanks(rank, 2))
        load(folder, commit, None, GroupRanks(rank, 2))
        torch.distributed.destroy_process_group()
    if rank == 0:
        load(folder, commit, None, SINGLE_PROCESS)


def refuse(mesh: Any, comm: Communicator) -> None:
    """What has no cell of its own on each rank is refused by name."""
    from torch.distributed.tensor import DTensor, Partial

    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(StateError, match="cannot save model/w: a tensor placed as"):
        shard({"model/w": partial}, comm)
    with pytest.raises(StateError, match="a tensor on 4 of 8 ranks"):
        shard({"model/w": partial}, GroupRanks(comm.rank, 8))


@pytest.mark.slow
def test_torchs_sharded_states_load_on_other_worlds_to_the_bit(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked from a process that has imported torch and done nothing else.
    get_context("forkserver").set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor"])
    processes.start_processes(process, (port, tmp_path), nprocs=4, start_method="forkserver")  # type: ignore[no-untyped-call]
