"""TensorBoard event files: one continuous curve over any number of attempts."""

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from runner.storage.location import Folder

_FULL = 4 << 20  # bytes after which a new file is begun, because each sync uploads a file as a whole
_SCALAR = 64  # approximate bytes of a point


class Curves:
    """Writes scalars and texts from ``purge_step`` on, and makes TensorBoard hide what older attempts wrote there."""

    def __init__(self, folder: Folder, *, purge_step: int, attempt: int) -> None:
        self._folder = folder
        self._suffix = f".a{attempt:06d}"
        self._files = self._size = 0
        self._writer = self._begin(purge_step)

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        """Numbers become curves, strings become texts."""
        for tag, value in values.items():
            self._size += _SCALAR + (len(value) if isinstance(value, str) else 0)
            if isinstance(value, str):
                self._writer.add_text(tag, f"```\n{value}\n```", step)
            else:
                self._writer.add_scalar(tag, value, step)

    def mark(self) -> None:
        """Begin a new file if this one is full."""
        if self._size > _FULL:
            self._writer.close()
            self._writer = self._begin(None)

    def flush(self) -> None:
        """Make everything so far durable. One thread may call this while another calls ``add``."""
        self._writer.flush()
        self._folder.sync()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
        self._folder.sync()
        self._folder.close()

    def _begin(self, purge_step: int | None) -> SummaryWriter:
        self._files, self._size = self._files + 1, 0
        return SummaryWriter(
            self._folder.path, purge_step=purge_step, filename_suffix=f"{self._suffix}.{self._files:04d}"
        )
