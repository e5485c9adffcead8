"""Image classification: one class for each image."""

import importlib
from collections.abc import Sequence
from typing import Any, cast

import keras
import numpy as np
from keras import layers, ops

from legato.errors import ConfigError
from legato.losses import SmoothedCrossentropy
from legato.task import Task
from legato.tasks.pictures import confusions


class ImageClassificationTask(Task):
    """Any network for images, with augmentation, mixup and smoothed labels.

    Batches are `(images, labels)`: numbers `[batch, height, width, channels]`,
    and class indices `[batch]`. Give them as the config's `data`, or define
    `build_inputs`. What augments single examples on the host is the data's
    `transform`; what augments batches on the device is `build_augmentation`.

    Args:
        class_names: of the classes, in the order of their indices.
        image_shape: height, width and channels of the images.
        network: what makes logits of images: "small", a few convolutions of
            our own; the name of a network of `keras.applications`, such as
            "MobileNetV3Small", without pretrained weights; or
            "package.module:function", called with `image_shape` and the
            number of classes, which returns a `keras.Model`.
        scale: images are multiplied by this first. The networks of
            `keras.applications` want what their documentation says: many
            numbers from 0 to 255.
        translation: images are moved by at most this share of their size in
            training.
        rotation: and turned by at most this share of a full turn.
        zoom: and made larger or smaller by at most this share.
        flip: and mirrored, half of them.
        fill: what is beyond the edges of a moved image: "reflect", "constant"
            (0), "nearest" or "wrap".
        mixup: images are blended in pairs, with shares from a symmetric Beta
            distribution of this parameter; 0 for not at all.
        label_smoothing: the share of a label that is spread over all classes.
        dropout: before the last layer of the small network.
        top_k: also measure whether the label is among the so many best.
        weight_decay: of AdamW.
        learning_rate: of AdamW, at first.
        decay_steps: after so many steps the learning rate has fallen to 0, as
            a cosine does: usually the length of the run.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        network: str = "small",
        scale: float = 1 / 255,
        translation: float = 0.1,
        rotation: float = 0.03,
        zoom: float = 0.1,
        flip: bool = False,
        fill: str = "reflect",
        mixup: float = 0.0,
        label_smoothing: float = 0.1,
        dropout: float = 0.2,
        top_k: int | None = None,
        weight_decay: float = 1e-3,
        learning_rate: float = 3e-3,
        decay_steps: int = 2000,
    ) -> None:
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.image_shape = tuple(image_shape)
        self.network = network
        self.scale = scale
        self.translation = translation
        self.rotation = rotation
        self.zoom = zoom
        self.flip = flip
        self.fill = fill
        # (A layer that is made before a run sets its seed needs its own.)
        self.mix_up = layers.MixUp(mixup, seed=0) if mixup else None
        self.dropout = dropout
        self.top_k = top_k
        self.weight_decay = weight_decay
        self.learning_rate = learning_rate
        self.decay_steps = decay_steps
        self.cross_entropy = SmoothedCrossentropy(label_smoothing)

    def build_model(self) -> keras.Model:
        """Images to logits, `[batch, classes]`."""
        images = keras.Input(self.image_shape)
        x = layers.Rescaling(self.scale)(images)
        for layer in self.build_augmentation():
            x = layer(x)
        return keras.Model(images, self.build_network()(x))

    def build_augmentation(self) -> list[keras.layers.Layer]:
        """Layers that change images in training, and only then."""
        made = []
        if self.flip:
            made.append(layers.RandomFlip("horizontal"))
        if self.rotation:
            made.append(
                layers.RandomRotation(self.rotation, fill_mode=self.fill)
            )
        if self.translation:
            shares = self.translation, self.translation
            made.append(layers.RandomTranslation(*shares, fill_mode=self.fill))
        if self.zoom:
            made.append(layers.RandomZoom(self.zoom, fill_mode=self.fill))
        return made

    def build_network(self) -> keras.Model:
        """The model that `network` names.

        Raises:
            ConfigError: there is no such network.
        """
        if self.network == "small":
            return self._small_network()
        module, _, name = self.network.rpartition(":")
        if module:
            function = getattr(importlib.import_module(module), name)
            return function(self.image_shape, self.num_classes)
        factory = getattr(keras.applications, self.network, None)
        if not callable(factory):
            known = [n for n in dir(keras.applications) if n[0].isupper()]
            raise ConfigError(
                f"network={self.network!r}: it must be 'small', "
                "'package.module:function', or one of keras.applications: "
                f"{', '.join(known)}."
            )
        return cast("Any", factory)(
            weights=None,
            input_shape=self.image_shape,
            classes=self.num_classes,
            classifier_activation=None,
        )

    def _small_network(self) -> keras.Model:
        x = images = keras.Input(self.image_shape)
        for filters in (32, 64):
            for _ in range(2):
                x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
                x = layers.BatchNormalization(momentum=0.9)(x)
                x = layers.ReLU()(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Dropout(self.dropout)(layers.Flatten()(x))
        return keras.Model(images, layers.Dense(self.num_classes)(x))

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        """AdamW, whose learning rate falls as a cosine."""
        rate: Any = keras.optimizers.schedules.CosineDecay(
            self.learning_rate, self.decay_steps
        )
        return keras.optimizers.AdamW(rate, weight_decay=self.weight_decay)

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> Any:
        """Cross-entropy with smoothed labels."""
        loss = self.cross_entropy(labels, model_outputs)
        return loss + sum(aux_losses or [])

    def build_metrics(self, training: bool) -> Sequence[keras.metrics.Metric]:
        """Accuracy, and whether the label is among the `top_k`."""
        del training
        metrics: list[keras.metrics.Metric] = [
            keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        ]
        if self.top_k:
            name = f"top_{self.top_k}"
            metrics.append(
                keras.metrics.SparseTopKCategoricalAccuracy(self.top_k, name)
            )
        return metrics

    def process_metrics(
        self, metrics: Any, labels: Any, model_outputs: Any
    ) -> None:
        """Measures blended images by the larger part of their label."""
        if len(labels.shape) == 2:
            labels = ops.argmax(labels, axis=-1)
        super().process_metrics(metrics, labels, model_outputs)

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> dict[str, Any]:
        """One update, on blended images where there is `mixup`."""
        if self.mix_up is not None:
            images, labels = inputs
            one_hot = ops.one_hot(labels, self.num_classes)
            both = {"images": ops.cast(images, "float32"), "labels": one_hot}
            mixed = self.mix_up(both, training=True)
            inputs = mixed["images"], mixed["labels"]
        return super().train_step(inputs, model, optimizer, metrics)

    def validation_step(
        self, inputs: Any, model: Any, metrics: Any = None
    ) -> dict[str, Any]:
        """Loss and metrics, and what is to be counted on the host."""
        images, labels = inputs
        logits = self.inference_step(images, model)
        loss = self.build_losses(labels, logits, model.losses)
        self.process_metrics(metrics, labels, logits)
        return {self.loss: loss, "pair": (labels, ops.argmax(logits, axis=-1))}

    def aggregate_logs(self, state: Any, step_logs: dict[str, Any]) -> Any:
        """Counts which class was taken for which."""
        if state is None:
            state = np.zeros((self.num_classes, self.num_classes), int)
        np.add.at(state, tuple(step_logs["pair"]), 1)
        return state

    def reduce_aggregated_logs(
        self, aggregated_logs: Any, global_step: int
    ) -> dict[str, Any]:
        """The confusion matrix, as a picture for summaries."""
        del global_step
        return {"confusions": confusions(aggregated_logs, self.class_names)}
