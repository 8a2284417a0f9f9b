"""What a run leaves behind, gathered in the process that has the credentials for its storage; and its removal.

What watches a life of the runner from inside its process, and ends it at the moment that was asked for.

Installed over the runner's own classes, which know nothing of it. After every step it writes a line of JSON: what the
step was given, what it made of it, and a digest of every tensor and value of the state; a line that is written survives
the kill. Moments of a kill: ``step``, ``save`` (half of the bytes are written), ``committed`` (by a save that is made
at that step), ``loaded``, ``evaluation`` (before it is noted), ``start`` (before the first step), ``clock`` (so many
milliseconds after that, or after the step that a save is asked for).
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from runner import app, build, evaluation, experiment
from runner.callbacks.base import Loop
from runner.callbacks.evaluation import Evaluate
from runner.callbacks.saving import SaveCheckpoint
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import Damaged
from runner.data.probe import leaves
from runner.job import Job
from runner.metrics import lines
from runner.rng import Generators
from runner.run import attempt_records
from runner.run.directory import RunDirectory
from runner.runs.audit import audit
from runner.trainer import Trainer
from runner.update import WeightUpdate
from runner.verify import pins
from runner.verify.execution import Kill
from runner.verify.fingerprint import fingerprint, of_value
from runner.verify.memory import memory, settings

_FOLDERS = ("tensorboard", "ledger", "metrics", "data", "commits", "attempts", "")


def collect(directory: RunDirectory) -> dict[str, Any]:
    """Checkpoints by step, metric lines, result and audit of a finished run, as plain values."""
    store = CheckpointStore(directory.location)
    proof, audited = audit(directory)
    result = directory.result(directory.identity() or {}) or {}
    return {
        "url": directory.location.url,
        "checkpoints": {str(commit.step): _checkpoint(store, commit) for commit in reversed(store.commits())},
        "lines": [
            {tag: value for tag, value in line.items() if not tag.startswith("time/")}
            for line in lines.read(directory.location)
        ],
        "result": {key: value for key, value in result.items() if key != "seconds"},
        "audit": audited | {"holds": proof.holds},
        "attempts": [record.outcome() for record in attempt_records.history(directory.location)],
    }


def remove(directory: RunDirectory) -> None:
    """Remove every object of the run, one by one by its exact name."""
    for folder in _FOLDERS:
        for entry in directory.location.list(folder):
            directory.location.remove(f"{folder}/{entry.name}" if folder else entry.name)


def _checkpoint(store: CheckpointStore, commit: CommitId) -> dict[str, str]:
    """What a checkpoint holds, with every byte verified."""
    try:
        found = store.open(commit)
        return fingerprint({part: found.load(part) for part in found.parts})
    except Damaged as error:
        return {"damaged": str(error)}


class Recorder:
    """The recorder of one life."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request
        self.objects: dict[str, Any] = {}
        self.line: dict[str, Any] = {}
        self._file = os.open(request["record"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.rank: int = request["rank"]
        chosen = self.rank == (request["victim"] or 0)  # who kills all does it as the first
        kill = Kill(*(request["kill"] or ("",)))
        self.moment, self.step = (kill.moment, kill.step) if chosen else ("", 0)
        self.saved = kill.after
        self._began = time.monotonic()

    def write(self, event: str, **facts: Any) -> None:
        """One line; in the hands of the system when this returns."""
        text = json.dumps({"event": event, "seconds": time.monotonic() - self._began, **facts}, default=str)
        os.write(self._file, text.encode() + b"\n")

    def die(self, moment: str, step: int) -> None:
        """End the whole process group, or this process alone, if this is the moment."""
        if moment == self.moment and step >= self.step:
            self.write("killed", moment=moment, step=step)
            if self.request["victim"] is not None:
                signal.raise_signal(signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)

    def known(self, state: Any) -> dict[str, Any]:
        """The state, and what the objects remember beside it."""
        if self.request["silent"]:
            return {}
        return {"state": fingerprint(state.state_dict()), "memory": memory(self.objects) | settings()}

    def dump(self, state: Any, step: int) -> None:
        """Write the tensors of the state where a step's are asked for."""
        if step == self.request["dump"]:
            tensors = Snapshot.of(step, state.state_dict()).tensors
            torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, f"{self.request['record']}.pt")


def install(request: Mapping[str, Any]) -> None:
    """Watch this process."""
    for pin in request["pins"]:
        pins.hold(pin)
    if request["does"] == "remove":
        app._finished = lambda job, config, team: remove(job.directory)
        return
    probe = Recorder(request)
    _watch_building(probe)
    _watch_resuming(probe)
    _watch_steps(probe)
    _watch_saving(probe)
    _watch_evaluation(probe)
    _watch_the_end(probe)


def _watch_building(probe: Recorder) -> None:
    parts, called = build.build, build._instance

    def instance(node: Any, key: str, **how: Any) -> Any:
        made = called(node, key, **how)
        if key in ("data.train", "data.validation", "data.collate", "model", "task") or key.startswith("callbacks."):
            probe.objects[key] = made
            probe.write("made", memory=memory({key: made}))
        return made

    def built(config: Any, device: Any, team: Any) -> Any:
        try:
            found = parts(config, device, team)
        except Exception:
            probe.write("refused", memory=memory(probe.objects))
            raise
        probe.objects |= {"optimizer": found.state.optimizer, "scheduler": found.state.scheduler}
        plan = found.plan
        probe.write(
            "built",
            indexed=plan is not None,
            epoch=plan.steps_of(1) if plan is not None else None,
        )
        _hash_batches(probe, found.state.stream)
        return found

    build._instance = instance
    experiment.build = built  # type: ignore[attr-defined]


def _hash_batches(probe: Recorder, stream: Any) -> None:
    step = stream.step

    def hashed() -> Iterator[tuple[float, Any]]:
        for number, (share, batch) in enumerate(step()):
            found = [(path, of_value(value)) for path, value in leaves(batch)]
            probe.line.setdefault("batch", {}).update({f"{number}{path}": value for path, value in found})
            yield share, batch

    stream.step = hashed


def _watch_resuming(probe: Recorder) -> None:
    resume = experiment._resume

    def resumed(opening: Any, parts: Any, store: Any, ranks: Any) -> Any:
        found = resume(opening, parts, store, ranks)
        probe.write("resumed", step=found.step, **probe.known(parts.state))
        probe.die("loaded", 0)
        probe.die("start", found.step)
        if probe.moment == "clock":
            threading.Timer(probe.step / 1000, probe.die, ("clock", probe.step)).start()
        return found

    experiment._resume = resumed


def _watch_steps(probe: Recorder) -> None:
    begin, step, move = Trainer.__init__, Trainer._step, WeightUpdate.step

    def begun(self: Trainer, *arguments: Any, **keywords: Any) -> None:
        begin(self, *arguments, **keywords)
        limits = [limit for limit in (self.max_steps, probe.request["steps"]) if limit is not None]
        self.max_steps = min(limits, default=None)
        if self.max_seconds is not None:
            probe.write("unlimited")
        self.max_seconds = None  # what ends with the clock ends elsewhere every time

    def stepped(self: Trainer, loop: Loop, began: float) -> None:
        probe.line = {"generators": fingerprint({"generators": Generators().state_dict()})}
        before = time.monotonic()
        step(self, loop, began)
        probe.line |= {
            "step": loop.step,
            "took": time.monotonic() - before,
            "epochs": loop.epochs,
            "samples": str(loop.state.stream.line(loop.step)),
            "rate": loop.rate,
            "metrics": {name: float(value) for name, value in loop.metrics.items()},
        }
        limit = probe.request["seconds"]
        if limit is not None and loop.elapsed > limit:
            self.max_steps = loop.step

    def moved(self: WeightUpdate, loss: torch.Tensor) -> Any:
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        probe.line["gradients"] = {name: of_value(gradient) for name, gradient in named.items()}
        return move(self, loss)

    Trainer.__init__, Trainer._step = begun, stepped  # type: ignore[method-assign]
    WeightUpdate.step = moved  # type: ignore[method-assign]


def _watch_saving(probe: Recorder) -> None:
    begin, act, commit = SaveCheckpoint.__init__, SaveCheckpoint.act, CheckpointStore.commit
    on_step: Callable[[Any, Loop], None] = SaveCheckpoint.on_step

    def begun(self: SaveCheckpoint, *arguments: Any, **keywords: Any) -> None:
        begin(self, *arguments, **keywords)
        pins = self.pins
        self.pins = lambda step: step == probe.saved or pins(step)

    def stepped(self: Any, loop: Loop) -> None:
        probe.write("step", **probe.line, evaluation=loop.evaluation or {}, **probe.known(loop.state))
        probe.dump(loop.state, loop.step)
        probe.die("step", loop.step)
        if loop.step == probe.saved:
            probe.die("clock", probe.step)  # at the latest
        if loop.step == probe.saved and probe.rank == 0:
            self._wait()  # else there may be no room for this copy
        on_step(self, loop)
        if loop.step == probe.saved and probe.rank == 0:
            self._wait()  # else the kill may come before it is durable

    def acted(self: SaveCheckpoint, loop: Loop, order: Any) -> None:
        began = time.monotonic()
        act(self, loop, order)
        if order is not None and probe.rank == 0:
            probe.write("save", step=loop.step, stall=time.monotonic() - began)

    def committed(self: CheckpointStore, snapshot: Snapshot, **how: Any) -> Any:
        if probe.moment == "save" and snapshot.step >= probe.step:
            _cut_short(probe, type(self.location), snapshot.step)
        began = time.monotonic()
        found = commit(self, snapshot, **how)
        size = sum(tensor.nbytes for tensor in snapshot.tensors.values())
        probe.write("committed", step=snapshot.step, took=time.monotonic() - began, bytes=size)
        probe.die("committed", snapshot.step)
        return found

    SaveCheckpoint.__init__ = begun  # type: ignore[method-assign]
    SaveCheckpoint.on_step, SaveCheckpoint.act = stepped, acted  # type: ignore[method-assign]
    CheckpointStore.commit = committed  # type: ignore[method-assign]


def _cut_short(probe: Recorder, kind: Any, step: int) -> None:
    """The next object is half written when the process dies."""
    put = kind.put

    def half(self: Any, name: str, chunks: Any) -> int:
        def cut() -> Iterator[Any]:
            for chunk in chunks:
                yield bytes(chunk)[: len(bytes(chunk)) // 2]
                probe.die("save", step)

        size: int = put(self, name, cut())
        return size

    kind.put = half


def _watch_evaluation(probe: Recorder) -> None:
    evaluate, begin, every = evaluation.evaluate, Evaluate.__init__, probe.request["evaluations"]

    def begun(self: Evaluate, interval: Any, *more: Any) -> None:
        begin(self, interval, *more)
        if every is not None and (interval.steps or every + 1) > every:
            interval.steps = every
            probe.write("oftener", every=every)

    def evaluated(*arguments: Any, **keywords: Any) -> Any:
        found = evaluate(*arguments, **keywords)
        probe.die("evaluation", probe.line.get("step", 0))
        return found

    Evaluate.__init__ = begun  # type: ignore[method-assign,assignment]
    build.evaluate = evaluated  # type: ignore[attr-defined]


def _watch_the_end(probe: Recorder) -> None:
    finished, before = app._finished, {*sys.modules}

    def ended(job: Job, config: Any, team: Any) -> Any:
        found = finished(job, config, team)
        if probe.rank:
            return found
        probe.write("finished", **collect(job.directory))
        probe.write("imported", modules=[name for name in sys.modules if name not in before and _is_library(name)])
        return found

    app._finished = ended


def _is_library(name: str) -> bool:
    """Whether a module is nobody's own code."""
    return "site-packages" in (getattr(sys.modules[name], "__file__", None) or "")
