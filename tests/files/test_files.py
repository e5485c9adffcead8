"""Image folders, annotations and archives, on small samples made here."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from legato import files
from legato.errors import ConfigError, DataError
from legato.workers import Job, Pad, Recipe, stack


def image(path, color, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    image(root / "dog" / "b.png", (10, 20, 30))
    image(root / "dog" / "a.PNG", (40, 50, 60), size=(8, 8))
    image(root / "cat" / "deep" / "x.jpg", (200, 200, 200))
    image(root / "cat" / "grey.png", 7, mode="L")
    image(root / ".hidden" / "no.png", (0, 0, 0))
    image(root / "dog" / ".no.png", (0, 0, 0))
    (root / "dog" / "notes.txt").write_text("no image")
    return root


def test_a_folder_for_each_class(folder):
    dataset = files.ImageFolder(folder)
    assert dataset.class_names == ["cat", "dog"]
    assert len(dataset) == 4
    names = [path.rpartition("/")[2] for path in dataset.paths]
    assert names == ["x.jpg", "grey.png", "a.PNG", "b.png"]
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    pixels, label = dataset[3]
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    assert (pixels == [10, 20, 30]).all() and label == 1
    assert (dataset[1][0] == 7).all()


def test_images_of_one_size_make_batches(folder):
    dataset = files.ImageFolder(folder, image_size=(5, 7), channels=1)
    recipe = Recipe(dataset, None, stack, "images")
    images, labels = recipe.make(Job(0, 0, 0, np.arange(4)), alone=True)
    assert images.shape == (4, 5, 7, 1) and labels.dtype == np.int32
    again = pickle.loads(pickle.dumps(dataset))
    assert (again[2][0] == images[2]).all()


def test_resizing_is_pillows_own_with_antialiasing(folder):
    rows = np.random.default_rng(0).integers(0, 255, (16, 12, 3), np.uint8)
    Image.fromarray(rows).save(folder / "cat" / "noise.png")
    dataset = files.ImageFolder(folder, image_size=(4, 4))
    (index,) = [i for i, p in enumerate(dataset.paths) if "noise" in p]
    means = rows.reshape(4, 4, 4, 3, 3).mean(axis=(1, 3))
    assert abs(dataset[index][0] - means).mean() < 12
    assert dataset[index][0].std() < rows.std() / 2


def test_jpegs_are_made_smaller_and_still_look_the_same(folder):
    rows = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    large = Image.fromarray(rows).resize((200, 160))
    large.save(folder / "cat" / "large.jpg", quality=95)
    expected = np.asarray(large.resize((50, 40))).astype(int)
    dataset = files.ImageFolder(folder, image_size=(40, 50))
    (index,) = [i for i, p in enumerate(dataset.paths) if "large" in p]
    found = dataset[index][0].astype(int)
    assert found.shape == (40, 50, 3)
    assert abs(found - expected).mean() < 6
    again = files.ImageFolder(folder, image_size=(40, 50))[index][0]
    assert (again == found).all()


def test_class_names_choose_and_order(folder):
    dataset = files.ImageFolder(folder, class_names=["dog", "cat"])
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert "dog" in dataset.paths[0]
    with pytest.raises(DataError, match=r"'bird'.*cat, dog"):
        files.ImageFolder(folder, class_names=["bird"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: b"GIF" + data,
        lambda data: data[: len(data) // 2],
    ],
)
def test_a_damaged_image_is_named(folder, spoil):
    path = folder / "dog" / "b.png"
    path.write_bytes(spoil(path.read_bytes()))
    dataset = files.ImageFolder(folder)
    with pytest.raises(DataError, match=r"b\.png.*cannot be read"):
        dataset[3]


def test_what_is_no_folder_of_images_is_refused(tmp_path, folder):
    with pytest.raises(DataError, match="is no folder"):
        files.ImageFolder(tmp_path / "gone")
    with pytest.raises(DataError, match="no images in sub-folders"):
        files.ImageFolder(folder / "dog")
    with pytest.raises(ConfigError, match="channels=2"):
        files.ImageFolder(folder, channels=2)
    for channels in (True, [3]):
        with pytest.raises(ConfigError, match="channels="):
            files.ImageFolder(folder, channels=channels)
    with pytest.raises(ConfigError, match="class_names holds 'cat' twice"):
        files.ImageFolder(folder, class_names=["cat", "dog", "cat"])
    for size in ((0, 4), (4,), (4, 4, 3), 8, "88", (8.5, 8), (True, 8)):
        with pytest.raises(ConfigError, match="image_size="):
            files.ImageFolder(folder, image_size=size)


def test_pixels_of_16_bits_lose_the_lower_half(folder):
    rows = np.linspace(0, 65535, 64).reshape(8, 8).astype("uint16")
    for name in ("high.png", "high.tif"):
        Image.fromarray(rows).save(folder / "cat" / name)
    dataset = files.ImageFolder(folder, channels=1)
    names = [path.rpartition("/")[2] for path in dataset.paths]
    for name in ("high.png", "high.tif"):
        pixels, _ = dataset[names.index(name)]
        assert (pixels[..., 0] == rows // 256).all()


def test_pixels_of_no_known_range_are_refused(folder):
    for dtype, what in (("float32", "floats"), ("int32", "integers")):
        path = folder / "cat" / f"{dtype}.tif"
        Image.fromarray(np.ones((4, 4), dtype)).save(path)
        dataset = files.ImageFolder(folder)
        index = dataset.paths.index(str(path))
        with pytest.raises(DataError, match=rf"{dtype}\.tif.* {what}.*8 or 16"):
            dataset[index]


# -- COCO ---------------------------------------------------------------------


def annotations():
    return {
        "images": [
            {"id": 9, "file_name": "wide.png", "width": 8, "height": 4},
            {"id": 2, "file_name": "none.png", "width": 4, "height": 4},
        ],
        "categories": [
            {"id": 44, "name": "cup"},
            {"id": 7, "name": "train"},
        ],
        "annotations": [
            {
                "id": 5,
                "image_id": 9,
                "category_id": 44,
                "bbox": [1, 0.5, 4, 2],
                "area": 7.5,
                "iscrowd": 1,
                "segmentation": {"size": [4, 8], "counts": [4, 8, 20]},
            },
            {
                "id": 3,
                "image_id": 9,
                "category_id": 7,
                "bbox": [0, 0, 2, 2],
                "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]],
            },
        ],
    }


@pytest.fixture
def coco(tmp_path):
    image(tmp_path / "wide.png", (1, 2, 3), size=(8, 4))
    image(tmp_path / "none.png", (4, 5, 6), size=(4, 4))

    def write(found):
        path = tmp_path / "found.json"
        path.write_text(json.dumps(found))
        return path, tmp_path

    return write


def test_objects_of_images(coco):
    dataset = files.CocoDetection(*coco(annotations()))
    assert dataset.category_ids == [7, 44]
    assert dataset.class_names == ["train", "cup"]
    assert dataset.image_ids == [2, 9] and len(dataset) == 2
    pixels, labels = dataset[1]
    assert pixels.shape == (4, 8, 3)
    assert labels["source_id"] == 9
    assert labels["boxes"].tolist() == [[0, 0, 2, 2], [1, 0.5, 5, 2.5]]
    assert labels["boxes"].dtype == np.float32
    assert labels["classes"].tolist() == [0, 1]
    assert labels["is_crowds"].tolist() == [False, True]
    assert labels["areas"].tolist() == [4, 7.5]
    assert labels["annotation_ids"].tolist() == [3, 5]
    assert "masks" not in labels
    _, none = dataset[0]
    assert none["boxes"].shape == (0, 4) and none["classes"].shape == (0,)


def test_boxes_are_resized_with_their_image_and_padded(coco):
    dataset = files.CocoDetection(*coco(annotations()), image_size=(8, 8))
    pixels, labels = dataset[1]
    assert pixels.shape == (8, 8, 3)
    assert labels["boxes"].tolist() == [[0, 0, 2, 4], [1, 1, 5, 5]]
    assert labels["image_scale"].tolist() == [2, 1]
    assert (labels["height"], labels["width"]) == (4, 8)
    pad = Pad(dataset.padding, boundaries=[3])
    recipe = Recipe(dataset, None, pad, "coco")
    images, found = recipe.make(Job(0, 0, 0, np.arange(2)), alone=True)
    assert images.shape == (2, 8, 8, 3)
    assert found["boxes"].shape == (2, 3, 4)
    assert found["classes"].tolist() == [[-1, -1, -1], [0, 1, -1]]
    assert found["source_id"].tolist() == [2, 9]


def test_masks_of_polygons_and_run_lengths(coco):
    pytest.importorskip("faster_coco_eval")
    found = annotations()
    _, labels = files.CocoDetection(*coco(found), masks=True)[1]
    polygon, runs = labels["masks"]
    assert polygon.shape == (4, 8) and polygon[:2, :2].all()
    assert polygon.sum() == 4
    assert runs[:, 1:3].all() and runs.sum() == 8
    from pycocotools import mask

    text = mask.encode(np.asfortranarray(runs.astype("uint8")))
    text["counts"] = text["counts"].decode()
    found["annotations"][0]["segmentation"] = text
    _, labels = files.CocoDetection(*coco(found), masks=True)[1]
    assert (labels["masks"][1] == runs).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f.pop("images"), ["'images' is missing"]),
        (lambda f: f.update(categories=[]), ["categories is empty"]),
        (lambda f: f["images"][1].pop("file_name"), ["images[1]", "file_name"]),
        (lambda f: f["images"][1].update(id=9), ["images[1]", "id 9"]),
        (lambda f: f["images"].append(3), ["images[2] is no object"]),
        (
            lambda f: f["annotations"][1].update(category_id=8),
            ["annotations[1]", "category_id 8", "categories"],
        ),
        (
            lambda f: f["annotations"][0].update(image_id=[2]),
            ["annotations[0]", "image_id [2]", "images"],
        ),
        (
            lambda f: f["annotations"][0].update(bbox=[0, 0, -1, 2]),
            ["annotations[0]", "[0, 0, -1, 2]", "width, height"],
        ),
        (
            lambda f: f["annotations"][0].update(bbox=[0, 0, float("nan"), 2]),
            ["annotations[0]", "finite"],
        ),
        (
            lambda f: f["annotations"][0].update(id="5"),
            ["annotations[0]", "id '5'", "int"],
        ),
        (
            lambda f: f["annotations"][0].pop("segmentation"),
            ["annotations[0]", "segmentation None", "masks=True"],
        ),
        *(
            (
                lambda f, s=s: f["annotations"][1].update(segmentation=s),
                ["annotations[1]", "segmentation", "polygons", "run lengths"],
            )
            for s in (
                [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [1, 2, 3, 4, 5, 6],
                {"size": [4, 8]}, {"size": [4, 8], "counts": [1, -1]},
                {"size": 4, "counts": "abc"}, [["a"] * 6],
            )
        ),
        *(
            (
                lambda f, a=area: f["annotations"][1].update(area=a),
                ["annotations[1]", "area", "0 or more"],
            )
            for area in (None, "x", float("nan"), -3, True)
        ),
        (
            lambda f: f["annotations"][0].update(iscrowd="0"),
            ["annotations[0]", "iscrowd '0'", "0 or 1"],
        ),
        (
            lambda f: f["annotations"][0].update(bbox=[0, 0, 10**400, 2]),
            ["annotations[0]", "finite"],
        ),
        (lambda f: f["images"][0].update(id=-1), ["images[0]", "0 or more"]),
        (lambda f: f["images"][0].update(id=2**70), ["images[0]", "2**63"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(coco, change, words):
    found = annotations()
    change(found)
    with pytest.raises(DataError) as caught:
        files.CocoDetection(*coco(found), masks=True)
    for word in ["found.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "runs",
    [
        {"size": [4, 7], "counts": [28]},
        {"size": [4, 8], "counts": [28]},
        {"size": [4, 8], "counts": [99]},
        {"size": [4, 8], "counts": "~~~~"},
    ],
)
def test_a_mask_of_another_image_is_named(coco, runs):
    pytest.importorskip("faster_coco_eval")
    found = annotations()
    found["annotations"][0]["segmentation"] = runs
    dataset = files.CocoDetection(*coco(found), masks=True)
    with pytest.raises(
        DataError, match=r"found\.json.*annotation 5 .*height 4"
    ):
        dataset[1]


def test_masks_are_padded(coco):
    pytest.importorskip("faster_coco_eval")
    paths = coco(annotations())
    image(paths[1] / "none.png", (4, 5, 6), size=(8, 4))
    dataset = files.CocoDetection(*paths, image_size=(4, 8), masks=True)
    pad = Pad(dataset.padding, boundaries=[3])
    recipe = Recipe(dataset, None, pad, "coco")
    _, found = recipe.make(Job(0, 0, 0, np.arange(2)), alone=True)
    assert found["masks"].shape == (2, 3, 4, 8)
    assert found["masks"].sum((2, 3)).tolist() == [[0, 0, 0], [4, 8, 0]]


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_what_is_no_annotation_file_is_refused(tmp_path, text):
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"found\.json"):
        files.CocoDetection(path, tmp_path)
    with pytest.raises(DataError, match=r"gone\.json.*FileNotFound"):
        files.CocoDetection(tmp_path / "gone.json", tmp_path)


# -- archives -----------------------------------------------------------------

ARRAYS = {
    "x": np.arange(24, dtype="float32").reshape(6, 4),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(3),
    "text": np.array(["a", "bc"]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_of_arrays(save, tmp_path):
    save(tmp_path / "data.npz", **ARRAYS)
    found = files.npz(tmp_path / "data.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert (found[name] == array).all()
    assert isinstance(found["x"], np.memmap) is (save is np.savez)


def test_nothing_in_an_archive_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "data.npz"
    np.savez(path, x=np.array([Evil()], object))
    with pytest.raises(DataError, match="allow_pickle"):
        files.npz(path)


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "data.npz"
    x = np.random.default_rng(0).integers(0, 4, (1000, 10))
    np.savez_compressed(path, x=x)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 29):
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
        )
        try:
            found = files.npz(path)
        except DataError as error:
            assert "data.npz" in str(error)
            refused += 1
        else:  # a name, or a date
            assert all((each == x).all() for each in found.values())
    assert refused > 0.9 * len(whole) / 29


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "data.npz"
    if content is None:
        np.savez(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.npz"):
        files.npz(path)


def test_a_library_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"legato\[images\]"):
        files.ImageFolder(folder)


def test_nothing_slow_is_imported():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from legato import files; files.npz; print([m for m "
            "in ('keras', 'PIL', 'faster_coco_eval') if m in sys.modules])",
        ],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr
