"""``python -m runner.verify`` on real processes: exact resumes pass, and what users really get wrong is named."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import servers
from judge import USER, Judge, node, variant
from marks import slow
from test_verify_corpus import broken
from waiting import until

from runner.errors import ConfigError, DataError, StateError, StorageError, kind_of
from runner.verify import assert_resumes
from runner.verify.campaign import plan_kills, run_killed
from runner.verify.causes import of_error
from runner.verify.difference import first_difference, lost_memory
from runner.verify.execution import AttemptRequest, AttemptTrace, Executor, Kill, RunTrace, fork_servers
from runner.verify.options import Options, parse
from runner.verify.page import page


@pytest.mark.slow
def test_metric_writers_of_the_user_are_not_opened(judge: Judge, scratch: Path) -> None:
    verdict = judge("+metrics.writers.mine={_target_: mine.writers.refused, token: x}", kills=1)
    assert verdict.holds, verdict.text()


def test_a_correct_experiment_passes_and_leaves_nothing(judge: Judge, scratch: Path) -> None:
    verdict = judge(steps=16, kills=8)
    proven = verdict.proven
    assert verdict.holds, verdict.text()
    assert {"step", "committed", "save", "loaded", "evaluation", "stop", "evaluating"} == proven["moments"].keys()
    assert (proven["kills"], proven["attempts"], proven["steps"], proven["samples"]) == (8, 9, 16, 256)
    assert proven["workers"] == [0, 2]
    assert proven["checkpoints"] > 3
    assert proven["steps_done_again"] > 0
    assert [*scratch.iterdir()] == []


@pytest.mark.campaign
@pytest.mark.parametrize("processes", [1, 2])
def test_stops_by_sigterm_pass(processes: int, judge: Judge, scratch: Path) -> None:
    """Also of an evaluation that moves the model, and of callbacks that look at evaluations."""
    odd = ("task._target_=mine.tasks.Wakes", "+task.call=-1", "model._target_=mine.odd.Normed")
    odd = (*odd, "+callbacks.weight._target_=mine.broken.Weighs", "data.evaluation_batch_size=8")
    options = {"moments": ("stop", "evaluating"), "workers": (0,), "processes": processes}
    verdict = judge(*(odd if processes == 1 else ()), kills=4, **options)
    assert verdict.holds, verdict.text()
    assert verdict.proven["moments"] == {"stop": 2, "evaluating": 2}


def test_forgotten_state_without_effect_is_noted(judge: Judge, scratch: Path) -> None:
    verdict = judge(*variant(node("task", "mine.broken.Waits"), mended=False), steps=6, kills=1)
    assert verdict.holds, verdict.text()
    assert "without effect within these steps: task.seen was " in verdict.text()


def trained(memories: Sequence[set[str]]) -> RunTrace:
    """A run of as many steps, with the paths that are remembered after each."""
    begun = {"event": "resumed", "step": 0, "memory": {}}
    step = {"event": "step", "evaluation": {}, "took": 0.01}
    steps = [
        step | {"step": n, "epochs": n // 7, "memory": dict.fromkeys(names, "")} for n, names in enumerate(memories, 1)
    ]
    finished = {"event": "finished", "result": {"reason": "max_steps"}, "size": 0}
    ended = [{"event": "built", "epoch": 7}, finished]
    request = AttemptRequest("undisturbed", (), "record")
    return RunTrace("undisturbed", [AttemptTrace(request, 0, 0, (begun, *steps, *ended))])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("steps", "kills"), [(14, 3), (100, 8)])
def test_every_memory_is_lost_in_a_kill(steps: int, kills: int, seed: int) -> None:
    """Memory that comes late, that comes and goes, and that nobody sees."""
    late, shown = steps * 9 // 10, {"task.shown", "task.shows", "task.shines"}
    memories = [
        {*({"task.late"} if n >= late else ()), *(shown if n % 2 else {"task.even"})} for n in range(1, steps + 1)
    ]
    planned = plan_kills(trained(memories), Options(steps=steps, kills=kills, seed=seed)).kills
    lost = [kill.after for kill in planned if kill.after]
    assert len(planned) == kills
    assert {name for after in lost for name in memories[after - 1]} >= {"task.late", "task.shown", "task.even"}
    assert [period for period in range(2, 9) if all(after % period == 0 for after in lost)] == []


@pytest.mark.parametrize(("steps", "kills"), [(2, 1), (2, 9), (5, 30), (33, 2)])
def test_kills_are_within_the_run(steps: int, kills: int) -> None:
    planned = plan_kills(trained([set()] * steps), Options(steps=steps, kills=kills)).kills
    assert len(planned) == kills
    assert all(1 <= kill.after <= steps for kill in planned if kill.after)
    assert all(kill.after < steps and kill.step <= steps for kill in planned if kill.after and kill.moment != "clock")


@pytest.mark.parametrize("kind", ["step", "resumed"])
def test_files_of_the_end_are_not_the_difference(kind: str) -> None:
    """A run that went past the step at which the other ended has more in its window of metrics there, and no
    evaluation.
    """
    undisturbed, killed = trained([set()] * 10), trained([set()] * 11)
    undisturbed.attempts[0].events[10].update(state={"callback.report/window": {}}, evaluation={"valid/loss": 1.0})
    passed = {**killed.attempts[0].events[10], "event": kind, "state": {"callback.report/window/loss": [1.0]}}
    killed.attempts.insert(0, replace(killed.attempts[0], events=(passed,)))
    difference = first_difference(killed, undisturbed)
    assert difference
    assert (difference.step, difference.part, difference.expected, difference.actual) == (11, "end", 10, 11)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StateError("cannot save task/seen: it is a builtins.set"), "state"),
        (StateError("the task does not fit", kind="restore"), "restoring"),
        (DataError("sample 3 changed", kind="sample-changed"), "data memory"),
        (pickle.loads(pickle.dumps(DataError("sent by a process", kind="sample-per-process"))), "workers"),
        (RuntimeError("put_ does not have a deterministic implementation"), "kernel"),
        (RuntimeError("anything else"), "error"),
    ],
    ids=str,
)
def test_the_kind_of_an_error_names_its_cause(error: Exception, kind: str) -> None:
    assert of_error(kind_of(error), "").kind == kind


@pytest.mark.parametrize(("pin", "read"), [("time", "time.time_ns()"), ("entropy", "os.urandom(4)")])
def test_pinned_draws_do_not_depend_on_other_observers(pin: str, read: str) -> None:
    code = f"""if True:
        import sys
        from runner.verify import controls
        def reader(name):
            space = {{"__name__": name}}
            exec("import os, time\\ndef read(): return {read}", space)
            return space["read"]
        mine, library = reader("mine"), reader("library")
        controls.pin("{pin}")
        first = mine()
        if "beside" in sys.argv:
            library()
        print(first, mine())
    """
    outputs = [
        subprocess.run([sys.executable, "-c", code, *more], check=True, stdout=subprocess.PIPE, timeout=300).stdout
        for more in ([], ["beside"])
    ]
    assert outputs[0] == outputs[1]
    first, second = outputs[0].split(b" ", 1)
    assert first != second.strip()


def test_shifted_clocks_are_those_of_the_users_code() -> None:
    code = f"""if True:
        import datetime, pickle, sys, time
        from datetime import date, datetime as early
        from types import ModuleType
        import numpy, pandas
        from runner.verify import controls
        read = '''if True:
            import datetime, numpy, pandas, time
            second = numpy.timedelta64(1, "s")
            ahead = [time.time() - now(), time.time_ns() / 1e9 - now(), early.now().timestamp() - now()]
            ahead += [time.mktime(time.localtime()) - now(), time.mktime(time.strptime(time.ctime())) - now()]
            ahead += [datetime.datetime.utcnow().replace(tzinfo=datetime.timezone.utc).timestamp() - now()]
            ahead += [time.mktime(time.strptime(time.strftime("%c"))) - now(), time.time() - now()]
            ahead += [24 * 3600 * (early.today().date() - today()).days, datetime.datetime.today().timestamp() - now()]
            ahead += [(numpy.datetime64("now") - numpy.datetime64(int(now()), "s")) / second]
            ahead += [(numpy.datetime64("today") - numpy.datetime64(today())) / second]
            ahead += [pandas.Timestamp.now().timestamp() - now(), pandas.Timestamp("now", tz="UTC").timestamp() - now()]
            assert isinstance(numpy.zeros(1, numpy.datetime64)[0], numpy.datetime64)
            print([round(float(each) / 1e6, 2) for each in ahead])
        '''
        now, today = time.time, date.today
        controls.pin(ahead={10**7})
        shifted = time.time
        assert now is not shifted and time.gmtime(0).tm_year == 1970 and time.strftime("%Y", time.gmtime(0)) == "1970"
        names = {{"now": now, "early": early, "today": lambda: date.fromtimestamp(now())}}
        sys.modules["mine"], sys.modules["signs"] = ModuleType("mine"), ModuleType("signs")
        sys.modules["mine"].__file__, sys.modules["signs"].__file__ = "/user.py", "/lib/site-packages/signs.py"
        exec(compile(read, "user.py", "exec"), names | {{"__name__": "mine"}})
        exec(compile(read, "/lib/site-packages/signs.py", "exec"), names | {{"__name__": "signs"}})
        exec(compile(read, "user.py", "exec"), names | {{"__name__": "runner.run"}})
        assert pickle.loads(pickle.dumps(early(2020, 1, 1))) == early(2020, 1, 1)
    """
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, timeout=300, text=True)
    users, library, runners = map(json.loads, output.stdout.splitlines())
    assert all(abs(each - 10) < 0.1 for each in users), users
    assert [*library, *runners] == [0] * 2 * len(users)


def test_a_shifted_clock_goes_on_and_reaches_spawned_processes(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        """if True:
        import datetime, queue, threading, time

        def read():
            return [time.time(), datetime.datetime.now().timestamp(), time.monotonic()]

        def ahead(before, after):
            return [round((b - a) / 1e6) for a, b in zip(before, after)]

        def send(pipe):
            pipe.send(read())
        """
    )
    code = """if True:
        import multiprocessing, queue, threading, user
        from runner.verify import controls
        if __name__ == "__main__":
            begun = user.read()
            controls.pin(ahead=10**7)
            controls.advance(10**6)
            inside, beside = user.read(), queue.Queue()
            thread = threading.Thread(target=lambda: beside.put(user.read()))
            thread.start()
            thread.join()
            near, far = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=user.send, args=(far,))
            process.start()
            print(*(user.ahead(begun, each) for each in (inside, beside.get(), near.recv())), sep="\\n")
            process.join()
    """.replace("\\\\", "\\")
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300, text=True, cwd=tmp_path)
    assert [*map(json.loads, output.stdout.splitlines())] == [[11, 11, 1], [10, 10, 0], [10, 10, 0]]


def test_a_late_attempt_has_the_clock_of_others() -> None:
    code = """if True:
        import sys, time
        from types import ModuleType
        from runner.verify import controls
        now, monotonic = time.time, time.monotonic
        sys.modules["mine"] = ModuleType("mine")
        sys.modules["mine"].__file__ = "/user.py"
        controls.pin(late=1000)
        controls.advance(10**6)
        names = {"__name__": "mine", "time": time, "now": now, "monotonic": monotonic}
        read = "print(round(time.time() - now()), round(time.monotonic() - monotonic()))"
        exec(compile(read, "user.py", "exec"), names)
        print(controls.callers)
    """
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, timeout=300, text=True)
    assert output.stdout.splitlines() == ["-1000 0", "[]"]


def test_a_run_of_several_processes_passes(judge: Judge, scratch: Path) -> None:
    verdict = judge(steps=12, kills=3, processes=2, workers=(0,))
    proven = verdict.proven
    assert verdict.holds, verdict.text()
    assert (proven["processes"], proven["kills"], proven["kills_of_one_process"]) == (2, 3, 1)
    assert "3 kills (1 of one process alone), 2 processes, 12 steps" in verdict.text()
    event = next(event for _, event in verdict.killed.steps() if "cut" not in event)
    for field in ("batch", "generators", "gradients", "others"):  # fields that each rank has for itself
        assert any(path.endswith(" (rank 1)") for path in event[field]), field
    assert [*scratch.iterdir()] == []


def test_processes_that_cannot_share_a_batch_are_refused(judge: Judge, scratch: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size"):
        judge(processes=3)
    assert [*scratch.iterdir()] == []


@pytest.mark.campaign
def test_a_broken_experiment_of_several_processes_is_named(judge: Judge, scratch: Path) -> None:
    verdict = judge(*broken("a task without a state"), processes=2)
    assert verdict.cause, verdict.text()
    assert verdict.cause.kind == "task memory", "\n".join([verdict.text(), *verdict.tried])
    assert "task.seen was " in verdict.text()


@pytest.mark.campaign
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_every_layout_of_several_processes_resumes(layout: str, judge: Judge, scratch: Path) -> None:
    options = Options(steps=6, kills=2, workers=(0,), processes=2)
    command = ["experiment=gpt", "model.layers=1", "model.dropout=0.1", f"runtime.parallel={layout}"]
    verdict = judge.of(command, options)
    assert verdict.holds, verdict.text()


@pytest.mark.slow
def test_nothing_is_proven_by_a_run_that_somebody_else_killed(judge: Judge, scratch: Path) -> None:
    stops = "+task={_target_:mine.tasks.Stops,during:training,call:3,number:9}"
    verdict = judge("~task", stops)
    assert not verdict.holds
    assert "a run did not come to its end" in verdict.text()
    assert verdict.cause
    assert verdict.cause.kind == "incomplete"


def test_a_process_that_ends_itself_was_killed_by_nobody(judge: Judge, scratch: Path) -> None:
    verdict = judge("~task", "+task={_target_:mine.tasks.Leaves,status:0}", kills=1)
    assert not verdict.holds
    assert "os._exit(0) was called in the run, by " in verdict.text()


@pytest.mark.campaign
def test_an_attempt_that_hangs_is_ended_and_named(judge: Judge, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.verify.proof.LEAST_SECONDS", 5)
    monkeypatch.setattr("runner.verify.proof.TIMES", 3)
    overrides = node("task", "mine.broken.Locks")
    verdict = judge(*variant(overrides, mended=False), kills=1, moments=("step",), workers=(2,))
    text = verdict.text()
    assert not verdict.holds
    assert re.search(r"attempt killed-2 did not end within \d+ s", text), text
    assert re.search(r"the main thread is at \S*mine/broken.py:\d+ in training_step", text), text
    assert re.search(r"process \d+, the main thread is at ", text), text
    assert verdict.cause
    assert verdict.cause.kind == "hang"
    verdict = judge(*variant(overrides, mended=True), kills=1, moments=("step",), workers=(0,))
    assert verdict.holds, verdict.text()


def test_it_leaves_nothing_that_the_experiment_leaves(judge: Judge, scratch: Path) -> None:
    """Neither temporary files, nor processes in sessions of their own, nor folders for the root."""
    verdict = judge("~task", "+task={_target_:mine.broken.Litters}", kills=1, root=f"{scratch}/new/root")
    assert verdict.holds, verdict.text()
    assert [*scratch.iterdir()] == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(scratch) not in running


def test_kills_for_which_no_time_is_left_are_left_out() -> None:
    """Of 60 seconds, where the undisturbed run and each attempt take ten."""
    undisturbed = replace(trained([set()] * 30).attempts[0], seconds=10)
    planned = plan_kills(RunTrace("undisturbed", [undisturbed]), Options(steps=30))
    left = iter(range(50, -1, -10))

    def attempt(run: RunTrace, *overrides: str, kill: Kill | None, **fields: object) -> AttemptTrace:
        ended = {"event": "killed", "moment": "step"} if kill else {"event": "finished"}
        request = replace(undisturbed.request, kill=kill)
        run.attempts.append(replace(undisturbed, request=request, status=None if kill else 0, events=(ended,)))
        return run.attempts[-1]

    executor = SimpleNamespace(attempt=attempt, seconds_left=lambda: next(left))
    run = run_killed(executor, planned, undisturbed, print)  # type: ignore[arg-type]
    assert [each.killed for each in run.attempts] == ["step"] * 4 + [None]


@pytest.mark.parametrize("ended", ["killed", slow("undisturbed")])
def test_the_proof_ends_when_its_time_is_over(
    ended: str, judge: Judge, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a run of that name: before the search for the cause, or before the first kill."""

    def left(executor: Executor) -> float:
        finished = [name for name in executor.requests if name == ended and "again" not in name]
        return 0 if finished and '"event": "finished"' in executor.requests[ended].record().read_text() else math.inf

    monkeypatch.setattr(Executor, "seconds_left", left)
    verdict = judge(*broken("a curriculum in the data set"), kills=1)
    assert not verdict.holds
    assert verdict.cause
    if ended == "killed":
        assert (verdict.cause.kind, verdict.cause.sure) == ("data memory", False)
        assert "the search for the cause was cut short by verify.minutes" in verdict.text()
    else:
        assert verdict.cause.kind == "incomplete"
        assert "verify.minutes ended before the killed run did" in verdict.text()


