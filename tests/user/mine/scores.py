"""Metrics that are no means."""

import torch
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

from runner.tasks.classification import Classification


class Scores(Classification):
    """F1 of all samples, from rows and by torchmetrics; and numbers that tell the order of rows and batches."""

    def __init__(self) -> None:
        super().__init__()
        self.f1 = MulticlassF1Score(3)

    def evaluation_step(self, model, batch):
        inputs, labels = batch
        chosen = model(inputs).argmax(1)
        self.f1.update(chosen, labels)
        rows = {"inputs": inputs, "chosen": chosen, "labels": labels, "batch": torch.tensor([len(labels)])}
        return {**super().evaluation_step(model, batch), **rows}

    def evaluation_end(self, model, metrics):
        inputs, chosen, labels, sizes = (metrics.pop(name) for name in ("inputs", "chosen", "labels", "batch"))
        hits = [((chosen == k) & (labels == k)).sum() for k in range(3)]
        shares = [2 * hit / ((chosen == k).sum() + (labels == k).sum()) for k, hit in enumerate(hits)]
        order = (inputs.double().sum(1) * torch.arange(len(inputs))).sum()
        report = {**metrics, "f1": sum(shares) / 3, "theirs": self.f1.compute(), "order": order}
        self.f1.reset()
        return {**report, "samples": len(labels), "sizes": sizes.sum(), "last": sizes[-1]}


class Kept(Scores):
    """Does not reset its metric."""

    def evaluation_end(self, model, metrics):
        return {"loss": metrics["loss"], "theirs": self.f1.compute()}


class Ragged(Scores):
    """Rows whose shape depends on the batch."""

    def evaluation_step(self, model, batch):
        return {"rows": torch.zeros(len(batch[1]), len(batch[1]))}


class Raw(Scores):
    """Reports the rows themselves."""

    def evaluation_end(self, model, metrics):
        return metrics


class Ranked(Classification):
    """The area under the curve, for which torchmetrics keeps lists of floats and of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.area = MulticlassAUROC(3, thresholds=None)

    def evaluation_step(self, model, batch):
        inputs, labels = batch
        self.area.update(model(inputs).softmax(1), labels)
        return super().evaluation_step(model, batch)

    def evaluation_end(self, model, metrics):
        report = {**metrics, "area": self.area.compute()}
        self.area.reset()
        return report
