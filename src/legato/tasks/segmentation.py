"""Semantic segmentation: a class for each pixel of an image."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from legato.losses import DiceLoss, SmoothedCrossentropy
from legato.metrics import MeanIoU, PerClassIoU
from legato.task import Task
from legato.tasks.pictures import enlarged, painted


class SemanticSegmentationTask(Task):
    """A U-Net, trained on cross-entropy and overlap, measured by IoU.

    (O. Ronneberger et al., "U-Net: Convolutional Networks for Biomedical
    Image Segmentation", 2015, arXiv:1505.04597; here with padding and batch
    normalisation.)

    Batches are `(images, labels)`: numbers from 0 to 255 `[batch, height,
    width, channels]`, and class indices `[batch, height, width]`. Give them as
    the config's `data`, or define `build_inputs`. Height and width must be
    multiples of 2 to the power of `len(filters) - 1`.

    Args:
        class_names: of the classes, in the order of their indices.
        ignore_label: pixels with this label count nowhere; None: all count.
        channels: of the images.
        filters: of the convolutions at each resolution; each is half of that
            before.
        dice_weight: how much the Dice loss counts beside the cross-entropy.
        learning_rate: of Adam, at first.
        decay_steps: after so many steps the learning rate has fallen to 0, as
            a cosine does: usually the length of the run.
        shown: how many images of validation are drawn in its summaries.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        ignore_label: int | None = 255,
        channels: int = 3,
        filters: Sequence[int] = (8, 24, 48, 96),
        dice_weight: float = 1.0,
        learning_rate: float = 3e-3,
        decay_steps: int = 2400,
        shown: int = 4,
    ) -> None:
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.ignore_label = ignore_label
        self.channels = channels
        self.filters = list(filters)
        self.learning_rate = learning_rate
        self.decay_steps = decay_steps
        self.shown = shown
        self.dice_weight = dice_weight
        self.cross_entropy = SmoothedCrossentropy(
            label_smoothing=0.0, ignore_class=ignore_label
        )
        self.dice = DiceLoss(smooth=0.0, ignore_label=ignore_label)

    def build_model(self) -> keras.Model:
        """Images of any size to logits `[batch, height, width, classes]`."""
        images = keras.Input((None, None, self.channels))
        x = layers.Rescaling(1 / 127.5, offset=-1.0)(images)
        *finer, coarsest = self.filters
        skips = []
        for filters in finer:
            x = _convolutions(x, filters)
            skips.append(x)
            x = layers.MaxPooling2D()(x)
        x = _convolutions(x, coarsest)
        for filters, skip in zip(reversed(finer), reversed(skips), strict=True):
            x = layers.UpSampling2D()(x)
            x = layers.Concatenate()([x, skip])
            x = _convolutions(x, filters)
        logits = layers.Conv2D(self.num_classes, 1, name="logits")(x)
        return keras.Model(images, logits)

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        """Adam, whose learning rate falls as a cosine."""
        rate: Any = keras.optimizers.schedules.CosineDecay(
            self.learning_rate, self.decay_steps
        )
        return keras.optimizers.Adam(rate)

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> dict[str, Any]:
        """Cross-entropy and Dice's overlap, of the pixels that count."""
        cross_entropy = self.cross_entropy(labels, model_outputs)
        dice = self.dice(labels, model_outputs)
        loss = cross_entropy + self.dice_weight * dice + sum(aux_losses or [])
        return {self.loss: loss, "cross_entropy": cross_entropy, "dice": dice}

    def build_metrics(self, training: bool) -> Sequence[keras.metrics.Metric]:
        """The mean IoU, and in validation that of each class."""
        mean = MeanIoU(self.num_classes, ignore_label=self.ignore_label)
        if training:
            return [mean]
        each = PerClassIoU(
            self.num_classes,
            ignore_label=self.ignore_label,
            class_names=self.class_names,
        )
        return [mean, each]

    def validation_step(
        self, inputs: Any, model: Any, metrics: Any = None
    ) -> dict[str, Any]:
        """Losses and metrics, and a few predictions to be drawn."""
        images, labels = inputs
        logits = self.inference_step(images, model)
        losses = self.build_losses(labels, logits, model.losses)
        self.process_metrics(metrics, labels, logits)
        predicted = ops.argmax(logits[: self.shown], axis=-1)
        drawn = (images[: self.shown], labels[: self.shown], predicted)
        return {**losses, "drawn": drawn}

    def aggregate_logs(self, state: Any, step_logs: dict[str, Any]) -> Any:
        """Keeps the first batch's predictions."""
        return state or step_logs["drawn"]

    def reduce_aggregated_logs(
        self, aggregated_logs: Any, global_step: int
    ) -> dict[str, Any]:
        """Pictures for summaries: image, labels and prediction in a row."""
        if not self.shown:
            return {}
        images, labels, predicted = aggregated_logs
        labels = labels.reshape(predicted.shape)
        ignored = labels == self.ignore_label
        rows = [
            enlarged(images),
            enlarged(painted(labels, ignored)),
            enlarged(painted(predicted, ignored)),
        ]
        return {"predictions": np.concatenate(rows, axis=2)}


def _convolutions(x: Any, filters: int) -> Any:
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    return x
