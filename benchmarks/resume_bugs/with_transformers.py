"""The same in the Trainer of transformers: ``save_steps=1``, ``train(resume_from_checkpoint=True)``."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.resume_bugs.bugs import BUGS, KILL, ROWS, STEPS, Bug, Rows, build, loss, schedule


class Kills(TrainerCallback):
    """Kills the process when the next epoch begins."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == KILL:
            os.kill(os.getpid(), signal.SIGKILL)


class Trains(Trainer):
    """The Trainer with our loss."""

    mine: Bug

    def compute_loss(self, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        return loss(model, self.mine, inputs)


def main(name: str, folder: str, kill: bool) -> None:
    """Train, and write the weights."""
    net, bug = build(name, folder), BUGS[name](folder)
    optimizer = bug.optimizer(net.parameters())
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=STEPS,
        per_device_train_batch_size=ROWS,
        save_strategy="steps",
        save_steps=1,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trains(net, arguments, train_dataset=Rows(name, folder), optimizers=(optimizer, schedule(optimizer, bug)))
    trainer.mine = bug
    if kill:
        trainer.add_callback(Kills())
    trainer.train(resume_from_checkpoint=True if [*Path(folder).glob("checkpoint-*")] else None)
    torch.save([*net.parameters()], Path(folder, "weights"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "kill" in sys.argv)
