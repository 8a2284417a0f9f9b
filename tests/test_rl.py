"""Post-training on what a model generates: what is computed, and that it resumes to the bit."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import Crews
from lives import Lives
from marks import quick_first, slow
from mine.rewards import now_and_then, spread
from results import results
from safetensors.torch import load_file
from torch import nn

from runner.data.ledger import LedgerLine, parse_rollouts, rollouts_text
from runner.datasets.arithmetic import Arithmetic
from runner.errors import ConfigError, StateError
from runner.models.gpt import GPT
from runner.rl.buffer import Buffer
from runner.rl.completion import Completion
from runner.rl.generation import Decoder, Sampling, _draw, generate, token_logprobs
from runner.rl.grpo import GRPO, ClippedLoss, Group, Rows
from runner.rl.rewards import Answer
from runner.runs.__main__ import main
from runner.runs.audit import account
from runner.task import Rollouts
from runner.update import WeightUpdate

USER = Path(__file__).parent / "user"
SMALL = (
    "experiment=arithmetic_grpo",
    "model.layers=1",
    "model.heads=2",
    "model.width=32",
    "data.batch_size=8",
    "data.validation.size=24",
    "task.reward._target_=mine.rewards.spread",
    "+task.reward._partial_=true",
    "task.samples=4",
    "task.together=2",
    "task.max_tokens=4",
    "task.keep_unended=true",
    "task.kl_target=0.01",
    "trainer.max_steps=12",
    "trainer.evaluate_every_steps=4",
    "checkpoint.every_steps=2",
    "metrics.every_steps=2",
    "runtime.num_threads=1",
)
WAYS = {
    "plain": ("task.top_p=0.9", "trainer.accumulate=2"),
    "surplus": ("task.reward._target_=mine.rewards.now_and_then", "task.groups=5", "task.max_age=2"),
    "stale": ("task.staleness=1", "task.kl=0.1"),
}


def model(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(block_size=16, layers=2, heads=2, width=32, **options).eval()


def task(**options: Any) -> GRPO:
    defaults = {"seed": 3, "reward": spread, "max_tokens": 5, "samples": 4, "keep_unended": True, "kl": 0.0}
    return GRPO(**defaults | options)


def prompts(count: int) -> list[tuple[int, str, str]]:
    data = Arithmetic(split="train", size=100)
    return [(position, *data[position].values()) for position in range(count)]


@pytest.mark.parametrize("together", [slow(1), 4])
def test_a_rollout_does_not_depend_on_the_split(together: int) -> None:
    """The same bits in one micro-batch, in several, in another order."""
    drawing, network, every = task(together=together), model(), prompts(12)
    whole = {group.position: group for group in drawing._draw(every, nullcontext, 0, network)}
    assert len({group.digest() for group in whole.values()}) == 12
    for pieces in ([every[4:8], every[:4], every[8:]], [every[8:], every[:8]]):
        for piece in pieces:
            for group in drawing._draw(piece, nullcontext, 0, network):
                assert group.digest() == whole[group.position].digest()
                assert group.logprobs.equal(whole[group.position].logprobs)


def test_blocks_that_a_micro_batch_cuts_are_refused() -> None:
    with pytest.raises(ConfigError, match="only 1 of these prompts, at positions 4 to 4"):
        task(together=4)._draw(prompts(5), nullcontext, 0, model())


def test_samples_differ_by_position_number_and_seed() -> None:
    same = [(position, "1+1=", "2") for position in range(3)]
    groups = task()._draw(same, nullcontext, 0, model()) + task(seed=4)._draw(same, nullcontext, 0, model())
    rows = {tuple(row) for group in groups for row in group.tokens.tolist()}
    assert len(rows) == 6 * 4


class Output:
    def __init__(self, logits: torch.Tensor, past_key_values: Any) -> None:
        self.logits = logits
        self.past_key_values = past_key_values


class HuggingFace(nn.Module):
    """The interface of a causal language model of Hugging Face, over a GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> Output:
        cache = past_key_values or []
        return Output(self.inner(input_ids, cache=cache if use_cache else None), cache)


class Plain(HuggingFace):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.inner(tokens)


@pytest.mark.parametrize("kind", [model, HuggingFace, Plain])
def test_a_cache_gives_the_logits_of_the_whole_text(kind: Any) -> None:
    network, decode = kind(), Decoder(kind())
    text = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        last = [decode(text[:, :4]), *(decode(text[:, n : n + 1]) for n in range(4, 9))]
        output = network(text)
    logits = getattr(output, "logits", output)
    torch.testing.assert_close(torch.stack(last, 1), logits[:, 3:], rtol=1e-5, atol=1e-5)


