"""The observer of one attempt in ``runner.verify``: records each step, and kills the process.

After every step it writes a line of JSON: the batch, gradients, generators and metrics of the step, and, unless the
attempt is ``silent``, a digest of every tensor and value of the state and of the memory beside it. A written line
survives the kill. Moments of a kill: ``step``, ``save`` (half of an object's first piece is written), ``committed``,
``loaded``, ``evaluation`` (before it is noted), ``start`` (before the first step), ``clock`` (so many milliseconds
after the restore, at the latest when step ``after`` ends). Moments of SIGTERM, after which the runner ends by itself:
``stop`` (in a step) and ``evaluating`` (in an evaluation, once a batch of it was computed).
"""

import gc
import json
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from runner.callbacks.base import Loop, Observer, TrainingSetup, observers
from runner.callbacks.evaluate import Evaluate, Interval
from runner.checkpoint.manifest import parse_commit, parse_data
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import Damaged
from runner.data.probe import leaves
from runner.data.stream import MapStyleStream
from runner.metrics import lines
from runner.optimizers import parts_of
from runner.rng import Generators
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts
from runner.runs.audit import audit
from runner.state import TrainState
from runner.storage.location import Buffer, Location
from runner.verify import controls, source, suspects
from runner.verify.difference import unequal
from runner.verify.execution import STOPS, AttemptRequest, Kill
from runner.verify.fingerprint import fingerprint, names_of_runs, of_value
from runner.verify.memory import memory, private

_FOLDERS = ("tensorboard", "ledger", "metrics", "data", "commits", "attempts", "")
_WRITERS = ("runner.metrics.tensorboard.", "runner.metrics.lines.")


def install(request: AttemptRequest, rank: int) -> None:
    """Observe this process as the request asks."""
    controls.pin(*(pin for pin in request.pins if pin != "evaluation"), ahead=request.shift, late=request.late)
    observers.append(Remover() if request.removes else Recorder(request, rank))


class Remover(Observer):
    """Removes the run instead of training, in a process that has the credentials for its storage."""

    def on_command(self, directory: RunDirectory) -> None:
        """Remove every object of the run, one by one by its exact name, and end the command."""
        for folder in _FOLDERS:
            for entry in directory.location.list(folder):
                directory.location.remove(f"{folder}/{entry.name}" if folder else entry.name)
        raise SystemExit(0)


