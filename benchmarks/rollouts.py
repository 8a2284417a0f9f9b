"""What the runner costs reinforcement learning: ``experiment=arithmetic_grpo`` against a plain loop with the same
model, the same generation and as many updates, in tokens per second. Each step draws 512 completions and makes 2
updates with all of them, against a reference; one thread.

Both sides live at the same time and take turns, as in ``benchmarks.loop``. A figure is the median over turns of the CPU
time of the training thread for a token, start-up and warm-up left out; quartiles are of the ratios of turns.

    python -m benchmarks.rollouts                      # from the root of the repository; a minute
"""

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median, quantiles
from typing import Any

from benchmarks.gate import BARE, NEVER, Gate, endless
from benchmarks.loop import Side, train_with_runner
from runner import app

WARM_UP = 3  # steps
OVERRIDES = (
    "experiment=arithmetic_grpo",
    "task.keep_equal=true",  # without a parent all rewards are 0: train every sample all the same
    "task.keep_unended=true",
    "runtime.device=cpu",
    "runtime.num_threads=1",
    "runtime.audit=false",
    f"trainer.max_steps={NEVER}",
    f"trainer.evaluate_every_steps={NEVER}",
    "checkpoint.every=null",
    "metrics.every_steps=10",
)


class Counted:
    """``runner.rl.generation.generate``, with a count of the tokens."""

    tokens = 0

    def __call__(self, *arguments: Any) -> Any:
        from runner.rl.generation import generate

        completions = generate(*arguments)
        self.tokens += int(completions.lengths.sum())
        return completions

    def since(self) -> int:
        """The tokens since the last call."""
        tokens, self.tokens = self.tokens, 0
        return tokens


def blocks(batch: Any, together: int) -> Iterator[tuple[list[str], list[str]]]:
    """Prompts of one length, and their answers."""
    for first in range(0, len(batch["prompt"]), together):
        rows = range(first, first + together)
        for length in sorted({len(batch["prompt"][row]) for row in rows}):
            chosen = [row for row in rows if len(batch["prompt"][row]) == length]
            yield [batch["prompt"][row] for row in chosen], [batch["answer"][row] for row in chosen]


def drawn(model: Any, batch: Any, task: Any, generate: Counted) -> tuple[list[Any], list[Any], list[float]]:
    """Of each sample the text, the log-probabilities of what was written, and the advantage."""
    import torch

    texts: list[Any] = []
    old: list[Any] = []
    advantages: list[float] = []
    for prompts, answers in blocks(batch, task.together):
        tokens = torch.tensor([[*prompt.encode()] for prompt in prompts]).repeat_interleave(task.samples, 0)
        keys = torch.randint(2**62, (len(tokens),)).tolist()
        completions = generate(model, tokens, keys, task.sampling)
        rewards = [
            task.reward(prompts[row // task.samples], text, answers[row // task.samples])[0]
            for row, text in enumerate(task.texts(completions))
        ]
        groups = torch.tensor(rewards).view(-1, task.samples)
        centred = groups - groups.mean(1, keepdim=True)
        advantages += (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten().tolist()
        for row, length in enumerate(completions.lengths.tolist()):
            texts.append(torch.cat([tokens[row], completions.tokens[row, :length]]))
            old.append(completions.logprobs[row, :length])
    return texts, old, advantages


def padded(texts: list[Any], parts: list[Any]) -> tuple[Any, Any, Any]:
    """Tokens [B, T]; of what was written the log-probabilities then, and a mask, [B, T - 1]."""
    import torch

    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    old = torch.zeros(len(tokens), tokens.shape[1] - 1)
    mask = torch.zeros_like(old)
    for row, (text, part) in enumerate(zip(texts, parts, strict=True)):
        old[row, len(text) - 1 - len(part) : len(text) - 1] = part
        mask[row, len(text) - 1 - len(part) : len(text) - 1] = 1
    return tokens, old, mask


def train_bare(config: Any, gate: Gate, generate: Counted) -> None:
    """The loop that people write. It draws each sample with a key, and groups of one length together."""
    import torch
    from hydra.utils import instantiate
    from torch import nn
    from torch.utils.data import DataLoader
    from torch.utils.tensorboard import SummaryWriter

    from runner.rl.generation import token_logprobs

    torch.set_num_threads(config.runtime.num_threads)
    torch.manual_seed(config.seed)
    task = instantiate(config.task)
    loader = DataLoader(instantiate(config.data.train), config.data.batch_size, shuffle=True, drop_last=True)
    model: nn.Module = instantiate(config.model)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = instantiate(config.optimizer, _partial_=True)(model.parameters())
    scheduler = instantiate(config.scheduler, _partial_=True)(optimizer)
    writer = SummaryWriter(f"{config.run.root}/tensorboard")

    for step, batch in enumerate(endless(loader), 1):
        model.eval()
        texts, parts, advantages = drawn(model, batch, task, generate)
        model.train()
        tokens, old, mask = padded(texts, parts)
        advantage = torch.tensor(advantages)[:, None]
        with torch.no_grad():
            base = token_logprobs(reference, tokens, task.sampling.temperature)[0]
        for _ in range(task.iterations):
            logprobs, entropy = token_logprobs(model, tokens, task.sampling.temperature)
            ratio = (logprobs - old).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            kl = (base - logprobs).exp() - (base - logprobs) - 1
            loss = ((task.kl * kl - surrogate) * mask).sum() / mask.sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.trainer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        if step % config.metrics.every_steps == 0:
            values = {
                "loss": loss,
                "kl": (kl * mask).sum() / mask.sum(),
                "entropy": (entropy * mask).sum() / mask.sum(),
            }
            for name, value in values.items():
                writer.add_scalar(f"train/{name}", value.item(), step)
        if not gate.passed():
            return


def child(side: str, folder: str) -> None:
    """One side, in this process."""
    from hydra import compose, initialize_config_dir

    from runner.rl import grpo

    overrides = [*OVERRIDES, f"run.root={folder}"]
    app.register()
    with initialize_config_dir(str(app.CONFIGS.absolute()), version_base="1.3"):
        config = compose("config", overrides)
    generate = Counted()
    gate = Gate(WARM_UP, time.thread_time, generate.since)
    if side == BARE:
        train_bare(config, gate, generate)
    else:
        setattr(grpo, "generate", generate)  # noqa: B010
        train_with_runner(config, overrides, gate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30, help="steps of each side")
    parser.add_argument("case", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
        return
    times: dict[str, list[float]] = {BARE: [], "runner": []}
    with ExitStack() as stack:
        sides = {side: Side("grpo", side, stack, module="rollouts") for side in times}
        for turn in range(arguments.turns):
            for side in [*sides] if turn % 2 else [*sides][::-1]:
                times[side].append(sides[side].milliseconds(1))
    bare, ours = times.values()
    low, _, high = quantiles(sorted(b / o for b, o in zip(bare, ours, strict=True)), n=4)
    for side, each in times.items():
        print(f"{side:7} {1e3 / median(each):6.0f} tokens per second of CPU")
    print(f"ratio   {median(bare) / median(ours):.3f} (quartiles {low:.3f} .. {high:.3f})")


if __name__ == "__main__":
    main()
