"""Metrics of other libraries."""

import functools

import ml_dtypes
import numpy as np
import pytest
import sklearn.metrics as sk

from legato.errors import ConfigError, DataError
from legato.metrics import SklearnMetric, WrappedMetric


def random_split(seed=0, count=50, classes=3):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    outputs = random.normal(size=(count, classes)).astype("float32")
    outputs[np.arange(count), labels] += 1
    return labels, outputs


def measured(metric, labels, outputs, weights=None, batch=8):
    for first in range(0, len(labels), batch):
        part = slice(first, first + batch)
        given = () if weights is None else (weights[part],)
        metric.update_state(labels[part], outputs[part], *given)
    return metric.result()


def test_predicted_classes():
    labels, outputs = random_split()
    metric = SklearnMetric(sk.f1_score, average="macro")
    expected = sk.f1_score(labels, outputs.argmax(-1), average="macro")
    assert measured(metric, labels, outputs) == {"f1_score": expected}
    assert metric.result() == {"f1_score": expected}  # it resets nothing
    metric.reset_state()
    predicted = outputs.argmax(-1)
    columns = labels[:, None], predicted[:, None]
    assert measured(metric, *columns, batch=50) == {"f1_score": expected}


def test_a_mean_over_batches_would_be_another_number():
    labels, outputs = random_split()
    metric = SklearnMetric(sk.f1_score, average="macro")
    batches = []
    for first in range(0, 50, 8):
        metric.reset_state()
        part = slice(first, first + 8)
        metric.update_state(labels[part], outputs[part])
        batches.append(metric.result()["f1_score"])
    expected = sk.f1_score(labels, outputs.argmax(-1), average="macro")
    assert abs(np.mean(batches) - expected) > 0.001


def test_scores():
    labels, outputs = random_split(1, classes=2)
    positive = outputs[:, 1] - outputs[:, 0]
    metric = SklearnMetric(sk.roc_auc_score, needs="scores", name="auc")
    expected = sk.roc_auc_score(labels, positive)
    assert measured(metric, labels, positive[:, None]) == {"auc": expected}
    # Of a regression.
    metric = SklearnMetric(sk.mean_absolute_error, needs="scores")
    targets = np.random.default_rng(2).normal(size=(50, 2))
    expected = sk.mean_absolute_error(targets, outputs)
    assert measured(metric, targets, outputs) == {
        "mean_absolute_error": pytest.approx(expected, rel=1e-12)
    }


@pytest.mark.parametrize("needs", ["labels", "scores"])
def test_half_precision(needs):
    labels = np.array([0, 1, 1, 0])
    outputs = np.array([0.2, 0.75, 0.4, 0.1], ml_dtypes.bfloat16)
    function = sk.f1_score if needs == "labels" else sk.roc_auc_score
    threshold = 0.5 if needs == "labels" else None
    found = []
    for each in (outputs, outputs.astype("float32")):
        metric = SklearnMetric(function, "x", needs, threshold)
        metric.update_state(labels, each)
        found.append(metric.result())
    assert found[0] == found[1]
    with pytest.raises(DataError, match=r"dtype float32.*threshold=0.5"):
        SklearnMetric(sk.f1_score).update_state(labels, outputs)


def test_labels_that_are_one_hot():
    metric = SklearnMetric(sk.accuracy_score)
    with pytest.raises(DataError, match=r"one-hot.*labels\.argmax\(-1\)"):
        metric.update_state(np.eye(3), np.eye(3) * 0.6)


@pytest.mark.parametrize("threshold", [np.nan, True, "0.5"])
def test_a_threshold_is_a_number(threshold):
    with pytest.raises(ConfigError, match=r"threshold=.*must be a number"):
        SklearnMetric(sk.accuracy_score, threshold=threshold)


@pytest.mark.parametrize("convert", [3, "torch"])
def test_convert_is_a_function(convert):
    with pytest.raises(ConfigError, match=f"convert={convert!r}.*function"):
        WrappedMetric(LikeKeras(), convert=convert)


def test_threshold():
    labels, outputs = random_split(3, classes=2)
    logits = outputs[:, 1] - outputs[:, 0]
    metric = SklearnMetric(sk.balanced_accuracy_score, threshold=0)
    expected = sk.balanced_accuracy_score(labels, logits > 0)
    assert measured(metric, labels, logits) == {
        "balanced_accuracy_score": expected
    }
    with pytest.raises(DataError, match=r"threshold=0.5 for probabilities"):
        measured(SklearnMetric(sk.accuracy_score), labels, logits)


