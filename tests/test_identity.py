"""What makes another run of it, what makes it inexact, what is free."""

import keras
import pytest

from legato import identity
from legato.config import TrainerConfig
from legato.errors import RestoreError
from legato.losses import SmoothL1Loss, WeightedSum
from legato.task import Task


class Plain(Task):
    def __init__(self, width=3, smoothing=0.0):
        self.width = width
        self.loss_function = keras.losses.CategoricalCrossentropy(
            label_smoothing=smoothing
        )

    def build_losses(self, labels, model_outputs, aux_losses=None):
        """A docstring is not code."""
        return self.loss_function(labels, model_outputs)


class Recoded(Plain):
    def build_losses(self, labels, model_outputs, aux_losses=None):
        return 2 * self.loss_function(labels, model_outputs)


class Summed(Task):
    def __init__(self, beta=0.5, weight=50.0):
        self.losses = WeightedSum(
            {"name": SmoothL1Loss(beta), "other": spread}, {"name": weight}
        )


def spread(labels, outputs):
    return keras.ops.std(outputs)


def made(
    task=None,
    optimizer=None,
    data=None,
    validation_data=None,
    metrics=None,
    **config,
):
    return identity.make_identity(
        identity.describe_program(
            task or Plain(), optimizer or keras.optimizers.Adam(0.25)
        ),
        TrainerConfig(**{"train_steps": 5, **config}),
        data or {"examples": 10},
        validation_data,
        {},
    )


def compare(saved, present, override=False):
    return identity.compare(saved, present, override=override)


def test_the_same_program_is_the_same_run():
    assert compare(made(), made()) == []
    names = keras.optimizers.Adam(0.25, name="another")
    assert compare(made(), made(optimizer=names)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"train_steps": 50},
        {"checkpoint_interval": 7},
        {"keep_last": None},
        {"progress": "none"},
        {"max_time": "1h"},
    ],
)
def test_what_changes_no_bits_is_free(changes):
    assert compare(made(), made(**changes)) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optimizer": keras.optimizers.SGD(0.01)}, ["'Adam'", "'SGD'"]),
        ({"optimizer": keras.optimizers.Adam(0.5)}, ["0.25", "0.5"]),
        ({"task": Plain(width=4)}, ["width", "3", "4"]),
        ({"task": Plain(smoothing=0.1)}, ["label_smoothing", "0.0", "0.1"]),
        ({"data": {"examples": 11}}, ["examples", "10", "11"]),
        ({"seed": 3}, ["seed", "0 -> 3"]),
    ],
)
def test_another_run_is_refused_with_both_values(changes, words):
    with pytest.raises(RestoreError) as caught:
        compare(made(), made(**changes))
    for word in [*words, "run_dir", "override"]:
        assert word in str(caught.value)


def test_of_another_first_batch_the_causes_are_told():
    saved = made(data={"first_sha256": "0123456789abcdef", "examples": 10})
    present = made(data={"first_sha256": "f" * 16, "examples": 10})
    with pytest.raises(RestoreError) as error:
        compare(saved, present)
    for words in (
        "data: the first batch is another one than when the run began",
        "0123456789ab... -> ffffffffffff...",
        "draws without a seed",
        "torch.Generator().manual_seed(1)",
        "seeds PyTorch only where that is the backend",
    ):
        assert words in str(error.value)
    (why,) = compare(
        made(validation_data={"first_sha256": "a"}),
        made(validation_data={"first_sha256": "b"}),
    )
    assert why.startswith("validation_data: the first batch is another one")


def test_a_first_batch_that_does_not_repeat_is_no_other_run():
    saved = made(data={"first_sha256": "0123456789abcdef", "examples": 10})
    present = made(data={"examples": 10})
    for one, other in ((saved, present), (present, saved)):
        (why,) = compare(one, other)
        assert why.startswith("data: whether the first batch is still the same")


def test_override_takes_the_programs_optimizer_but_not_other_data():
    changed = made(optimizer=keras.optimizers.Adam(0.5))
    (sentence,) = compare(made(), changed, override=True)
    assert "learning_rate" in sentence
    with pytest.raises(RestoreError, match="examples"):
        compare(made(), made(data={"examples": 1}), override=True)


def test_what_keeps_it_from_being_exact_is_named():
    saved = made()
    saved["environment"]["jax"] = "0.0.1"
    saved["environment"]["cpus"] = 512
    present = made(validation_interval=3, validation_data={"examples": 7})
    found = " ".join(compare(saved, present))
    for word in ("jax", "0.0.1", "512", "validation_interval", "examples"):
        assert word in found


def test_changed_code_of_the_task_is_noticed_and_comments_are_not():
    assert identity.code_hash(Plain) != identity.code_hash(Recoded)
    source = "class A:\n def f(self, x):\n  {}return x + {}\n"
    classes = []
    for doc, number in (("", 1), ("'''doc'''\n  ", 1), ("", 2)):
        space: dict = {}
        exec(source.format(doc, number), space)
        classes.append(space["A"])
    hashes = [identity.code_hash(cls) for cls in classes]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_checkpoint_without_one_is_refused():
    with pytest.raises(RestoreError, match="identity"):
        compare(None, made())


@pytest.mark.parametrize(
    "changes, words",
    [({"weight": 20.0}, ["50.0", "20.0"]), ({"beta": 0.25}, ["0.5", "0.25"])],
)
def test_another_sum_of_losses_is_another_run(changes, words):
    assert compare(made(Summed()), made(Summed())) == []
    with pytest.raises(RestoreError) as caught:
        compare(made(Summed()), made(Summed(**changes)))
    for word in ["losses", *words]:
        assert word in str(caught.value)
