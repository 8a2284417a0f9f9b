"""TensorBoard event files: one continuous curve over any number of attempts."""

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes scalars and texts from step ``purge_step`` on; what older attempts wrote there is taken back."""

    def __init__(self, folder: str, *, purge_step: int, attempt: int) -> None:
        self._writer = SummaryWriter(folder, purge_step=purge_step, filename_suffix=f".a{attempt:06d}")

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        """Numbers become curves, strings become texts."""
        for tag, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(tag, f"```\n{value}\n```", step)
            else:
                self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Everything so far survives the death of this process."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
