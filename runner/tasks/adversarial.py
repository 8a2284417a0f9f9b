"""Two networks that train against each other, each by its own optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from runner.task import Metrics, Task, Update


class Adversarial(Task):
    """Batches are images, or tuples with images first; for models as ``runner.models.gan.GAN``. The losses are
    logistic, the generator's is the one that does not saturate (Goodfellow et al. 2014).

    Evaluation reports the energy distance (Székely and Rizzo 2013) of generated and real images, which is 0 for equal
    distributions.
    """

    def training_step(self, model: Any, batch: Any) -> Metrics:
        images = _images(batch)
        return {"loss": softplus(-model(model.sample(len(images), images), "discriminator")).mean()}

    def optimization_step(
        self, model: nn.Module, micro_batches: Iterable[tuple[float, Any]], update: Update
    ) -> Metrics:
        batches, total = [*micro_batches], dict[str, Tensor]()
        for name, losses in (("discriminator", self.discriminator_loss), ("generator", self.training_step)):
            metric = "loss" if name == "generator" else f"loss_{name}"
            for share, batch in batches:
                with update.autocast():
                    loss = losses(model, batch)["loss"] * share
                update[name].backward(loss)
                total[metric] = total.get(metric, torch.zeros_like(loss.detach())) + loss.detach()
            total.update(update[name].step(total[metric]))
        return total

    def discriminator_loss(self, model: Any, batch: Any) -> Metrics:
        """Low where real images get high logits, and generated ones low logits."""
        images = _images(batch)
        with torch.no_grad():
            generated = model.sample(len(images), images)
        real, fake = model(images, "discriminator"), model(generated, "discriminator")
        return {"loss": softplus(-real).mean() + softplus(fake).mean()}

    def evaluation_step(self, model: Any, batch: Any) -> Metrics:
        images = _images(batch)
        generated = model.sample(len(images), images).flatten(1).float()
        real = images.flatten(1).float()
        between, within = torch.cdist(real, generated).mean(), (torch.cdist(x, x).mean() for x in (real, generated))
        return {**self.training_step(model, batch), "distance": 2 * between - sum(within)}


def _images(batch: Any) -> Tensor:
    images: Tensor = batch[0] if isinstance(batch, tuple | list) else batch
    return images