class Recorder(Observer):
    """Writes the record of one attempt, and ends the attempt at the requested moment."""

    def __init__(self, request: AttemptRequest, rank: int) -> None:
        self._request = request
        self._rank = rank
        self._objects: dict[str, Any] = {}  # key of the configuration -> object whose memory is compared
        self._line: dict[str, Any] = {}  # the record of the current step
        names_of_runs[:] = [f"/{request.name}"]
        self._record = os.open(request.record(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        kill = request.kill or Kill("")
        is_killer = rank == (kill.victim or 0)  # rank 0 kills where all are killed
        self._moment, self._step = (kill.moment, kill.step) if is_killer else ("", 0)
        self._alone = kill.victim is not None
        self._save_after = kill.after
        self._built = False
        self._outside = source.OutsideAccess()
        self._modules = {*sys.modules}
        self._since = time.monotonic()
        multiprocessing.util.register_after_fork(self, Recorder._watch_worker)

    def write(self, event: str, **facts: Any) -> None:
        """Write a line; the system has it when this returns."""
        os.write(self._record, json.dumps({"event": event, **facts}, default=str).encode() + b"\n")

    def die(self, moment: str, step: int) -> None:
        """Kill or stop the whole process group, or this process alone, if this is the moment."""
        if moment == self._moment and step >= self._step:
            self._moment = ""
            self.write("killed", moment=moment, step=step)
            number = signal.SIGTERM if moment in STOPS else signal.SIGKILL
            if self._alone:
                signal.raise_signal(number)
            else:
                os.killpg(0, number)

    def kills_save(self, step: int) -> bool:
        """Whether the process is to die while this step is written."""
        return self._moment == "save" and step >= self._step

    def on_instance(self, key: str, instance: Any) -> None:
        if key in ("model", "task") or key.startswith(("data.", "callbacks.")):
            self._objects[key] = instance
            self.write("instances", memory=memory({key: instance}), sources={key: source.sources(instance)})

    def on_error(self, error: Exception) -> None:
        if not self._built:
            self.write("refused", memory=memory(self._objects))

    def on_build(self, setup: TrainingSetup) -> None:
        self._built = True
        instances = parts_of("optimizer", setup.state.optimizer) | parts_of("scheduler", setup.state.scheduler)
        self._objects |= instances
        self.write("instances", memory={}, sources={name: source.sources(each) for name, each in instances.items()})
        stream = setup.state.stream
        plan = stream.plan if isinstance(stream, MapStyleStream) else None
        limits = [limit for limit in (setup.max_steps, self._request.steps) if limit is not None]
        setup.max_steps = min(limits, default=None)
        unlimited, setup.max_seconds = setup.max_seconds, None  # runs that the clock ends differ in their last step
        # A user's writer would log every attempt of the proof somewhere outside.
        setup.writers = {
            name: node for name, node in setup.writers.items() if str(node.get("_target_")).startswith(_WRITERS)
        }
        for name in [name for name in setup.callbacks if name.startswith("observer.")]:
            del setup.callbacks[name]
        evaluate, more = setup.callbacks.get("evaluate"), None
        if isinstance(evaluate, Evaluate):
            more = self._set_interval(evaluate)
            for data in evaluate.evaluator.validation.values():
                data.batch_listeners = [*data.batch_listeners, self._on_evaluation_batch]
        setup.store.location = cast("Location", _HalvingLocation(setup.store.location, self))
        epoch = None if plan is None else plan.steps_of(1)
        self.write("built", epoch=epoch, unlimited=unlimited is not None, evaluated_every=more)

    def _set_interval(self, evaluate: Evaluate) -> int | None:
        """Evaluate as often as requested; returns the number of steps if that is more often than configured."""
        every = self._request.evaluations
        if "evaluation" in self._request.pins:  # only the last evaluation stays
            evaluate.interval = Interval()
            evaluate.evaluator.check_batches = 0
        elif every is not None and (evaluate.interval.steps or every + 1) > every:
            evaluate.interval.steps = every
            return every
        return None

    def on_resume(self, state: TrainState) -> None:
        step = state.progress.step
        self.write("resumed", step=step, **self._fingerprints(state))
        self._put(state, of_data=True)
        self.die("loaded", 0)
        self.die("start", step)
        if self._moment == "clock":
            threading.Timer(self._step / 1000, self.die, ("clock", self._step)).start()

    def on_start(self, loop: Loop) -> None:
        self._put(loop.state, of_data=False)
        if loop.evaluation is not None:
            self.write("evaluated", step=loop.step, evaluation=loop.evaluation, **self._fingerprints(loop.state))

    def on_step_start(self, loop: Loop) -> None:
        controls.advance()
        if "gc" in self._request.pins:
            gc.collect()
        self._line = {"generators": fingerprint({"generators": Generators().state_dict()})}
        self._since = time.monotonic()

    def _on_evaluation_batch(self, number: int) -> None:
        self.die("evaluating", self._line.get("step", 0))

    def on_batch(self, loop: Loop, number: int, batch: Any) -> None:
        self.die("stop", loop.step + 1)
        digests = {f"{number}{path}": of_value(value) for path, value in leaves(batch)}
        self._line["batch"] = self._line.get("batch", {}) | digests

    def on_gradients(self, state: TrainState) -> None:
        gradients = {name: p.grad for name, p in state.model.named_parameters() if p.grad is not None}
        self._line["gradients"] = {name: of_value(gradient) for name, gradient in gradients.items()}

    def on_update(self, loop: Loop) -> None:
        loop.elapsed += controls.step_seconds  # as the user's clocks, which are ahead, show it
        self._line |= {
            "step": loop.step,
            "took": time.monotonic() - self._since,
            "epochs": loop.epochs,
            "samples": {"samples": str(loop.state.stream.ledger_line(loop.step))},
            "rate": {"rate": loop.rate},
            "metrics": {name: float(value) for name, value in loop.metrics.items()},
        }
        if self._request.seconds is not None and loop.elapsed > self._request.seconds:
            loop.stop = "max_steps"

    def on_evaluation(self, loop: Loop) -> None:
        self.die("evaluation", self._line.get("step", 0))

    def on_step(self, loop: Loop) -> None:
        # Once in every step: a user's state_dict may change something.
        state = None if loop.evaluation_due or self._request.silent else loop.state.state_dict()
        digests = {"due": True} if loop.evaluation_due else self._digests(state)
        self.write("step", **self._line, evaluation=loop.evaluation or {}, **digests)
        if state and loop.step == self._request.take:
            suspects.take(self._request.suspects, self._objects, state["model"], self._request.copies(self._rank))
        self.die("step", loop.step)
        if loop.step == self._save_after:
            self.die("clock", self._step)  # if the clock has not come first
            loop.save = True

    def on_commit(self, step: int) -> None:
        self.write("committed", step=step)
        self.die("committed", step)

    def on_finish(self, directory: RunDirectory, result: Mapping[str, Any]) -> None:
        if self._rank == 0:
            libraries = [name for name in sys.modules if name not in self._modules and _is_library(name)]
            facts = {"private": private(self._objects), "reached": self._outside.lasting(), "callers": controls.callers}
            self.write("finished", **collect(directory), **facts, modules=libraries)

    def _watch_worker(self) -> None:
        """In a data worker: record its memory when it ends, which is in no other process."""
        data = {key: value for key, value in self._objects.items() if key.startswith("data.")}
        before = memory(data)

        def write() -> None:
            self.write("worker", changes=[*unequal(before, memory(data))], reached=self._outside.reached)

        multiprocessing.util.Finalize(None, write, exitpriority=0)

    def _fingerprints(self, state: TrainState) -> dict[str, Any]:
        return self._digests(None if self._request.silent else state.state_dict())

    def _digests(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """A state, and the memory of the objects beside it; nothing for None."""
        if state is None:
            return {}
        return {"state": fingerprint(state), "memory": memory(self._objects, state["model"]) | suspects.settings()}

    def _put(self, state: TrainState, *, of_data: bool) -> None:
        """Put memory of an undisturbed process into this one. Data sets get theirs before their first sample."""
        paths = [path for path in self._request.suspects if path.startswith("data.") == of_data]
        if self._request.put and paths:
            copies = replace(self._request, file=self._request.put).copies(self._rank)
            self.write("put", paths=suspects.put(paths, self._objects, state.state_dict()["model"], copies))


class _HalvingLocation:
    """A location of checkpoints where a kill in a save leaves half of an object's first piece."""

    def __init__(self, location: Location, recorder: Recorder) -> None:
        self._location = location
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._location, name)

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        """``Location.put``."""
        folder, _, entry = name.rpartition("/")
        commit = parse_data(entry) if folder == "data" else parse_commit(entry)
        step = commit.step if commit else 0
        return self._location.put(name, self._half(chunks, step) if self._recorder.kills_save(step) else chunks)

    def _half(self, chunks: Iterable[Buffer], step: int) -> Iterator[Buffer]:
        """Half of the first chunk; then the process dies."""
        for chunk in chunks:
            yield bytes(chunk)[: len(bytes(chunk)) // 2]
            self._recorder.die("save", step)


def collect(directory: RunDirectory) -> dict[str, Any]:
    """Checkpoints by step and their largest size in bytes, metric lines, result and audit of a finished run."""
    store = CheckpointStore(directory.location)
    checkpoints, size = {}, 0
    for commit in reversed(store.commits()):
        try:
            checkpoint = store.open(commit)
            checkpoints[str(commit.step)] = fingerprint({part: checkpoint.load(part) for part in checkpoint.parts})
            size = max(size, sum(file.size for file in checkpoint.files.values()))
        except Damaged as error:
            checkpoints[str(commit.step)] = {"damaged": str(error)}
    return {
        "url": directory.location.url,
        "checkpoints": checkpoints,
        "size": size,
        "lines": [
            {tag: value for tag, value in line.items() if not tag.startswith("time/")}
            for line in lines.read(directory.location)
        ],
        "result": {key: value for key, value in (RunFacts(directory).result or {}).items() if key != "seconds"},
        "audit": audit(directory),
    }


def _is_library(name: str) -> bool:
    """Whether a module is in an installed package."""
    return "site-packages" in (getattr(sys.modules[name], "__file__", None) or "")
