"""Classification: networks, mixup, and what is drawn."""

import keras
import numpy as np
import pytest

from legato.errors import ConfigError
from legato.tasks import ImageClassificationTask


def make_task(**changes):
    return ImageClassificationTask(
        ["a", "b", "c"], **{"image_shape": (32, 32, 3), **changes}
    )


def linear(image_shape, num_classes):
    return keras.Sequential(
        [
            keras.Input(image_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(num_classes),
        ]
    )


@pytest.mark.any_backend
def test_networks():
    mine = make_task(network=f"{__name__}:linear", flip=True).build_model()
    assert mine.output_shape == (None, 3)
    kinds = [type(layer).__name__ for layer in mine.layers[1:-1]]
    assert kinds == [
        "Rescaling",
        "RandomFlip",
        "RandomRotation",
        "RandomTranslation",
        "RandomZoom",
    ]
    with pytest.raises(ConfigError, match=r"'Small': it must be .*VGG16"):
        make_task(network="Small").build_model()


@pytest.mark.any_backend
def test_a_network_of_keras(monkeypatch):
    def network(**given):
        assert given == {
            "weights": None,
            "input_shape": (32, 32, 3),
            "classes": 3,
            "classifier_activation": None,  # logits
        }
        return linear((32, 32, 3), 3)

    # (To make a real one takes a minute.)
    monkeypatch.setattr(keras.applications, "MobileNet", network)
    assert make_task(network="MobileNet").build_model().built


def test_blended_images_are_measured_by_the_larger_part():
    task = make_task()
    metrics = task.build_metrics(training=True)
    labels = np.array([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]], "float32")
    outputs = np.array([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]], "float32")
    task.process_metrics(metrics, labels, outputs)
    task.process_metrics(metrics, np.array([0, 0]), outputs)
    assert float(metrics[0].result()) == 0.75


@pytest.mark.any_backend
def test_confusions_are_counted_and_drawn():
    task = make_task()
    state = None
    for labels, predicted in (([0, 1, 1], [0, 2, 2]), ([2], [2])):
        pair = np.array(labels), np.array(predicted)
        state = task.aggregate_logs(state, {"pair": pair})
    assert state.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 1]]
    figure = task.reduce_aggregated_logs(state, 5)["confusions"]
    (axes,) = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == ["1", "1", "2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
