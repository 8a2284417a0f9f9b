"""The same in Lightning: ``ModelCheckpoint`` after every epoch, ``fit(ckpt_path="last")``."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from benchmarks.resume_bugs.bugs import BUGS, KILL, ROWS, STEPS, Rows, build, loss, schedule


class Module(lightning.LightningModule):
    """The model and its loss."""

    def __init__(self, name: str, folder: str) -> None:
        super().__init__()
        self.net, self.mine = build(name, folder), BUGS[name](folder)

    def training_step(self, batch: Any, number: int) -> Any:
        return loss(self.net, self.mine, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.mine.optimizer(self.net.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer, self.mine)}}


class Kills(lightning.Callback):
    """Kills the process when the next epoch begins."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == KILL:
            os.kill(os.getpid(), signal.SIGKILL)


def main(name: str, folder: str, kill: bool) -> None:
    """Train, and write the weights."""
    module = Module(name, folder)
    trainer = lightning.Trainer(
        max_epochs=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath=folder, save_last=True), *([Kills()] if kill else [])],
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(Rows(name, folder), ROWS), ckpt_path="last", weights_only=False)
    torch.save([*module.net.parameters()], Path(folder, "weights"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "kill" in sys.argv)
