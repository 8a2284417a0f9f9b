"""One label out of several."""

from torch import Tensor, nn
from torch.nn import functional as F

from runner.task import Task


class Classification(Task):
    """Batches are ``(inputs, labels)``, labels integers [B]; the model returns logits [B, classes]."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def training_step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        return {"loss": F.cross_entropy(model(inputs), labels, label_smoothing=self.label_smoothing)}

    def evaluation_step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = model(inputs)
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(-1) == labels).float().mean()}