def test_the_log_probabilities_are_those_of_training() -> None:
    text = torch.tensor([list(b"1+2=")]).repeat(5, 1)
    drawn = generate(model(), text, range(5), Sampling(6, 10, temperature=0.7))
    again, _ = token_logprobs(model(), torch.cat([text, drawn.tokens], 1), 0.7)
    torch.testing.assert_close(drawn.logprobs, again[:, 3:] * (drawn.logprobs != 0), rtol=1e-4, atol=1e-5)


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    """Equidistant noise instead of random noise: exact shares."""
    probabilities, noise = torch.tensor([0.1, 0.4, 0.2, 0.3]), (torch.arange(1000) + 0.5).double() / 1000
    rows = probabilities.log().expand(1000, 4)
    assert _draw(rows, noise, 1.0).bincount(minlength=4).tolist() == [100, 400, 200, 300]
    shares = _draw(rows, noise, 0.6).bincount(minlength=4).tolist()  # 0.4 and 0.3 are kept
    assert shares == pytest.approx([0, 4000 / 7, 0, 3000 / 7], abs=1)


def test_the_stop_token_ends_a_completion() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # row 0 stops after two tokens
            logits = torch.zeros(*tokens.shape, 256)
            logits[:, -1, 65] = 1.0
            logits[0, -1, 10] = 2.0 * (tokens.shape[1] > 4)
            return logits

    drawn = generate(Stops(), torch.zeros(2, 3).long(), [0, 0], Sampling(4, 10, temperature=0.0))
    assert drawn.lengths.tolist() == [3, 4]
    assert drawn.tokens.tolist() == [[65, 65, 10, 10], [65, 65, 65, 65]]
    assert drawn.logprobs[0, 3] == 0


def test_the_splits_of_arithmetic_share_no_problem() -> None:
    train, validation = (Arithmetic(split=split, size=3000, largest=30) for split in ("train", "validation"))
    mine, held_out = ({each[n]["prompt"] for n in range(3000)} for each in (train, validation))
    assert not mine & held_out
    assert len(mine) + len(held_out) <= 900
    assert 50 < len(held_out) < 150
    problem = Arithmetic(split="train", size=1, terms=4, operators="+-*", largest=20)[0]
    assert eval(problem["prompt"][:-1]) == int(problem["answer"])
    turned = Arithmetic(split="train", size=1, terms=4, operators="+-*", largest=20, reverse=True)[0]
    assert turned == {"prompt": problem["prompt"], "answer": problem["answer"][::-1]}


def test_a_split_without_a_problem_is_refused() -> None:
    """Not waited for without an end."""
    with pytest.raises(ConfigError, match="none of 2000 problems belongs to the validation split"):
        Arithmetic(split="validation", size=1, largest=1, held_out=2)[0]


def test_an_answer_is_rewarded() -> None:
    reward = Answer(correct=1.0, format=0.1)
    assert reward("1+1=", "2\n", "2") == (1.1, True)
    assert reward("1+1=", "3\n", "2") == (0.1, False)
    assert reward("1+1=", "2", "2") == reward("1+1=", "two\n", "2") == (0.0, False)


def group(position: int, step: int, version: int, rewards: list[float]) -> Group:
    tokens = torch.full((len(rewards), 1 + position % 3), 10)
    lengths = torch.ones(len(rewards), dtype=torch.long)
    numbers = torch.tensor(rewards, dtype=torch.float64)
    return Group(position, step, version, torch.arange(position + 1), tokens, tokens * -0.1, lengths, numbers, 0)


def test_a_buffer_is_a_queue_that_is_saved() -> None:
    buffer: Buffer[Group] = Buffer(Group)
    buffer.extend([group(n, 1, n, [0.0, n]) for n in range(5)])
    assert [each.position for each in buffer.remove(lambda each: each.version == 1)] == [1]
    other: Buffer[Group] = Buffer(Group)
    other.load_state_dict(buffer.state_dict())
    assert [each.digest() for each in other] == [each.digest() for each in buffer]
    assert [each.prompt.tolist() for each in other] == [each.prompt.tolist() for each in buffer]
    assert [each.position for each in other.take(2)] == [0, 2]
    assert len(other) == 2
    other.take(9)
    empty: Buffer[Group] = Buffer(Group)
    empty.load_state_dict(other.state_dict())
    assert len(empty) == 0


