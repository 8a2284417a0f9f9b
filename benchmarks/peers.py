"""The case ``mlp`` of ``benchmarks.loop`` in the loops of other libraries, each as its documentation shows it.

    python -m benchmarks.peers /tmp/peers                  # an environment for each library, with pip; some minutes
    python -m benchmarks.loop mlp --peers /tmp/peers       # ours, a bare loop and theirs, in the same turns

All have the model, data, optimizer and schedule of the case, batches of 32, scalars for TensorBoard every 10 steps, a
checkpoint every 500 steps, no progress bar, and one thread. ``Lightning`` and ``HF Trainer`` report the last loss or
their own mean; ``Fabric`` and ``Accelerate`` are loops by hand, with the means of the bare loop.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gate import NEVER, Gate, endless

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
LOG_EVERY, SAVE_EVERY, WARM_UP = 10, 500, 500  # steps, as in the case
PACKAGES = {
    "ignite": ["pytorch-ignite"],
    "Fabric": ["lightning"],
    "Accelerate": ["accelerate"],
    "HF Trainer": ["transformers", "accelerate"],
    "Lightning": ["lightning"],
}


def environments(folder: Path) -> dict[str, Path]:
    """The interpreters that ``install`` has made, by the name of the library."""
    paths = {name: folder / _environment(name) / "bin/python" for name in PACKAGES}
    return {name: python for name, python in paths.items() if python.exists()}


def install(folder: Path) -> None:
    """Make an environment for each library in ``folder``, those of the same packages only once."""
    for name, packages in PACKAGES.items():
        environment = folder / _environment(name)
        if not environment.exists():
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            common = ["torch", "tensorboard", "scikit-learn", "tqdm", "fsspec", "xxhash"]
            pip: list[str | Path] = [environment / "bin/python", "-m", "pip", "install", "-q", "-c", CONSTRAINTS]
            subprocess.run([*pip, *common, *packages], check=True)
        report = f"from importlib.metadata import version; print(version({packages[0]!r}))"
        shown = subprocess.run([environment / "bin/python", "-c", report], check=True, capture_output=True, text=True)
        print(f"{name:<11} {packages[0]} {shown.stdout.strip()}", flush=True)


def _environment(name: str) -> str:
    return PACKAGES[name][0]


def parts() -> tuple[Any, Any, Any, Any]:
    """Model, data loader, optimizer and scheduler of the case."""
    import torch
    from torch.utils.data import DataLoader

    from runner.datasets.digits import Digits
    from runner.models.mlp import MLP

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MLP(inputs=64, hidden=[64], outputs=10, dropout=0.1)
    samples: Any = Digits(split="train")
    loader = DataLoader(samples, batch_size=32, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    return model, loader, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


class Scalars:
    """The means of a loop by hand, every ``LOG_EVERY`` steps."""

    def __init__(self, log: Callable[[dict[str, float], int], None]) -> None:
        self._log = log
        self._losses: list[Any] = []
        self._waited, self._since = 0.0, time.monotonic()

    def add(self, step: int, loss: Any, rate: float, waited: float) -> None:
        import torch

        self._losses.append(loss.detach())
        self._waited += waited
        if step % LOG_EVERY:
            return
        seconds = time.monotonic() - self._since
        values = {
            "train/loss": torch.stack(self._losses).mean().item(),
            "train/lr": rate,
            "time/step": seconds / LOG_EVERY,
            "time/data_wait": self._waited / LOG_EVERY,
            "time/samples_per_second": LOG_EVERY * 32 / seconds,
        }
        self._log(values, step)
        self._losses, self._waited, self._since = [], 0.0, time.monotonic()


def by_hand(
    prepared: tuple[Any, Any, Any, Any],
    backward: Callable[[Any], None],
    log: Callable[[dict[str, float], int], None],
    save: Callable[[], None],
    gate: Gate,
) -> None:
    """A loop over what a library has prepared."""
    from torch.nn import functional as F

    model, loader, optimizer, scheduler = prepared
    scalars, batches, step = Scalars(log), endless(loader), 0
    while True:
        rate, began = scheduler.get_last_lr()[0], time.perf_counter()
        images, labels = next(batches)
        waited = time.perf_counter() - began
        loss = F.cross_entropy(model(images), labels)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        step += 1
        scalars.add(step, loss, rate, waited)
        if step % SAVE_EVERY == 0:
            save()
        if not gate.passed():
            return


def fabric(folder: str, gate: Gate) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import TensorBoardLogger

    model, loader, optimizer, scheduler = parts()
    library = Fabric(accelerator="cpu", devices=1, loggers=TensorBoardLogger(folder))
    library.launch()
    model, optimizer = library.setup(model, optimizer)
    loader = library.setup_dataloaders(loader)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    by_hand(
        (model, loader, optimizer, scheduler),
        library.backward,
        library.log_dict,
        lambda: library.save(f"{folder}/checkpoint.pt", state),
        gate,
    )


def accelerate(folder: str, gate: Gate) -> None:
    from accelerate import Accelerator

    library = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    library.init_trackers("benchmark")
    prepared = library.prepare(*parts())
    by_hand(prepared, library.backward, library.log, lambda: library.save_state(f"{folder}/checkpoint"), gate)


def ignite(folder: str, gate: Gate) -> None:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver, LRScheduler, TensorboardLogger
    from torch.nn import functional as F

    model, loader, optimizer, scheduler = parts()
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy)
    trainer.add_event_handler(Events.ITERATION_STARTED, LRScheduler(scheduler))
    logger = TensorboardLogger(log_dir=folder)
    logging = Events.ITERATION_COMPLETED(every=LOG_EVERY)
    logger.attach_output_handler(trainer, logging, "train", output_transform=lambda loss: {"loss": loss})
    logger.attach_opt_params_handler(trainer, logging, optimizer)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}
    saver = Checkpoint(state, DiskSaver(f"{folder}/checkpoints", require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=SAVE_EVERY), saver)

    def stop() -> None:
        if not gate.passed():
            trainer.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    trainer.run(loader, max_epochs=NEVER)


def lightning(folder: str, gate: Gate) -> None:
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.nn import functional as F

    model, loader, optimizer, scheduler = parts()

    class Classifier(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> Any:
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels)
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Gated(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = not gate.passed()

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=TensorBoardLogger(folder),
        log_every_n_steps=LOG_EVERY,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY), LearningRateMonitor("step"), Gated()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader)


def hf_trainer(folder: str, gate: Gate) -> None:
    from torch import nn
    from torch.nn import functional as F
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, loader, optimizer, scheduler = parts()

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any, labels: Any) -> dict[str, Any]:
            outputs = self.model(images)
            return {"loss": F.cross_entropy(outputs, labels), "logits": outputs}

    class Columns:
        def __len__(self) -> int:
            return len(loader.dataset)

        def __getitem__(self, index: int) -> dict[str, Any]:
            image, label = loader.dataset[index]
            return {"images": image, "labels": label}

    class Gated(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not gate.passed()

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=32,
        dataloader_drop_last=True,
        num_train_epochs=1_000_000,
        max_grad_norm=0.0,
        logging_steps=LOG_EVERY,
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        report_to=["tensorboard"],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    Trainer(
        Classifier(), arguments, train_dataset=Columns(), optimizers=(optimizer, scheduler), callbacks=[Gated()]
    ).train()


LOOPS: Mapping[str, Callable[[str, Gate], None]] = {
    "ignite": ignite,
    "Fabric": fabric,
    "Accelerate": accelerate,
    "HF Trainer": hf_trainer,
    "Lightning": lightning,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", type=Path, help="the folder of the environments; for a child the case")
    parser.add_argument("--clock", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child:
        install(arguments.environments)
        return
    gate = Gate(WARM_UP, time.perf_counter if arguments.clock else time.thread_time)
    sys.stdout, stdout = sys.stderr, sys.stdout  # libraries print; only the gate's numbers belong there
    gate.output = stdout
    LOOPS[arguments.child](arguments.folder, gate)


if __name__ == "__main__":
    main()