def test_weights():
    labels, outputs = random_split(4)
    weights = np.random.default_rng(4).choice([0, 1, 2.5], 50)
    metric = SklearnMetric(sk.accuracy_score)
    expected = sk.accuracy_score(
        labels, outputs.argmax(-1), sample_weight=weights
    )
    value = measured(metric, labels, outputs, weights)["accuracy_score"]
    assert value == pytest.approx(expected, rel=1e-12)
    # In one batch only: the others have 1.
    metric.reset_state()
    metric.update_state(labels[:30], outputs[:30])
    metric.update_state(labels[30:], outputs[30:], weights[30:, None])
    weights[:30] = 1
    expected = sk.accuracy_score(
        labels, outputs.argmax(-1), sample_weight=weights
    )
    assert metric.result()["accuracy_score"] == pytest.approx(expected)


def test_a_function_without_weights():
    def share(labels, predictions):
        return np.mean(labels == predictions)

    labels, outputs = random_split(5)
    metric = SklearnMetric(share)
    expected = measured(metric, labels, outputs)
    metric.reset_state()
    padded = np.concatenate([labels, labels[:3]])
    weights = np.repeat([1, 0], [50, 3])
    more = np.concatenate([outputs, np.full((3, 3), np.nan, "float32")])
    assert measured(metric, padded, more, weights) == expected
    assert metric._takes_weights is False
    with pytest.raises(DataError, match="other values than 0 and 1"):
        metric.update_state(labels, outputs, np.full(50, 0.5))


def test_padding_brings_no_class():
    """scikit-learn averages over the classes that it sees, of any weight."""
    labels, outputs = random_split(6)
    metric = SklearnMetric(sk.f1_score, average="macro")
    expected = measured(metric, labels, outputs)
    metric.reset_state()
    padded = np.append(labels, 7)
    more = np.concatenate([outputs, outputs[:1]])
    weights = np.append(np.ones(50), 0)
    assert measured(metric, padded, more, weights) == expected


def test_batches_are_copied():
    labels, outputs = random_split(7)
    metric = SklearnMetric(sk.log_loss, needs="scores")
    metric.update_state(
        labels, np.exp(outputs) / np.exp(outputs).sum(1)[:, None]
    )
    expected = metric.result()
    metric.reset_state()
    buffers = [labels.copy(), np.exp(outputs)]
    buffers[1] /= buffers[1].sum(1, keepdims=True)
    metric.update_state(*buffers)
    for buffer in buffers:
        buffer[:] = 0
    assert metric.result() == expected


def test_results_with_parts():
    labels, outputs = random_split(8)
    predicted = outputs.argmax(-1)
    metric = SklearnMetric(sk.f1_score, average=None)
    values = sk.f1_score(labels, predicted, average=None).tolist()
    assert measured(metric, labels, outputs) == {
        "f1_score": dict(zip("012", values, strict=True))
    }
    metric = SklearnMetric(sk.confusion_matrix, name="of")
    result = measured(metric, labels, outputs)
    expected = sk.confusion_matrix(labels, predicted)
    assert result["of"]["1"]["2"] == expected[1, 2]
    assert type(result["of"]["1"]["2"]) is float
    metric = SklearnMetric(sk.classification_report, output_dict=True)
    result = measured(metric, labels, outputs)
    assert result["accuracy"] == sk.accuracy_score(labels, predicted)
    assert result["macro avg"]["recall"] == sk.recall_score(
        labels, predicted, average="macro"
    )
    metric = SklearnMetric(
        sk.precision_recall_fscore_support, name="of", average="macro"
    )
    result = measured(metric, labels, outputs)
    assert sorted(result["of"]) == ["0", "1", "2"]  # no support of a mean


def test_nothing_is_nan():
    metric = SklearnMetric(sk.accuracy_score)
    assert np.isnan(metric.result()["accuracy_score"])
    metric.update_state(np.zeros(3), np.zeros(3, int), np.zeros(3))
    assert np.isnan(metric.result()["accuracy_score"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"function": "f1"}, "no name and no scorer"),
        ({"function": sk.make_scorer(sk.f1_score)}, "no scorer"),
        ({"function": sk.f1_score, "needs": "logits"}, "needs='logits'"),
        ({"function": sk.f1_score, "averge": "macro"}, "'averge'"),
        ({"function": lambda labels: 0}, "cannot be called"),
        (
            {"function": sk.f1_score, "needs": "scores", "threshold": 1},
            "threshold=1.*a threshold",
        ),
        ({"function": sk.f1_score, "threshold": "a"}, "threshold='a'.*number"),
        (
            {"function": functools.partial(sk.fbeta_score, beta=2)},
            "has no name of its own",
        ),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigError, match=words):
        SklearnMetric(**arguments)


