"""Keras's callbacks in `legato.fit`, in processes that are really killed."""

import keras
import pytest
from fit_runs import fit, read_events, rows

# Before the first checkpoint; in mid-epoch; at an epoch's end; in the last;
# and before anything is restored.
KILLS = [
    ("on_train_begin", 0),
    ("on_train_batch_end", 2),
    ("on_train_batch_end", 8),
    ("on_train_begin", 0),
    ("on_epoch_end", 10),
    ("on_train_batch_begin", 17),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Gives runs that were never killed, each made once."""
    made = {}

    def get(scenario):
        if scenario not in made:
            out = tmp_path_factory.mktemp("whole") / scenario
            made[scenario] = out, fit(out, scenario)
        return made[scenario]

    return get


@pytest.mark.any_backend
def test_tensorboard(tmp_path, whole):
    pytest.importorskip("tensorflow")
    theirs, expected = whole("boards")
    kept = tmp_path / "logs" / "train" / "events.out.tfevents.17.other.v2"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    result = fit(tmp_path, "boards", *KILLS)
    assert kept.exists()
    assert result == expected
    for split in ("logs/train", "logs/validation", "logs2/train"):
        ours = read_events(tmp_path / split)
        tags = [tag for tag, _, _ in ours]
        # The graph, epochs, batches, weights: none is missing in both.
        others = read_events(theirs / split)
        if split == "logs2/train":  # two files are being written at a time
            ours, others = sorted(ours), sorted(others)
        assert ours == others
        if split == "logs/train":
            assert tags.count("keras") == 1
            assert tags.count("epoch_loss") == 4
            assert tags.count("batch_loss") == 4
            assert any("histogram" in tag for tag in tags)
            assert any("image" in tag for tag in tags)
        if split == "logs2/train":
            assert tags.count("keras") == 1
            assert tags.count("epoch_loss") == 8


def test_callbacks_with_files(tmp_path, whole):
    theirs, expected = whole("files")
    result = fit(tmp_path, "files", *KILLS)
    assert result == expected
    for name in ("new.csv", "old.csv", "begun.csv"):
        ours = (tmp_path / name).read_bytes()
        assert ours == (theirs / name).read_bytes()
    assert [row[0] for row in rows(tmp_path / "old.csv")] == [
        *("epoch", "0"),
        *("0", "1", "2", "3"),
    ]
    assert len(rows(tmp_path / "begun.csv")) == 5
    weights = "*.weights.h5"
    names = sorted(path.name for path in theirs.glob(weights))
    assert sorted(path.name for path in tmp_path.glob(weights)) == names
    assert len(names) == 5
    one, other = (
        keras.models.load_model(out / "best.keras").get_weights()
        for out in (tmp_path, theirs)
    )
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scenario", ["rates", "swaps"])
def test_callbacks_that_change_the_model(tmp_path, whole, scenario):
    theirs, expected = whole(scenario)
    result = fit(tmp_path, scenario, *KILLS[: 5 if scenario == "rates" else 6])
    assert result == expected
    if scenario == "swaps":
        csv = (tmp_path / "new.csv").read_bytes()
        assert csv == (theirs / "new.csv").read_bytes()
    else:
        assert result["history"]["seen"] == [1.0, 2.0, 3.0]  # stopped early


@pytest.mark.any_backend
def test_tensorboard_at_each_batch(tmp_path, whole):
    pytest.importorskip("tensorflow")
    theirs, expected = whole("batches")
    # The last before the checkpoint of the first process is on disk.
    kills = [("on_train_batch_end", 1), *KILLS[2:]]
    assert fit(tmp_path, "batches", *kills) == expected
    for split in ("logs/train", "logs/validation"):
        assert read_events(tmp_path / split) == read_events(theirs / split)
    tags = [tag for tag, _, _ in read_events(tmp_path / "logs/train")]
    assert tags.count("batch_loss") == 20