def test_the_objective_is_that_of_the_papers() -> None:
    now, old, reference = (torch.tensor([[math.log(p), -1.0]]) for p in (0.3, 0.2, 0.25))
    entropy, mask = torch.tensor([[0.5, 9.0]]), torch.tensor([[1.0, 0.0]])
    for advantage, surrogate in ((2.0, min(1.5 * 2, 1.28 * 2)), (-2.0, min(1.5 * -2, 1.28 * -2))):
        rows = Rows(torch.zeros(1, 3), mask, old, torch.tensor([advantage]), reference)
        values = ClippedLoss(clip=0.2, clip_high=0.28, entropy=0.01)(now, entropy, rows, 0.1)
        kl = 0.25 / 0.3 - math.log(0.25 / 0.3) - 1
        assert values["kl"].item() == pytest.approx(kl, 1e-4)
        assert values["loss"].item() == pytest.approx(-surrogate + 0.1 * kl - 0.01 * 0.5)
        assert values["clip_fraction"].item() == (advantage > 0)
    assert group(0, 1, 1, [0.0, 1.0, 1.0]).advantages(scale=False).tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert group(0, 1, 1, [0.0, 1.0]).advantages(scale=True).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], 1e-5)


def stepped(training: GRPO, network: nn.Module, pieces: list[list[tuple[int, str, str]]]) -> dict[str, torch.Tensor]:
    """One step over these micro-batches."""
    positions: list[range] = []
    update = WeightUpdate(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1),
        device=torch.device("cpu"),
        positions=lambda: positions[-1],
    )

    def batches() -> Any:
        for piece in pieces:
            positions.append(range(piece[0][0], piece[-1][0] + 1))
            yield 1 / len(pieces), {"prompt": [text for _, text, _ in piece], "answer": [a for *_, a in piece]}

    return training.optimization_step(network, batches(), update)


def test_micro_batches_make_the_update_of_the_whole_batch() -> None:
    weights = []
    for cuts in ([8], [4, 4], [2, 2, 2, 2]):
        network, every, first = model(), prompts(8), 0
        pieces = [every[(first := first + cut) - cut : first] for cut in cuts]
        training = task(iterations=3, entropy=0.01)
        metrics = stepped(training, network, pieces)
        weights.append(network.blocks[0].attention.project.weight.detach().clone())
        assert training.rollouts is not None
        assert [*training.rollouts.trained] == [*range(8)]
        assert metrics["tokens"] > 0
    assert not weights[0].equal(model().blocks[0].attention.project.weight)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)


def test_surplus_groups_wait_and_too_few_make_no_update() -> None:
    training, network = task(reward=now_and_then, groups=9, max_age=1), model()
    trained, dropped, before = [], [], [weight.clone() for weight in network.parameters()]
    for step in range(5):
        metrics = stepped(training, network, [[(n, *rest) for n, (_, *rest) in enumerate(prompts(8), 8 * step)]])
        assert training.rollouts is not None
        trained.append([*training.rollouts.trained])
        dropped += training.rollouts.dropped
        if step == 0:
            assert metrics["loss"] == 0
            assert all(map(torch.equal, before, network.parameters()))
    assert {len(each) for each in trained} == {0, 9}
    waiting = [each.position for each in training.waiting]
    assert sorted([*dropped, *waiting, *(n for each in trained for n in each)]) == [*range(40)]


def test_stale_rollouts_are_drawn_by_earlier_weights() -> None:
    """Those of a step are trained in the next, and are the same as if they were drawn before it."""
    stale, network, early = task(staleness=1), model(), model()
    first = stepped(stale, network, [prompts(4)])
    assert first["loss"] == 0
    assert stale.rollouts is not None
    assert not stale.rollouts.trained
    expected = task()._draw(prompts(4), nullcontext, 0, early)
    assert [each.digest() for each in stale.waiting] == [each.digest() for each in expected]
    early.load_state_dict(network.state_dict())
    stepped(stale, network, [[(n + 4, *rest) for n, *rest in prompts(4)]])
    assert [*stale.rollouts.trained] == [0, 1, 2, 3]
    expected = task()._draw([(n + 4, *rest) for n, *rest in prompts(4)], nullcontext, 0, early)
    assert [each.digest() for each in stale.waiting] == [each.digest() for each in expected]
    assert {each.version for each in stale.waiting} == {0}


