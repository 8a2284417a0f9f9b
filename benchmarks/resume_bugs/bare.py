"""A bare loop: saves model, optimizer and scheduler after every step, and goes on from what is saved."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.resume_bugs.bugs import BUGS, KILL, ROWS, STEPS, Rows, build, loss, schedule


def main(name: str, folder: str, kill: bool) -> None:
    """Train, and write the weights."""
    net, bug = build(name, folder), BUGS[name](folder)
    optimizer = bug.optimizer(net.parameters())
    scheduler = schedule(optimizer, bug)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "scheduler": scheduler}
    loader, saved, begun = DataLoader(Rows(name, folder), ROWS), Path(folder, "saved"), 0
    if saved.exists():
        state = torch.load(saved)
        begun = state.pop("step")
        for part, value in state.items():
            parts[part].load_state_dict(value)
    for step in range(begun + 1, STEPS + 1):
        (batch,) = loader
        optimizer.zero_grad()
        loss(net, bug, batch).backward()
        optimizer.step()
        scheduler.step()
        state = {part: value.state_dict() for part, value in parts.items()}
        torch.save({**state, "step": step}, f"{saved}.new")
        os.replace(f"{saved}.new", saved)
        if kill and step == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save([*net.parameters()], Path(folder, "weights"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "kill" in sys.argv)