def test_bad_batches():
    metric = SklearnMetric(sk.accuracy_score)
    with pytest.raises(DataError, match=r"the first axis of both"):
        metric.update_state(np.zeros(3), np.zeros((4, 2)))
    with pytest.raises(DataError, match="One-hot labels need argmax"):
        metric.update_state(np.zeros((3, 2, 2)), np.zeros((3, 2)))
    with pytest.raises(DataError, match="the outputs are a dict"):
        metric.update_state(np.zeros(3), {"logits": np.zeros(3)})
    with pytest.raises(DataError, match=r"\(2,\) for 3 examples"):
        metric.update_state(np.zeros(3), np.zeros(3, int), np.ones(2))
    metric = SklearnMetric(lambda labels, outputs: "good", name="of")
    metric.update_state(np.zeros(3), np.zeros(3, int))
    with pytest.raises(ConfigError, match="of: its result has 'good'"):
        metric.result()


class LikeTorchmetrics:
    """Signed, so that the order of the arguments is seen."""

    total = 0.0

    def update(self, preds, target):
        self.total += float((preds - target).sum())

    def compute(self):
        return np.float32(self.total)

    def reset(self):
        self.total = 0.0


class LikeKeras(LikeTorchmetrics):
    name = "difference"
    update = compute = reset = None

    def update_state(self, y_true, y_pred, sample_weight=None):
        weight = 1 if sample_weight is None else sample_weight
        self.total += float(((y_pred - y_true) * weight).sum())

    def result(self):
        return {"sum": self.total, "of": {"each": np.arange(2)}}

    def reset_states(self):
        self.total = 0.0


class LikeEvaluate:
    """Forgets when it computes, and computes nothing from nothing."""

    def __init__(self):
        self.batches = []

    def add_batch(self, *, predictions, references):
        self.batches.append(predictions - references)

    def compute(self):
        total = float(np.concatenate(self.batches).sum())
        self.batches = []
        return {"difference": total}


LABELS = np.arange(12.0)
OUTPUTS = np.arange(12.0) ** 2
TOTAL = float((OUTPUTS - LABELS).sum())
KINDS = [
    (LikeTorchmetrics, {"LikeTorchmetrics": TOTAL}),
    (LikeKeras, {"sum": TOTAL, "of": {"each": {"0": 0.0, "1": 1.0}}}),
    (LikeEvaluate, {"difference": TOTAL}),
]


@pytest.mark.parametrize(("kind", "expected"), KINDS)
def test_objects(kind, expected):
    if kind is LikeTorchmetrics:
        expected = {"LikeTorchmetrics": pytest.approx(TOTAL)}
    metric = WrappedMetric(kind())
    for _ in range(2):
        metric.reset_state()
        assert measured(metric, LABELS, OUTPUTS, batch=5) == expected
        assert metric.result() == expected
    # What came before the reset does not count, computed or not.
    metric.reset_state()
    metric.update_state(LABELS, OUTPUTS + 1)
    metric.reset_state()
    assert measured(metric, LABELS, OUTPUTS, batch=5) == expected
    # Nor what is padded.
    metric.reset_state()
    weights = np.repeat([1, 0], [12, 3])
    padded = np.append(LABELS, [50, 60, 70]), np.append(OUTPUTS, [1, 2, 3])
    assert measured(metric, *padded, weights, batch=4) == expected
    metric.update_state(LABELS, OUTPUTS, np.zeros(12))
    assert metric.result() == expected


def test_it_goes_on_after_a_result():
    metric = WrappedMetric(LikeTorchmetrics(), "of")
    metric.update_state(LABELS[:5], OUTPUTS[:5])
    metric.result()
    metric.update_state(LABELS[5:], OUTPUTS[5:])
    assert metric.result() == {"of": pytest.approx(TOTAL)}


def test_order_and_name():
    metric = WrappedMetric(LikeTorchmetrics(), "back", order="labels_first")
    assert measured(metric, LABELS, OUTPUTS) == {"back": pytest.approx(-TOTAL)}
    assert WrappedMetric(LikeKeras()).name == "difference"


def test_weights_of_objects():
    metric = WrappedMetric(LikeKeras())
    weights = np.linspace(0, 1, 12)
    result = measured(metric, LABELS, OUTPUTS, weights)
    expected = ((OUTPUTS - LABELS) * weights).sum()
    assert result["sum"] == pytest.approx(expected)
    with pytest.raises(DataError, match="no argument `sample_weight`"):
        measured(WrappedMetric(LikeTorchmetrics()), LABELS, OUTPUTS, weights)