def test_a_configuration_error_comes_before_anything_heavy(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(USER)
    code = """if True:
        import sys
        from runner.errors import ConfigError
        from runner.verify import assert_resumes
        try:
            assert_resumes("--config-dir", "conf", "experiment=broken", sys.argv[1])
        except ConfigError as error:
            print("torch" in sys.modules, error)
    """
    for wrong, message in (
        ("trainer.max_step=3", "Could not override 'trainer.max_step'"),
        ("run.name=a/b", "run.name"),
    ):
        done = subprocess.run([sys.executable, "-c", code, wrong], check=True, stdout=subprocess.PIPE, text=True)
        assert done.stdout.startswith("False "), done.stdout
        assert message in done.stdout
    assert [*scratch.iterdir()] == []


@pytest.mark.campaign
def test_the_fixture_shares_its_servers(scratch: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_mine.py"
    test.write_text(
        """
import os
from pathlib import Path

import pytest

seen = set()

@pytest.mark.parametrize("number", [1, 2])
def test_resumes(number, assert_resumes):
    assert_resumes("--config-dir", "conf", "experiment=broken", steps=4, kills=1, workers=[0])
    seen.add(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
    assert [len(each.split()) for each in seen] == [2]

def test_fails(assert_resumes):
    with pytest.raises(AssertionError, match="(?s)does not resume exactly.*os.getpid"):
        assert_resumes("--config-dir", "conf", "experiment=broken", "~task",
                       "+task={_target_:mine.culprits.Pids,mended:false}", steps=4, kills=1, workers=[0])
"""
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # in place of the options of this repository
    options = ("-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"))
    command = [sys.executable, "-m", "pytest", *options, str(test)]
    plugins = {entry.value for entry in entry_points(group="pytest11")}
    command += [] if "pytest_hydra_runner" in plugins else ["-p", "pytest_hydra_runner"]
    done = subprocess.run(command, cwd=USER, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, "3 passed" in done.stdout) == (0, True), done.stdout
    (kept,) = scratch.iterdir()  # of the proof that failed
    assert [*kept.glob("*.jsonl")]


def test_a_users_own_runner_is_named_by_the_fixture_alone(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text("raise SystemExit('not this')\n")
    test = "def test_other(): ...\ndef test_resumes(assert_resumes): ...\n"
    (tmp_path / "test_mine.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # As an entry point that is installed: in a process of its own, with no other plugin.
    options = ("-q", "-p", "no:cacheprovider", "-p", "pytest_hydra_runner")
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "pytest", *options, "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert "1 passed, 1 error" in done.stdout
    assert f"{tmp_path}/runner.py hides the package runner of hydra-runner: rename it" in done.stdout


def test_lost_memory_is_noted_without_caches_and_private_names() -> None:
    undisturbed = trained([{"task.seen", "data.train.cache[3]", "model._hooks[0].__self__._is_root"}] * 3)
    for event in undisturbed.attempts[0].select("step"):
        event["memory"]["data.train.drawn"] = "48"  # a count, unlike a cache, may matter later
    resumed = {"event": "resumed", "step": 1, "memory": {}}
    private = {"event": "finished", "private": ["model._hooks[0].__self__._is_root"]}
    (attempt,) = undisturbed.attempts
    undisturbed.attempts = [replace(attempt, events=(*attempt.events, private))]
    run = RunTrace("killed", [replace(attempt, events=(resumed,))])
    lost = {("task.seen", "", None), ("data.train.drawn", "48", None)}
    assert {*lost_memory(run, undisturbed)} == lost
    attempt.select("built")[0]["epoch"] = None  # an iterable is loaded with its first sample
    assert {*lost_memory(run, undisturbed)} == {("task.seen", "", None)}


def test_a_limit_by_the_clock_is_left_out_and_the_page_is_whole(judge: Judge, scratch: Path) -> None:
    verdict = judge("trainer.max_seconds=0.001", steps=6, kills=1)
    assert "note     trainer.max_seconds was left out" in verdict.text()
    assert verdict.proven["steps"] == 6
    shown = page(replace(verdict, command=["<script>"]))
    assert shown.count("<polyline") == 2
    assert "http" not in shown.replace("http-equiv", "")
    assert "<script" not in shown
    assert "<dt>note</dt><dd>trainer.max_seconds was left out" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("verify.step=3", "there is no option verify.step; did you mean verify.steps?"),
        ("verify.steps=many", "verify.steps=many cannot be used"),
        ("verify.steps=1", "at least 2"),
        ("verify.workers=[0,-1]", "numbers of data workers"),
        ("verify.workers=2", "numbers of data workers"),
        ("verify.keep=yes?", "verify.keep=true"),
        ("verify.kills", "verify.kills needs a value"),
        ("verify.minutes=0", "verify.minutes=2 (more than 0)"),
        ("verify.moments=[step,stops]", "verify.moments=[step,stop]; there are committed, save"),
        ("verify.processes=0", "verify.processes=2 (at least 1)"),
        ("run.root=here", "verify.root"),
        ("runtime.num_workers=2", "verify.workers"),
        ("-m", "one run"),
    ],
)
def test_a_mistyped_option_is_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(["experiment=smoke", option])


def test_options_are_taken_out_of_the_command() -> None:
    options, command, as_json = parse(
        ["experiment=smoke", "verify.workers=[0,3]", "--json", "seed=1", "verify.kills=2"]
    )
    assert (options, command, as_json) == (Options(workers=(0, 3), kills=2), ["experiment=smoke", "seed=1"], True)


def verify(*arguments: str, cwd: Path = USER) -> subprocess.Popen[str]:
    """The command, as a user gives it, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "runner.verify", *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.campaign
def test_the_command_has_statuses_and_json(scratch: Path) -> None:
    common = ("--config-dir", "conf", "experiment=broken", "verify.steps=10", "verify.kills=2", "--json")
    output, _ = verify(*common).communicate()
    assert json.loads(output)["verdict"] == "PASS"
    failing = verify(*common, *broken("a kernel without an order"))
    output, _ = failing.communicate()
    assert (failing.returncode, json.loads(output)["cause"]["kind"]) == (1, "kernel")


def test_a_command_that_cannot_run_is_a_configuration_error(judge: Judge, scratch: Path) -> None:
    with pytest.raises(ConfigError, match=r"Could not override 'trainer\.max_step'"):
        judge("trainer.max_step=3")
    assert [*scratch.iterdir()] == []


def test_a_root_where_no_run_can_be_is_an_error_of_the_storage(judge: Judge, scratch: Path) -> None:
    with pytest.raises(StorageError, match="/proc/nowhere"):
        judge(root="/proc/nowhere")
    assert [*scratch.iterdir()] == []


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(
    judge: Judge, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(StorageError, match=r"0.0 GB free, and the proof needs .* verify.root="):
        judge(steps=2)
    assert [*scratch.iterdir()] == []


def test_interrupted_it_leaves_neither_processes_nor_files(scratch: Path) -> None:
    process = verify("--config-dir", "conf", "experiment=broken", "verify.steps=10000")
    until(lambda: [*scratch.rglob("*.jsonl")], process=process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, "nothing is left behind" in errors) == (130, True), errors
    assert [*scratch.glob("runner-verify-*")] == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(scratch) not in running


@pytest.mark.campaign
def test_the_helper_fails_with_the_report(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(USER)
    common = ("--config-dir", "conf", "experiment=broken")
    assert_resumes(*common, steps=10, kills=2, workers=[0])
    with pytest.raises(AssertionError, match=r"(?s)does not resume exactly.*FAIL.*task\.seen"):
        assert_resumes(*common, *broken("a task without a state"), steps=10, kills=2, workers=[0])


@pytest.mark.campaign
def test_it_proves_on_s3_and_leaves_nothing_there(
    s3: servers.Server, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.options["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.options["client_kwargs"]["endpoint_url"])
    with fork_servers(USER) as forks:
        judge = Judge(forks)
        verdict = judge(root=f"{s3.url}/proofs")
        assert verdict.holds, verdict.text()
        url = (verdict.undisturbed.evidence or {})["url"]
        assert url.startswith("s3://bucket/proofs/verify-")
        failed = judge(*broken("hash()"), root=f"{s3.url}/failed")
    system = fsspec.filesystem("s3", **s3.options, skip_instance_cache=True)
    assert [name for name in system.find("bucket/proofs") if "verify-" in name] == []  # the server keeps the folder
    assert failed.cause
    assert failed.cause.kind == "hash"
    assert system.find("bucket/failed")
    assert f"{s3.url}/failed" in failed.text()


@pytest.mark.campaign
@pytest.mark.parametrize("experiment", ["smoke", "digits", "gpt", "fashion_mnist"])
def test_the_experiments_of_this_repository_resume(experiment: str, judge: Judge, scratch: Path) -> None:
    if experiment == "fashion_mnist" and not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("dataset-fashion-mnist is not installed, which .ci/run does")
    verdict = judge.of([f"experiment={experiment}"], Options())
    assert verdict.holds, verdict.text()
