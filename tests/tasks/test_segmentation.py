"""Segmentation, and the scenes that it is shown on."""

from pathlib import Path

import keras
import numpy as np
import pytest

from legato.errors import ConfigError
from legato.experiment import build_task, built_in_names, resolve
from legato.tasks import SemanticSegmentationTask, pictures, scenes


def on_host(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


@pytest.mark.any_backend
def test_scenes_are_labelled_and_depend_on_their_number_alone():
    images, pixels = scenes.segmentation("train", 6, size=48, seed=3)
    again, labels = scenes.detection("train", 4, size=48, seed=3)
    np.testing.assert_array_equal(images[:4], again)
    assert images.shape == (6, 48, 48, 3) and images.dtype == np.uint8
    assert len({each.tobytes() for each in images}) == 6
    others, _ = scenes.segmentation("validation", 2, size=48, seed=3)
    assert not (others == images[:2]).all()
    seen = 0
    for image, boxes, classes in zip(
        pixels, labels["boxes"], labels["classes"], strict=False
    ):
        rest = image.copy()
        for (left, top, right, bottom), digit in zip(
            boxes.astype(int), classes, strict=True
        ):
            if digit < 0:
                continue
            seen += 1
            inside = image[top:bottom, left:right] == digit + 1
            # Tight: there is ink in each outer row and column.
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)
            rest[top:bottom, left:right] = 0
        assert np.isin(rest, (0, scenes.IGNORED)).all()  # no digit elsewhere
    assert seen >= 8
    with pytest.raises(ConfigError, match="size=20: it must be at least 30"):
        scenes.segmentation("train", 1, size=20)


def test_losses_are_of_the_pixels_that_count():
    task = SemanticSegmentationTask(["a", "b", "c"], dice_weight=0.5)
    labels = np.array([[[0, 2], [255, 255]]])
    logits = np.zeros((1, 2, 2, 3), "float32")
    logits[0, 0, 0, 0] = logits[0, 0, 1, 2] = 3.0
    losses = task.build_losses(labels, logits, [0.25])
    p = np.exp(3) / (np.exp(3) + 2)
    np.testing.assert_allclose(
        on_host(losses["cross_entropy"]), -np.log(p), rtol=1e-5
    )
    # Of the classes that are there: overlap p, sizes 1 and p**2 + rest**2.
    rest = (1 - p) / 2
    dice = 1 - 2 * p / (1 + p**2 + rest**2)
    np.testing.assert_allclose(on_host(losses["dice"]), dice, rtol=1e-5)
    np.testing.assert_allclose(
        on_host(losses["loss"]), -np.log(p) + 0.5 * dice + 0.25, rtol=1e-5
    )
    logits[0, 1] = 1e4  # ignored
    again = task.build_losses(labels, logits, [0.25])
    assert on_host(again["loss"]) == on_host(losses["loss"])


@pytest.mark.any_backend
def test_what_is_drawn():
    task = SemanticSegmentationTask(["a", "b"])
    images, labels = np.full((2, 8, 8, 1), 99), np.zeros((2, 8, 8, 1), "uint8")
    labels[:, :4] = 255
    predicted = np.ones((2, 8, 8), int)
    state = task.aggregate_logs(None, {"drawn": (images, labels, predicted)})
    assert task.aggregate_logs(state, {"drawn": None}) is state
    found = task.reduce_aggregated_logs(state, 7)["predictions"]
    # Image, labels and prediction, twice as large.
    assert found.shape == (2, 16, 48, 3) and found.dtype == np.uint8
    assert (found[:, :, :16] == 99).all()
    assert (found[:, :8, 16:] == 128).all() and (found[:, 8:, 16:32] == 0).all()
    assert (found[:, 8:, 32:] == pictures.colour_of(1)).all()
    none = SemanticSegmentationTask(["a", "b"], shown=0)
    assert none.reduce_aggregated_logs(state, 7) == {}


@pytest.mark.any_backend
def test_painted():
    labels = np.array([0, 1, 255, 300])
    found = pictures.painted(labels, labels >= 255)
    assert found.tolist()[0] == [0, 0, 0]
    assert found.tolist()[1] == list(pictures.colour_of(1))
    assert found.tolist()[2] == found.tolist()[3] == [128] * 3
    colours = {pictures.colour_of(index) for index in range(80)}
    assert len(colours) > 70


@pytest.mark.any_backend
def test_experiments_can_be_made():
    examples = Path(__file__).parents[2] / "examples"
    found = [*built_in_names(), *sorted(examples.glob("*.yaml"))]
    assert len(found) >= 7
    for each in found:
        build_task(resolve(str(each)))
