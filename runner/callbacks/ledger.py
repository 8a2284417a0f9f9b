"""Records which samples every step was trained on, and compares them with those of earlier attempts."""

from runner.callbacks.base import Callback, Loop
from runner.data.ledger import Ledger


class KeepLedger(Callback):
    """Runs first, so that a repeated step with other samples than before is not reported, evaluated or committed."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_start(self, loop: Loop) -> None:
        self.ledger.open(loop.step)

    def on_step(self, loop: Loop) -> None:
        self.ledger.add(loop.state.stream.line(loop.step))

    def on_end(self, loop: Loop) -> None:
        self.ledger.close()
