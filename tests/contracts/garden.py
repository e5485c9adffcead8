"""The tasks that come with legato, as small as they can be."""

from typing import Any

import keras
import numpy as np
from keras import layers

import legato
from legato.tasks import (
    ImageClassificationTask,
    RetinaNetTask,
    SemanticSegmentationTask,
    SketchRNNTask,
    strokes,
)
from tests.contracts.scenarios import Scenario


def _random(split: str) -> tuple[np.random.Generator, int]:
    """What makes the data of a split, and how many examples there are.

    Batches are of 8 and full: other shapes would take time to compile.
    """
    train = split == "train"
    return np.random.default_rng(1 if train else 2), 24 if train else 8


class Classification(ImageClassificationTask):
    """Which channel is brightest; with all that is random."""

    def __init__(self) -> None:
        super().__init__(
            ["red", "green", "blue"],
            image_shape=(4, 4, 3),
            network=f"{__name__}:dropping",
            flip=True,
            mixup=0.3,
            top_k=2,
            decay_steps=12,
        )

    def build_inputs(self, split: str) -> Any:
        random, count = _random(split)
        images = random.integers(0, 256, (count, 4, 4, 3), np.uint8)
        labels = images.mean(axis=(1, 2)).argmax(axis=-1)
        return legato.ArraySource(
            (images, labels), batch_size=8, shuffle=split == "train"
        )


def dropping(image_shape: tuple[int, ...], num_classes: int) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(image_shape),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(num_classes),
        ]
    )


class Segmentation(SemanticSegmentationTask):
    """Which channel is brightest; some pixels are not asked for."""

    def __init__(self) -> None:
        super().__init__(
            ["red", "green", "blue"], filters=(4, 6), decay_steps=12, shown=2
        )

    def build_inputs(self, split: str) -> Any:
        random, count = _random(split)
        images = random.integers(0, 256, (count, 8, 8, 3), np.uint8)
        labels = images.argmax(axis=-1).astype("uint8")
        labels[random.random(labels.shape) < 0.1] = 255
        return legato.ArraySource(
            (images, labels), batch_size=8, shuffle=split == "train"
        )


class Detection(RetinaNetTask):
    """A white square on noise, or two."""

    def __init__(self) -> None:
        super().__init__(
            ["small", "large"],
            image_size=(16, 16),
            levels=(1, 2),
            channels=4,
            head_depth=1,
            anchor_scales=(1.0,),
            anchor_ratios=(1.0,),
            max_detections=10,
            decay_steps=12,
            shown=2,
        )

    def build_backbone(self) -> keras.Model:
        images = keras.Input((*self.image_size, 3))
        x = layers.Rescaling(1 / 255)(images)
        fine = layers.Conv2D(4, 3, 2, padding="same", activation="relu")(x)
        x = layers.BatchNormalization()(layers.AveragePooling2D(2)(fine))
        return keras.Model(images, [fine, x])

    def build_inputs(self, split: str) -> Any:
        random, count = _random(split)
        images = random.integers(0, 100, (count, 16, 16, 3), np.uint8)
        boxes = np.zeros((count, 2, 4), "float32")
        classes = np.full((count, 2), -1, "int32")
        for index in range(count):
            for which in range(1 + index % 2):
                large = random.integers(2)
                side = 6 + 4 * large
                left, top = random.integers(0, 16 - side, 2)
                images[index, top : top + side, left : left + side] = 255
                boxes[index, which] = left, top, left + side, top + side
                classes[index, which] = large
        labels = {
            "source_id": np.arange(count),
            "boxes": boxes,
            "classes": classes,
        }
        return legato.ArraySource(
            (images, labels), batch_size=8, shuffle=split == "train"
        )


class Sketches(SketchRNNTask):
    """Lines, with all that is random, and callbacks with counters."""

    def __init__(self) -> None:
        super().__init__(
            4,
            encoder_units=3,
            decoder_units=4,
            latent_size=2,
            mixtures=2,
            kl_rate=0.9,
            decay=0.9,
            shown=2,
        )

    def build_inputs(self, split: str) -> Any:
        random, count = _random(split)
        drawings = [
            np.column_stack([random.normal(size=(n, 2)), np.arange(n) == n - 1])
            for n in random.integers(1, 5, count)
        ]
        return legato.ArraySource(
            strokes.padded(drawings, 4, 1.0),
            batch_size=8,
            shuffle=split == "train",
        )


def _scenario(make_task: Any, best_metric: str) -> Scenario:
    # No two of these cadences are multiples.
    config = {
        "train_steps": 12,
        "validation_interval": 5,
        "checkpoint_interval": 2,
        "summary_interval": 3,
        "best_metric": best_metric,
        "best_mode": "max",
        "progress": "none",
    }
    return Scenario(make_task=make_task, config=config)


GARDEN = {
    "classification": _scenario(Classification, "val_accuracy"),
    "segmentation": _scenario(Segmentation, "val_mean_iou"),
    "detection": _scenario(Detection, "val_AP50"),
    "sketches": _scenario(Sketches, "val_kl"),
}