def test_what_takes_any_argument_may_pass_over_it():
    class Collection(LikeTorchmetrics):
        def update(self, *args, **kwargs):
            super().update(*args)

    weights = np.linspace(0, 1, 12)
    with pytest.raises(DataError, match="names no argument `sample_weight`"):
        measured(WrappedMetric(Collection()), LABELS, OUTPUTS, weights)
    there = (np.arange(12) < 7).astype("float32")
    (value,) = measured(
        WrappedMetric(Collection()), LABELS, OUTPUTS, there
    ).values()
    assert value == pytest.approx((OUTPUTS - LABELS)[:7].sum())


def test_no_example_is_nan_where_an_object_computes_nothing_of_none():
    class NeedsSome(LikeTorchmetrics):
        seen = 0

        def update(self, preds, target):
            self.seen += len(preds)
            super().update(preds, target)

        def compute(self):
            if not self.seen:
                raise ValueError("No samples")
            return super().compute()

        def reset(self):
            self.seen = 0
            super().reset()

    metric = WrappedMetric(NeedsSome(), "of")
    nothing = measured(metric, LABELS, OUTPUTS, np.zeros(12))
    assert np.isnan(nothing["of"])
    assert measured(metric, LABELS, OUTPUTS) == {"of": pytest.approx(TOTAL)}

    class Fails(NeedsSome):
        def compute(self):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        measured(WrappedMetric(Fails()), LABELS, OUTPUTS)


def test_convert():
    class Picky(LikeTorchmetrics):
        def update(self, preds, target):
            assert isinstance(preds["x"], list)
            super().update(np.array(preds["x"]), np.array(target))

    metric = WrappedMetric(Picky(), name="of", convert=np.ndarray.tolist)
    metric.update_state(LABELS, {"x": OUTPUTS}, np.repeat([1, 0], 6))
    expected = float((OUTPUTS - LABELS)[:6].sum())
    assert metric.result() == {"of": pytest.approx(expected)}


def test_what_requires_gradients():
    class Tensor:
        """As much of PyTorch's as matters."""

        def detach(self):
            return self

        def cpu(self):
            return np.float32(0.5)

    metric = LikeTorchmetrics()
    metric.compute = Tensor
    assert WrappedMetric(metric, "of").result() == {"of": 0.5}


def without(*names):
    return type(
        "Partial", (LikeTorchmetrics,), {name: None for name in names}
    )()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": without("update")}, "none of the methods update, "),
        ({"metric": without("compute")}, "none of the methods compute, result"),
        (
            {"metric": without("reset", "compute")},
            "none of the methods compute",
        ),
        ({"metric": object()}, "object.*none of the methods"),
        ({"metric": LikeKeras}, "it is a class.*LikeKeras"),
        ({"metric": LikeTorchmetrics(), "order": "preds"}, "order='preds'"),
    ],
)
def test_bad_objects(arguments, words):
    with pytest.raises(ConfigError, match=words):
        WrappedMetric(**arguments)


def test_an_update_of_one_argument():
    class Ignite(LikeTorchmetrics):
        def update(self, output):
            pass

    with pytest.raises(ConfigError, match="update cannot be called with"):
        WrappedMetric(Ignite())
    partial = without("reset")
    with pytest.raises(ConfigError, match="reset, reset_state, reset_states"):
        WrappedMetric(partial)


def test_sequences_that_are_one_long():
    metric = SklearnMetric(lambda a, b: float((a == b).mean()), "right")
    scores = np.float32([[[0, 1, 0]], [[1, 0, 0]]])
    metric.update_state(np.array([[1], [1]]), scores)
    assert metric.result() == {"right": 0.5}
    for shape in ((2,), (2, 1), (2, 1, 1)):
        metric = SklearnMetric(sk.accuracy_score, threshold=0.5)
        outputs = np.float32([0.9, 0.1]).reshape(shape)
        metric.update_state(np.array([[1], [0]]), outputs)
        assert metric.result() == {"accuracy_score": 1.0}


@pytest.mark.parametrize("arguments", [{}, {"threshold": 0.5}])
def test_what_is_nan_is_of_no_class(arguments):
    metric = SklearnMetric(sk.accuracy_score, **arguments)
    shape = (3, 2)[: 1 if arguments else 2]
    outputs = np.zeros(shape, "float32")
    outputs[2] = np.nan
    labels = np.zeros(3, int)
    metric.update_state(labels, outputs, np.array([1, 1, 0]))  # padding
    assert metric.result() == {"accuracy_score": 1.0}
    metric.update_state(labels, outputs)
    metric.update_state(labels[:2], outputs[:2])
    assert np.isnan(metric.result()["accuracy_score"])
    metric.reset_state()
    metric.update_state(labels[:2], outputs[:2])
    assert metric.result() == {"accuracy_score": 1.0}