@pytest.mark.filterwarnings("ignore")  # of the library
def test_a_model_of_hugging_face_is_a_policy() -> None:
    """The most probable completion is that of its own ``generate``, and a step trains it."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = library.GPT2Config(vocab_size=256, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    network = library.GPT2LMHeadModel(config).eval()
    text = torch.tensor([list(b"1+2=")])
    drawn = generate(network, text, [0], Sampling(6, 10, temperature=0.0))
    own = network.generate(text, max_new_tokens=6, do_sample=False, eos_token_id=10, pad_token_id=10)
    assert drawn.tokens.tolist() == own[:, 4:].tolist()
    before = network.transformer.wte.weight.clone()
    assert stepped(task(), network, [prompts(4)])["tokens"] > 0
    assert not network.transformer.wte.weight.equal(before)


@pytest.mark.parametrize("value", ["free", -1])
def test_free_running_generation_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="depend on the speed of machines"):
        task(staleness=value)


def test_the_coefficient_of_the_divergence_adapts_and_is_saved() -> None:
    training, network = task(kl=0.1, kl_target=1e6), model()
    training.reference = model().requires_grad_(False)
    stepped(training, network, [prompts(4)])
    assert training.kl == pytest.approx(0.1 * 0.98)
    other = task(kl=0.1, kl_target=1e6)
    other.reference = training.reference
    other.load_state_dict(training.state_dict())
    assert other.kl == training.kl
    other = task(kl=0.1)
    other.reference = nn.Linear(2, 2)
    with pytest.raises(StateError, match="its parent's weights have changed"):
        other.load_state_dict(training.state_dict())


def test_supervised_fine_tuning_trains_the_answer() -> None:
    training, network = Completion(reward=Answer(), max_tokens=4, show=["1+1=", "10+10="]), model()
    batch = {"prompt": ["1+1=", "10+1="], "answer": ["2", "11"]}
    logprobs = [
        token_logprobs(network, torch.tensor([list(f"{p}{a}\n".encode())]))[0][0, -len(a) - 1 :]
        for p, a in zip(*batch.values(), strict=True)
    ]
    loss = training.training_step(network, batch)["loss"]
    torch.testing.assert_close(loss, -torch.cat(logprobs).mean())
    metrics = training.evaluation_step(network, batch)
    assert {*metrics} == {"loss", "reward", "pass_at_1", "length"}
    report = training.evaluation_end(network, {"reward": 0.0})
    assert str(report["samples"]).startswith("1+1='")


def ledger(run: Path) -> dict[int, str]:
    """The last line of each step."""
    lines = [line for path in sorted((run / "ledger").glob("s*.txt")) for line in path.read_text().splitlines()[1:]]
    return {int(line.split()[0]): line for line in lines}


@pytest.mark.parametrize("way", quick_first(WAYS, "surplus"))
def test_a_killed_run_is_the_undisturbed_run(way: str, life: Lives, tmp_path: Path) -> None:
    command = (*SMALL, *WAYS[way], f"run.root={tmp_path}")
    assert (whole := life(*command, "run.name=whole", cwd=USER)).status == 0, whole.output
    for step in (3, 4, 7):
        assert life(*command, "run.name=cut", cwd=USER, step=step).status is None
    assert (ended := life(*command, "run.name=cut", cwd=USER)).status == 0, ended.output
    cut, undisturbed = (tmp_path / "arithmetic_grpo" / name for name in ("cut", "whole"))
    assert not results(cut).differences(results(undisturbed))
    assert ledger(cut) == ledger(undisturbed)
    assert len({line.partition("rollouts=")[2][:16] for line in ledger(cut).values()}) == 12


def test_a_first_step_without_an_update_is_no_warning(life: Lives, tmp_path: Path) -> None:
    ended = life(*SMALL, "task.groups=1000", "trainer.max_steps=2", f"run.root={tmp_path}", cwd=USER)
    assert (ended.status, "Warning" in ended.output) == (0, False), ended.output


def test_the_reference_is_the_parent_and_no_checkpoint_has_it(life: Lives, tmp_path: Path) -> None:
    root = f"run.root={tmp_path}"
    same = [each for each in SMALL if not each.startswith(("task.", "~task.", "+task.", "experiment=", "trainer."))]
    sft = life(
        "experiment=arithmetic_sft", *same, "trainer.max_steps=4", "task.max_tokens=4", root, "run.name=sft", cwd=USER
    )
    assert sft.status == 0, sft.output
    command = (*SMALL, f"run.parent={tmp_path}/arithmetic_sft/sft", root, "run.name=rl")
    assert life(*command, cwd=USER, step=5).status is None
    assert (ended := life(*command, cwd=USER)).status == 0, ended.output
    saved = results(tmp_path / "arithmetic_grpo/rl")
    assert main(["export", f"{tmp_path}/arithmetic_sft/sft", str(tmp_path / "parent.safetensors")]) == 0
    parent = GPT(block_size=16, layers=1, heads=2, width=32)
    parent.load_state_dict(load_file(tmp_path / "parent.safetensors"), strict=False)
    training = task()
    training.reference = parent
    assert saved.parts["task"]["reference"] == training.state_dict()["reference"]
    assert not [name for name in saved.tensors if "reference" in name]


def test_processes_share_the_work_and_draw_the_same(life: Lives, crew: Crews, tmp_path: Path) -> None:
    command = (*SMALL, "runtime.timeout=20", f"run.root={tmp_path}")
    assert life(*command, "run.name=one", cwd=USER).status == 0
    for name, kill in (("two", {}), ("cut", {"to": [1], "step": 5}), ("cut", {})):
        ended = crew(2, *command, f"run.name={name}", "checkpoint.every_steps=1", cwd=USER, **kill)
        assert kill or not any(ended.statuses), ended.output
    one, two, cut = (tmp_path / "arithmetic_grpo" / name for name in ("one", "two", "cut"))
    assert ledger(one)[1] == ledger(two)[1]
    assert not results(two).differences(results(cut))
    assert ledger(two) == ledger(cut)


def line(step: int, *, trained: list[int] = [], dropped: list[int] = [], times: int = 2) -> LedgerLine:  # noqa: B006
    """A step of four samples."""
    rollouts = rollouts_text(Rollouts(7 * step, trained, times, dropped))
    return LedgerLine(step, 4 * step - 4, 4 * step - 1, step, rollouts=rollouts)


def test_rollouts_are_accounted_for() -> None:
    lines = [line(1, trained=[0, 2, 3], dropped=[1]), line(2), line(3, trained=[4, 6, 7, 8], dropped=[5])]
    assert account(lines) == ({"trained": 7, "dropped": 2, "waiting": 3, "times": [2]}, [])
    assert account([LedgerLine(1, 0, 3, 5)]) == (None, [])
    _, problems = account([line(1, trained=[0, 1, 2]), line(2, trained=[2, 5, 9], dropped=[5])])
    assert problems == [
        "positions 9 to 9 were trained in step 2, before they were drawn",
        "positions 2 to 2: trained in step 1, trained in step 2",
        "positions 5 to 5: dropped in step 2, trained in step 2",
    ]


def test_a_line_with_rollouts_is_read_again() -> None:
    text = rollouts_text(Rollouts(2**64 - 1, [9, 0, 1, 2], 3, [5]))
    assert text == " rollouts=ffffffffffffffff trained=0-2,9-9x3 dropped=5-5"
    assert parse_rollouts(text) == ("ffffffffffffffff", [(0, 2), (9, 9)], 3, [(5, 5)])
    for wrong in (" rollouts=12 trained=x1 dropped=", " rollouts=ffffffffffffffff trained=1x1 dropped="):
        with pytest.raises(ValueError, match="not the rollouts of a step"):
            parse_rollouts(wrong)


def test_two_runs_part_where_their_rollouts_do(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (*SMALL, "trainer.max_steps=4", f"run.root={tmp_path}")
    for name, more in (("a", ()), ("b", ("task.iterations=2",)), ("c", ("optimizer.lr=0.01",))):
        assert life(*command, *more, f"run.name={name}", cwd=USER).status == 0
    a, b, c = (str(tmp_path / "arithmetic_grpo" / name) for name in "abc")
    assert main(["diff", "--ledger", a, b]) == 0
    assert "All 4 steps that both runs have" in capsys.readouterr().out
    assert main(["diff", "--ledger", a, c]) == 1
    assert "step 2 is the first that differs: the same samples" in capsys.readouterr().out
    assert main(["audit", a, "--jsonl", str(tmp_path / "a.jsonl")]) == 0
    assert "each 2 times" in capsys.readouterr().out
    steps = [json.loads(text) for text in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert len({index for step in steps for index in step["indices"]}) == 32
    assert {(step["times"], len(step["rollouts"])) for step in steps} == {(2, 16)}
