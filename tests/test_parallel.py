"""Two real processes: gradients, buffers and weights that were not there, or not trained, at the start."""

import os
import socket
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from torch import nn

from runner.errors import ConfigError, TaskError
from runner.update import WeightUpdate, moving_average, update_average

CPU = torch.device("cpu")
BATCH = torch.linspace(-1, 1, 32).view(8, 4)


class Net(nn.Module):
    """Two layers, of which the first is built frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 1)
        self.first.requires_grad_(False)
        self.norm = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.norm(torch.tanh(self.first(x))))
        return found


def steps(model: nn.Module, layout: object, share: slice, *, average: bool = False) -> list[float]:
    """Six steps: the first layer is thawed for the third, the second frozen for the fifth. The norms of gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    copy = moving_average(model, 0.5) if average else None
    update = WeightUpdate(
        model, optimizer, device=CPU, clip_norm=0.01, skip_nonfinite=True, average=copy, parallelism=layout
    )  # type: ignore[arg-type]
    norms = []
    for number in range(6):
        model.first.requires_grad_(number >= 2)  # type: ignore[union-attr]
        model.second.requires_grad_(number < 4)  # type: ignore[union-attr]
        for part, batch in layout.iterate(iter([(0.5, BATCH[share])])):  # type: ignore[attr-defined]
            loss = model(batch).square().mean() * part
            update.backward(loss)
        norms.append(update.step(loss.detach())["grad_norm"].item())
    assert not any(weight.grad is not None for weight in model.parameters())
    return norms


def expected() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same in one process."""
    model, norms = Net(), []
    for number in range(6):
        model.first.requires_grad_(number >= 2)
        model.second.requires_grad_(number < 4)
        model(BATCH).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model.zero_grad()
    return norms, model.state_dict()


def replicated(rank: int) -> None:
    from runner.distributed.parallel import Replicated

    norms, weights = expected()
    model = Net()
    layout = Replicated([model], micro_batches=1)
    assert steps(model, layout, slice(4 * rank, 4 * rank + 4)) == pytest.approx(norms)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])

    torch.manual_seed(rank)  # each draws the weights of what it adds for itself
    model.norm = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model.requires_grad_(True)
    steps(model, layout, slice(4 * rank, 4 * rank + 4))
    for tensor in model.state_dict().values():
        here = tensor.clone()
        torch.distributed.broadcast(here, 0)
        assert torch.equal(here, tensor), "rank 1 went on for itself"

    sparse = nn.Embedding(5, 2, sparse=True)
    layout = Replicated([sparse], micro_batches=1)
    update = WeightUpdate(sparse, torch.optim.SGD(sparse.parameters(), lr=1.0), device=CPU, parallelism=layout)
    update.backward(sparse(torch.tensor([1])).sum())
    with pytest.raises(TaskError, match="a gradient is sparse"):
        update.step(torch.tensor(0.0))


def sharded(rank: int) -> None:
    from runner.distributed.parallel import Sharded

    norms, weights = expected()
    model = Net()
    layout = Sharded([model], device=CPU, shard=2, micro_batches=1)
    assert steps(model, layout, slice(4 * rank, 4 * rank + 4)) == pytest.approx(norms)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight.full_tensor(), weights[name])
    model.norm = nn.Linear(6, 6)
    with pytest.raises(TaskError, match=r"norm\.weight, norm\.bias came after the start"):
        steps(model, layout, slice(4 * rank, 4 * rank + 4))

    model = Net().requires_grad_(True)
    copy = moving_average(model, 0.5)
    layout = Sharded([model, copy.module], device=CPU, shard=2, micro_batches=1)
    for passes in range(3):  # without gradients, as an evaluation of either makes them
        for looked in (model, copy.module)[:passes]:
            with torch.no_grad():
                looked(BATCH)
        for _, batch in layout.iterate(iter([(1.0, BATCH)])):
            model(batch).square().mean().backward()
        layout.reduce_gradients()
        update_average(copy, model)

    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ConfigError, match=r"cannot shard scale: a parameter of shape \[\].*Give it the shape \[1\]"):
        Sharded([Scaled()], device=CPU, shard=2, micro_batches=1)
    with pytest.raises(ConfigError, match="its gradients are sparse"):
        Sharded([nn.Sequential(nn.Embedding(5, 2, sparse=True))], device=CPU, shard=2, micro_batches=1)


def process(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    replicated(rank)
    sharded(rank)
    torch.distributed.destroy_process_group()


def test_layouts_keep_no_list_of_what_is_trained(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    get_context("forkserver").set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor"])
    processes.start_processes(process, (port,), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
