"""Data that are named in a config."""

import keras
import numpy as np
import pytest

import legato
from legato import experiment as experiments
from legato.config import DataConfig, dump_yaml, load_yaml, validate
from legato.errors import ConfigError, DataError

N = 12
X = np.linspace(-1, 1, 2 * N, dtype="float32").reshape(N, 2)
Y = (X.sum(1) > 0).astype("float32")[:, None]


class Mean(legato.Task):
    """It leaves the data to the config."""

    def build_model(self):
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    def build_optimizer(self):
        return keras.optimizers.SGD(0.1)

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean((labels - outputs) ** 2)


class Own(Mean):
    """It has data of its own for validation."""

    def build_inputs(self, split):
        return legato.ArraySource((X, Y), 4, shuffle=False)


def examples(count=N):
    return [(X[i], Y[i]) for i in range(count)]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return X[rows], Y[rows]


def doubled(example, rng):
    x, y = example
    return x + rng.normal(size=2).astype("float32") * 0, y


NPZ = """
task: tests.test_data_config:Mean
data:
  train:
    type: npz
    config: {path: PATH}
    select: [x, y]
    batch_size: 4
    shuffle: false
  validation:
    type: tests.test_data_config:examples
    config: {count: 8}
    batch_size: 4
trainer: {epochs: 2, progress: none}
"""


def resolve(text, tmp_path, *overrides):
    np.savez(tmp_path / "data.npz", x=X, y=Y, other=X)
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("PATH", str(tmp_path / "data.npz")))
    return experiments.resolve(str(path), overrides)


def train(text, tmp_path, *overrides):
    experiment = resolve(text, tmp_path, *overrides)
    run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    trainer = experiments.build_trainer(experiment, run_dir=run_dir)
    return trainer.train().history, run_dir


def test_files_examples_and_batches_are_the_same(tmp_path):
    wanted, run_dir = train(NPZ, tmp_path)
    assert len(wanted["val_loss"]) == 2
    assert "type: npz" in (run_dir / "config.yaml").read_text()
    start, end = NPZ.index("    type: npz"), NPZ.index("  validation:")
    for train_data in (
        "type: tests.test_data_config:Batches",
        "type: tests.test_data_config:examples\n"
        "    batch_size: 4\n    shuffle: false\n"
        "    transform: tests.test_data_config:doubled\n    workers: 1",
    ):
        text = f"{NPZ[:start]}    {train_data}\n{NPZ[end:]}"
        found, _ = train(text, tmp_path)
        if "Batches" not in train_data:  # a PyDataset is shuffled
            assert found == wanted


def test_a_split_that_is_not_named_is_the_tasks(tmp_path):
    start = NPZ.index("  validation:")
    text = NPZ[:start] + NPZ[NPZ.index("trainer:") :]
    found, _ = train(text, tmp_path)
    assert "val_loss" not in found
    found, _ = train(text.replace(":Mean", ":Own"), tmp_path)
    assert len(found["val_loss"]) == 2


def test_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = np.full((5, 4, 3), 10 * i, "uint8")
            image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    spec = DataConfig(
        type="image_folder",
        config={"path": str(tmp_path), "image_size": [4, 4]},
        batch_size=2,
    )
    experiment = legato.Experiment(
        task="tests.test_data_config:Mean", data={"train": spec}
    )
    task = experiments.build_task(experiment)
    source = task.configured_inputs["train"]()
    images, labels = source.batch_spec(2)
    assert images.shape == (2, 4, 4, 3) and labels.dtype == np.int32


def words():
    """Sequences of one to six pairs, and what they add up to."""
    rng = np.random.default_rng(0)
    found = [rng.normal(size=(1 + i % 6, 2)) for i in range(N)]
    return [(x.astype("float32"), x.sum((0, 1))[None]) for x in found]


def length(example):
    return len(example[0])


class Sums(Mean):
    def build_model(self):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((None, 2))
        outputs = keras.layers.Dense(1)(keras.ops.sum(inputs, 1))
        return keras.Model(inputs, outputs)


class OwnSums(Sums):
    def build_inputs(self, split):
        if split == "validation":
            return None
        return legato.RandomAccessSource(
            words(),
            4,
            bucket_by=legato.Buckets(length, [3, 6], batch_sizes=[4, 2]),
            collate=legato.Pad([0, None], boundaries=[3, 6]),
        )


BUCKETS = """
task: tests.test_data_config:Sums
data:
  train:
    type: tests.test_data_config:words
    batch_size: 4
    bucket_by:
      lengths: tests.test_data_config:length
      boundaries: [3, 6]
      batch_sizes: [4, 2]
    pad: {values: [0, null], boundaries: [3, 6]}
trainer: {epochs: 2, progress: none}
"""


def test_sequences_in_buckets_are_as_in_python(tmp_path):
    found, run_dir = train(BUCKETS, tmp_path)
    assert "bucket_by" in (run_dir / "config.yaml").read_text()
    own = "task: tests.test_data_config:OwnSums\ntrainer: {epochs: 2}\n"
    wanted, _ = train(own, tmp_path)
    assert found == wanted


def first_two(examples):
    features = np.stack([np.resize(x, (2, 2)) for x, _ in examples])
    return features, np.stack([y for _, y in examples])


def test_a_collate_of_the_users(tmp_path):
    start, end = BUCKETS.index("    bucket_by"), BUCKETS.index("trainer")
    collate = "    collate: tests.test_data_config:first_two\n"
    found, _ = train(BUCKETS[:start] + collate + BUCKETS[end:], tmp_path)
    assert len(found["loss"]) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bucket_by.boundaries=[6,3]", r"yaml:8:7.*each above the one before"),
        ("bucket_by.lengths=tests.test_data_config:absent", "absent"),
        ("bucket_by.batch_sizes=[4]", "batch_sizes"),
        ("pad.multiple=2", "pad: boundaries and multiple were both given"),
        ("pad.boundary=[3]", "boundary"),
        ("collate=a.b:c", "collate and pad each say"),
    ],
)
def test_mistakes_in_buckets_are_named(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        experiment = resolve(BUCKETS, tmp_path, f"data.train.{override}")
        experiments.build_trainer(experiment, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.type=npy", "data.train.type.*must be npz, image_folder"),
        ("data.train.select=[x,z]", "data.train.select.*no 'z', but x, y, oth"),
        ("data.train.batch_size=null", "gives single examples: say how many"),
        ("data.train.batch_size=0", "data.train.batch_size"),
        ("data.train.config.file=3", "data.train.config.*file"),
        ("data.train.transform=noise", r"package\.module:Name"),
        ("data.test={type: npz}", "data.*train.*validation"),
        ("data.validation.type=tests.test_data_config:absent", "absent"),
        (
            "data.validation={type: 'a:b', workers: 2}",
            "workers say how batches are made of examples, and there is no",
        ),
    ],
)
def test_mistakes_are_named(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        experiment = resolve(NPZ, tmp_path, override)
        experiments.build_trainer(experiment, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there(tmp_path):
    experiment = resolve(NPZ, tmp_path, "data.train.config.path=none.npz")
    with pytest.raises(DataError, match=r"none\.npz"):
        experiments.build_trainer(experiment, run_dir=tmp_path / "run")


@pytest.mark.any_backend
def test_batches_in_a_resolved_config_read_back(tmp_path):
    spec = {"train": DataConfig(type="tests.test_data_config:Batches")}
    experiment = legato.Experiment(task="a.b:C", data=spec)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(experiment))
    assert validate(legato.Experiment, load_yaml(path), source="") == experiment
