"""Detection: boxes around the objects of an image, and their classes."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from legato.losses import SigmoidFocalLoss, SmoothL1Loss
from legato.metrics import CocoMetric, HostMetric
from legato.task import Task
from legato.tasks import boxes
from legato.tasks.pictures import with_boxes


class RetinaNetTask(Task):
    """A RetinaNet, measured as COCO does.

    (T. Lin et al., "Focal Loss for Dense Object Detection", 2017,
    arXiv:1708.02002.)

    Batches are `(images, labels)`: numbers from 0 to 255 `[batch, height,
    width, 3]`, and a dict as `legato.metrics.CocoMetric` takes it, with
    `source_id`, `boxes` (left, top, right, bottom, in pixels) and `classes`
    (from 0; -1 is no object). Give them as the config's `data`, or define
    `build_inputs`. Override `build_backbone` for a larger network.

    Args:
        class_names: of the classes, in the order of their indices.
        image_size: height and width of the images, in pixels; multiples of 2
            to the power of the last level.
        levels: of the feature pyramid: level l has a place for each square of
            `2**l` pixels.
        channels: of the pyramid and the heads.
        head_depth: hidden convolutions in each head.
        anchor_size: of a square anchor, in places of its level.
        anchor_scales: by which there are larger ones.
        anchor_ratios: of their heights to their widths.
        box_weight: how much the loss of boxes counts beside that of classes.
        max_detections: in an image.
        learning_rate: of Adam, at first.
        decay_steps: after so many steps the learning rate has fallen to 0, as
            a cosine does: usually the length of the run.
        shown: how many images of validation are drawn in its summaries.
        shown_score: of a detection that is drawn, at least.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        image_size: tuple[int, int] = (96, 96),
        levels: Sequence[int] = (3, 4, 5),
        channels: int = 64,
        head_depth: int = 2,
        anchor_size: float = 4.0,
        anchor_scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        box_weight: float = 1.0,
        max_detections: int = 100,
        learning_rate: float = 1e-3,
        decay_steps: int = 2000,
        shown: int = 4,
        shown_score: float = 0.4,
    ) -> None:
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.image_size = tuple(image_size)
        self.levels = list(levels)
        self.channels = channels
        self.head_depth = head_depth
        self.anchors = boxes.make_anchors(
            image_size, levels, anchor_size, anchor_scales, anchor_ratios
        )
        self.anchors_at_a_place = len(anchor_scales) * len(anchor_ratios)
        self.box_weight = box_weight
        self.max_detections = max_detections
        self.learning_rate = learning_rate
        self.decay_steps = decay_steps
        self.shown = shown
        self.shown_score = shown_score
        self.focal_loss = SigmoidFocalLoss(ignore_label=-2)
        self.smooth_l1 = SmoothL1Loss(beta=0.1)

    def build_backbone(self) -> keras.Model:
        """Images to the features of each level: a small residual network.

        Returns:
            A model of images, from 0 to 255, to a list of features, `[batch,
            height / 2**level, width / 2**level, any]`.
        """
        images = keras.Input((*self.image_size, 3))
        x = layers.Rescaling(1 / 127.5, offset=-1.0)(images)
        features = {}
        for level in range(1, self.levels[-1] + 1):
            filters = min(16 * 2 ** (level - 1), 128)
            x = _convolution(x, filters, strides=2)
            shortcut = x
            x = layers.ReLU()(x)
            x = layers.ReLU()(_convolution(x, filters))
            x = layers.ReLU()(
                layers.Add()([shortcut, _convolution(x, filters)])
            )
            features[level] = x
        return keras.Model(images, [features[each] for each in self.levels])

    def build_model(self) -> keras.Model:
        """Images to logits of classes and codes of boxes, for each anchor.

        Returns:
            A model whose outputs are a dict: `classes`, `[batch, anchors,
            classes]`, and `boxes`, `[batch, anchors, 4]`.
        """
        images = keras.Input((*self.image_size, 3))
        pyramid = []
        for features in reversed(self.build_backbone()(images)):
            x = layers.Conv2D(self.channels, 1)(features)
            if pyramid:
                coarser = layers.UpSampling2D()(pyramid[-1])
                x = layers.Add()([x, coarser])
            pyramid.append(x)
        pyramid = [
            layers.Conv2D(self.channels, 3, padding="same")(x)
            for x in reversed(pyramid)
        ]
        # So that at first each anchor is background, with a probability of
        # 0.99: or the loss of so many would drown that of the few.
        rare = keras.initializers.Constant(-math.log((1 - 0.01) / 0.01))
        heads = {
            "classes": self._head("classes", self.num_classes, rare),
            "boxes": self._head("boxes", 4, "zeros"),
        }
        return keras.Model(
            images,
            {
                name: layers.Concatenate(axis=1, dtype="float32")(
                    [head(features) for features in pyramid]
                )
                for name, head in heads.items()
            },
        )

    def _head(self, name: str, numbers: int, bias: Any) -> keras.Sequential:
        """A head that all levels share."""
        hidden = [
            layers.Conv2D(self.channels, 3, padding="same", activation="relu")
            for _ in range(self.head_depth)
        ]
        small: Any = keras.initializers.RandomNormal(stddev=0.01)
        outputs = layers.Conv2D(
            self.anchors_at_a_place * numbers,
            3,
            padding="same",
            kernel_initializer=small,
            bias_initializer=bias,
        )
        features = keras.Input((None, None, self.channels))
        return keras.Sequential(
            [features, *hidden, outputs, layers.Reshape((-1, numbers))],
            name=name,
        )

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        """Adam, whose learning rate falls as a cosine."""
        rate: Any = keras.optimizers.schedules.CosineDecay(
            self.learning_rate, self.decay_steps
        )
        return keras.optimizers.Adam(rate, clipnorm=10.0)

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> dict[str, Any]:
        """Focal loss of classes and smooth L1 of boxes, for each positive."""
        there = labels["classes"]
        if "is_crowds" in labels:  # no box of theirs is one object's
            there = ops.where(labels["is_crowds"], -1, there)
        targets = boxes.match(self.anchors, labels["boxes"], there)
        # No class for background (-1); left alone (-2) in each.
        wanted = ops.one_hot(targets.classes, self.num_classes, dtype="int32")
        ignored = ops.expand_dims(targets.classes == -2, axis=-1)
        classes = self.focal_loss(
            ops.where(ignored, -2, wanted), model_outputs["classes"]
        )
        found = self.smooth_l1(
            targets.codes, model_outputs["boxes"], targets.classes >= 0
        )
        loss = classes + self.box_weight * found + sum(aux_losses or [])
        return {self.loss: loss, "class_loss": classes, "box_loss": found}

    def build_metrics(self, training: bool) -> Sequence[HostMetric]:
        """COCO's figures, in validation alone."""
        if training:
            return []
        categories = dict(enumerate(self.class_names))
        return [CocoMetric(box_format="xyxy", categories=categories)]

    def detect(self, model_outputs: Any) -> dict[str, Any]:
        """The objects that the model's outputs tell of.

        Args:
            model_outputs: of a batch.

        Returns:
            `detection_boxes`, `[batch, n, 4]` in pixels, `detection_classes`
            and `detection_scores`, `[batch, n]`, the best first. What another
            one suppresses has a score of -1.
        """
        scores = ops.sigmoid(model_outputs["classes"])
        scores, best = ops.top_k(
            ops.reshape(scores, (-1, len(self.anchors) * self.num_classes)),
            self.max_detections,
        )
        anchors = ops.cast(best, "int32") // self.num_classes
        classes = ops.cast(best, "int32") % self.num_classes
        found = boxes.decode(self.anchors, model_outputs["boxes"])
        found = ops.take_along_axis(found, anchors[:, :, None], axis=1)
        height, width = self.image_size
        corner = ops.convert_to_tensor([width, height] * 2, found.dtype)
        found = ops.minimum(ops.maximum(found, 0.0), corner)
        kept = boxes.suppress(found, classes)
        return {
            "detection_boxes": found,
            "detection_classes": classes,
            "detection_scores": ops.where(kept, scores, -1.0),
        }

    def inference_step(self, inputs: Any, model: Any) -> dict[str, Any]:
        """The objects in a batch of images: see `detect`."""
        return self.detect(model(inputs, training=False))

    def validation_step(
        self, inputs: Any, model: Any, metrics: Any = None
    ) -> dict[str, Any]:
        """Losses and metrics, and a few detections to be drawn."""
        images, labels = inputs
        outputs = model(images, training=False)
        losses = self.build_losses(labels, outputs, model.losses)
        detections = self.detect(outputs)
        self.process_metrics(metrics, labels, detections)
        drawn = {"images": images, **labels, **detections}
        drawn = {name: each[: self.shown] for name, each in drawn.items()}
        return {**losses, "drawn": drawn}

    def aggregate_logs(self, state: Any, step_logs: dict[str, Any]) -> Any:
        """Keeps the first batch's detections."""
        return state or step_logs["drawn"]

    def reduce_aggregated_logs(
        self, aggregated_logs: Any, global_step: int
    ) -> dict[str, Any]:
        """Pictures for summaries: objects on the left, detections right."""
        if not self.shown:
            return {}
        pictures = []
        for index in range(len(aggregated_logs["images"])):
            image = {
                name: all_[index] for name, all_ in aggregated_logs.items()
            }
            wanted = image["classes"] >= 0
            found = image["detection_scores"] >= self.shown_score
            sides = [
                self._draw(
                    image["images"],
                    image[prefix + "boxes"][chosen],
                    image[prefix + "classes"][chosen],
                )
                for prefix, chosen in (("", wanted), ("detection_", found))
            ]
            pictures.append(np.concatenate(sides, axis=1))
        return {"detections": np.stack(pictures)}

    def _draw(
        self, image: np.ndarray, found: np.ndarray, classes: np.ndarray
    ) -> np.ndarray:
        names = [self.class_names[index] for index in classes]
        return with_boxes(image, found, classes, names)


def _convolution(x: Any, filters: int, strides: int = 1) -> Any:
    x = layers.Conv2D(
        filters, 3, strides=strides, padding="same", use_bias=False
    )(x)
    return layers.BatchNormalization(momentum=0.9)(x)
