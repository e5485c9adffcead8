"""COCO's figures, against those of pycocotools."""

import contextlib
import copy
import io
import json
import sys

import ml_dtypes
import numpy as np
import pytest
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from legato.errors import ConfigError, DataError, LegatoWarning
from legato.metrics import CocoMetric

CATEGORIES = {1: "person", 3: "car", 7: "kite", 44: "nothing", 90: "brush"}
NAMES = [
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
]  # fmt: skip


def random_boxes(random, count, size):
    """As left, top, right, bottom in float32, small, medium and large."""
    height, width = size
    extent = random.choice([12, 25, 60, 110], (count, 2)) * random.uniform(
        0.5, 1, (count, 2)
    )
    corner = random.uniform(0, 1, (count, 2)) * (
        np.array([width, height]) - extent
    ).clip(0)
    return np.concatenate([corner, corner + extent], 1).astype("float32")


def random_mask(random, box, size):
    """An ellipse in the box, with a bite."""
    y, x = np.mgrid[: size[0], : size[1]]
    centre, radius = (box[2:] + box[:2]) / 2, (box[2:] - box[:2]) / 2
    inside = ((x - centre[0]) / radius[0]) ** 2 + (
        (y - centre[1]) / radius[1]
    ) ** 2 <= 1
    return inside & (x + y > box[:2].sum() + random.uniform(0, 20))


def random_image(random, key, *, masks):
    """Some objects, and detections of some of them that tie in scores."""
    size = (int(random.integers(100, 150)), int(random.integers(100, 150)))
    count = int(random.integers(0, 7))
    boxes = random_boxes(random, count, size)
    classes = random.choice([1, 3, 7], count)
    crowds = random.random(count) < 0.2
    near = np.repeat(np.arange(count), random.integers(0, 3, count))
    found = boxes[near] + random.normal(0, 1.5, (len(near), 4)).astype(
        "float32"
    )
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    found_classes = np.where(
        random.random(len(near)) < 0.8, classes[near], random.choice([3, 90])
    )
    wrong = int(random.integers(0, 4))
    found = np.concatenate([found, random_boxes(random, wrong, size)])
    found_classes = np.concatenate(
        [found_classes, random.choice([1, 3, 7, 90], wrong)]
    )
    image = {
        "id": key,
        "size": size,
        "boxes": boxes,
        "classes": classes,
        "crowds": crowds,
        "areas": random.uniform(50, 12000, count).astype("float32"),
        "found": found,
        "found_classes": found_classes,
        "scores": random.integers(0, 10, len(found)).astype("float32") / 10,
    }
    if masks:
        for of, name in (("boxes", "masks"), ("found", "found_masks")):
            made = [random_mask(random, box, size) for box in image[of]]
            image[name] = np.array(made, bool).reshape(-1, *size)
    return image


def random_images(seed, count=24, *, masks=False):
    random = np.random.default_rng(seed)
    ids = random.choice(10000, count, replace=False)
    return [random_image(random, int(key), masks=masks) for key in ids]


def corners_to_xywh(box):
    box = [float(each) for each in box]
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def as_rle(mask):
    rle = reference_masks.encode(np.asfortranarray(mask.astype("uint8")))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def reference_truth(images, *, masks=False, areas=False):
    annotations = []
    for image in images:
        for index, box in enumerate(image["boxes"]):
            box = corners_to_xywh(box)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": int(image["classes"][index]),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(image["crowds"][index]),
            }
            if masks:
                mask = image["masks"][index]
                annotation["segmentation"] = as_rle(mask)
                annotation["area"] = float(mask.sum())
            if areas:
                annotation["area"] = float(image["areas"][index])
            annotations.append(annotation)
    return {
        "images": [
            {"id": i["id"], "height": i["size"][0], "width": i["size"][1]}
            for i in images
        ],
        "categories": [{"id": k, "name": v} for k, v in CATEGORIES.items()],
        "annotations": annotations,
    }


def reference(images, truth, *, masks=False, categories=None):
    """The twelve figures as pycocotools has them."""
    results = []
    for image in images:
        for index, box in enumerate(image["found"]):
            result = {
                "image_id": image["id"],
                "category_id": int(image["found_classes"][index]),
                "score": float(image["scores"][index]),
            }
            if masks:
                result["segmentation"] = as_rle(image["found_masks"][index])
            else:
                result["bbox"] = corners_to_xywh(box)
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truths = COCO()
        truths.dataset = copy.deepcopy(truth)
        truths.createIndex()
        found = truths.loadRes(results) if results else COCO()
        evaluator = COCOeval(truths, found, "segm" if masks else "bbox")
        evaluator.params.imgIds = sorted(image["id"] for image in images)
        if categories is not None:
            evaluator.params.catIds = categories
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(NAMES, evaluator.stats.tolist(), strict=True))


def stack(arrays, fill, shape=()):
    """One array of arrays of different sizes, filled up."""
    arrays = [np.asarray(each) for each in arrays]
    sizes = np.array([each.shape for each in arrays]).max(0)
    sizes[0] += 2
    out = np.full((len(arrays), *sizes), fill, arrays[0].dtype)
    for row, each in enumerate(arrays):
        out[(row, *map(slice, each.shape))] = each
    return out


def batch_of(images, *, masks=False, areas=False, padding=0):
    """Labels and outputs, with padded boxes, and padded images at the end."""
    images = images + [images[0] | {"id": -1}] * padding
    labels = {
        "source_id": np.array([image["id"] for image in images], "int32"),
        "boxes": stack([i["boxes"] for i in images], -1),
        "classes": stack([i["classes"] for i in images], -1),
        "is_crowds": stack([i["crowds"].astype("int32") for i in images], 0),
    }
    outputs = {
        "detection_boxes": stack([i["found"] for i in images], 0),
        "detection_classes": stack([i["found_classes"] for i in images], 1),
        "detection_scores": stack([i["scores"] for i in images], 0.9),
        "num_detections": np.array([len(i["found"]) for i in images]),
    }
    if areas:
        labels["areas"] = stack([i["areas"] for i in images], 0)
    if masks:
        labels |= {
            "height": np.array([i["size"][0] for i in images]),
            "width": np.array([i["size"][1] for i in images]),
            "masks": stack([i["masks"] for i in images], True),
        }
        outputs["detection_masks"] = stack(
            [i["found_masks"] for i in images], True
        )
    return labels, outputs


def measured(images, *, batch=5, padding=0, masks=False, areas=False, **more):
    metric = CocoMetric(
        **{"box_format": "xyxy", "categories": CATEGORIES}
        | {"include_mask": masks}
        | more
    )
    for first in range(0, len(images), batch):
        labels, outputs = batch_of(
            images[first : first + batch],
            masks=masks,
            areas=areas,
            padding=padding,
        )
        metric.update_state(labels, outputs)
    return metric.result()


def check(figures, expected, prefix=""):
    # (faster-coco-eval divides with an error of 2e-16 more or less.)
    found = {name: figures[prefix + name] for name in NAMES}
    assert found == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("areas", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_boxes(seed, areas):
    images = random_images(seed)
    truth = reference_truth(images, areas=areas)
    figures = measured(images, areas=areas, per_category=True)
    expected = reference(images, truth)
    check(figures, expected)
    # The comparison is of something.
    assert 0.1 < expected["AP"] < 0.9 and expected["APs"] != expected["APl"]
    assert list(figures["by_category"]) == list(CATEGORIES.values())
    for key, name in CATEGORIES.items():
        one = reference(images, truth, categories=[key])
        check(figures["by_category"][name], one)
    assert set(figures["by_category"]["nothing"].values()) == {-1.0}


@pytest.mark.parametrize("areas", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_masks(seed, areas):
    images = random_images(10 + seed, 12, masks=True)
    truth = reference_truth(images, masks=True, areas=areas)
    figures = measured(images, masks=True, areas=areas, per_category=True)
    check(figures, reference(images, truth))
    expected = reference(images, truth, masks=True)
    check(figures, expected, "mask_")
    assert 0.05 < expected["AP"] < 0.9
    for key, name in CATEGORIES.items():
        one = reference(images, truth, masks=True, categories=[key])
        check(figures["by_category"][name], one, "mask_")


def test_more_detections_than_count():
    """Above a hundred of a category in an image."""
    random = np.random.default_rng(5)
    image = random_image(random, 3, masks=False)
    image["found"] = random_boxes(random, 150, image["size"])
    image["found_classes"] = np.ones(150, int)
    image["scores"] = random.integers(0, 5, 150).astype("float32") / 5
    image["boxes"] = image["found"][::10].copy()
    image["classes"] = np.ones(15, int)
    image["crowds"] = np.arange(15) == 3
    check(measured([image]), reference([image], reference_truth([image])))


def polygon(box):
    left, top, right, bottom = map(float, box)
    return [[left, top, right, top, right, bottom, left, bottom]]


def test_annotation_file(tmp_path):
    images = random_images(20, 12, masks=True)
    truth = reference_truth(images, masks=True)
    for number, annotation in enumerate(truth["annotations"]):
        if number % 3 == 0:
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = polygon([x, y, x + width, y + height])
        elif number % 3 == 1:  # run lengths as a plain list
            rle = annotation["segmentation"]
            flat = reference_masks.decode(rle).T.reshape(-1)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
            runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
            annotation["segmentation"] = {
                "size": rle["size"],
                "counts": runs.tolist(),
            }
    expected = json.loads(json.dumps(truth))
    for each in (*truth["annotations"], *truth["categories"]):
        key = "id" if "name" in each else "category_id"
        each[key] = str(each[key])  # as some write ids
    # COCO's own tools take the id 0 for "not found".
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    seen = images[:8]  # the file has more
    metric = CocoMetric(
        path, box_format="xyxy", include_mask=True, per_category=True
    )
    for part in (seen[:5], seen[5:]):
        labels, outputs = batch_of(part, masks=True, padding=1)
        metric.update_state({"source_id": labels["source_id"]}, outputs)
    figures = metric.result()
    check(figures, reference(seen, expected))
    check(figures, reference(seen, expected, masks=True), "mask_")
    assert list(figures["by_category"]) == list(CATEGORIES.values())


def check_boxes(metric, images):
    """Figures do not see what turns or shifts labels and outputs alike."""
    for image in images:
        kept = metric._images[image["id"]]
        for boxes, of in (("boxes", kept.truths), ("found", kept.detections)):
            original = [corners_to_xywh(box) for box in image[boxes]]
            assert of.boxes.tolist() == original


@pytest.mark.parametrize("box_format", ["yxyx", "xywh"])
def test_box_formats(box_format):
    images = random_images(30)
    metric = CocoMetric(box_format=box_format, categories=CATEGORIES)
    labels, outputs = batch_of(images)
    for tree, key in ((labels, "boxes"), (outputs, "detection_boxes")):
        boxes = tree[key].astype("float64")
        if box_format == "yxyx":
            tree[key] = boxes[..., [1, 0, 3, 2]]
        else:
            boxes[..., 2:] -= boxes[..., :2]
            tree[key] = boxes
    metric.update_state(labels, outputs)
    check_boxes(metric, images)
    check(metric.result(), reference(images, reference_truth(images)))


@pytest.mark.parametrize("masks", [False, True])
def test_batches_and_padding_change_nothing(masks):
    images = random_images(40, 9, masks=masks)
    at_once = measured(images, batch=9, masks=masks)
    assert measured(images, batch=2, padding=1, masks=masks) == at_once
    # Padding by weight, with ids that came before.
    metric = CocoMetric(
        box_format="xyxy", categories=CATEGORIES, include_mask=masks
    )
    for first in (0, 5):
        part = images[first : first + 5]
        batch = part + [images[0]] * (5 - len(part))
        labels, outputs = batch_of(batch, masks=masks)
        weight = np.float32([1] * len(part) + [0] * (5 - len(part)))
        metric.update_state(labels, outputs, sample_weight=weight)
    assert metric.result() == at_once
    assert metric.result() == at_once  # it resets nothing
    metric.reset_state()
    assert set(metric.result().values()) == {-1.0}
    labels, outputs = batch_of(images, masks=masks)
    metric.update_state(labels, outputs)
    assert metric.result() == at_once


@pytest.mark.parametrize("wrong", [-1, 99])
def test_more_detections_than_there_are_boxes_are_refused(wrong):
    metric = CocoMetric(box_format="xyxy", categories=CATEGORIES)
    labels, outputs = batch_of(random_images(45))
    outputs["num_detections"] = outputs["num_detections"].copy()
    outputs["num_detections"][0] = wrong
    with pytest.raises(DataError, match=rf"'num_detections'\] holds {wrong}"):
        metric.update_state(labels, outputs)


@pytest.mark.parametrize("how", ["class", "score", "num_detections"])
def test_padded_detections(how):
    images = random_images(45)
    metric = CocoMetric(box_format="xyxy", categories=CATEGORIES)
    labels, outputs = batch_of(images)
    padded = (
        np.arange(outputs["detection_scores"].shape[1])
        >= outputs["num_detections"][:, None]
    )
    if how != "num_detections":
        outputs.pop("num_detections")
        outputs["detection_boxes"][padded] = np.nan
    if how == "class":
        outputs["detection_classes"][padded] = -1
        outputs["detection_scores"][padded] = np.nan
    elif how == "score":
        outputs["detection_scores"][padded] = -1
    metric.update_state(labels, outputs)
    check(metric.result(), reference(images, reference_truth(images)))


def test_boxes_of_a_scaled_image():
    images = random_images(50)
    expected = measured(images)
    random = np.random.default_rng(0)
    # Powers of two, so that no bit is lost.
    scale = 2.0 ** random.integers(-2, 3, (len(images), 2))
    offset = random.integers(0, 3, (len(images), 2)) * 4.0
    for key in ("image_info", "image_scale"):
        shift = offset if key == "image_info" else np.zeros_like(offset)
        labels, outputs = batch_of(images)
        for tree, boxes in ((labels, "boxes"), (outputs, "detection_boxes")):
            to = np.tile(scale[:, ::-1], 2)[:, None]
            by = np.tile(shift[:, ::-1], 2)[:, None]
            tree[boxes] = tree[boxes].astype("float64") * to - by
        labels["image_scale"] = scale
        if key == "image_info":
            labels["image_info"] = np.stack(
                [scale * 0 + 100, scale * 0 + 64, scale, shift],
                axis=1,
            )
        metric = CocoMetric(
            box_format="xyxy", categories=CATEGORIES, need_rescale_bboxes=True
        )
        metric.update_state(labels, outputs)
        assert metric.result() == pytest.approx(expected, abs=1e-12)
        check_boxes(metric, images)
    # One scale for both directions.
    labels, outputs = batch_of(images)
    labels["boxes"], labels["image_scale"] = labels["boxes"] / 2, [0.5] * 24
    outputs["detection_boxes"] = outputs["detection_boxes"] / 2
    metric.reset_state()
    metric.update_state(labels, outputs)
    assert metric.result() == expected


def test_run_lengths_and_kinds_of_masks():
    images = random_images(60, 6, masks=True)
    expected = measured(images, masks=True)
    labels, outputs = batch_of(images, masks=True)
    metric = CocoMetric(
        box_format="xyxy", categories=CATEGORIES, include_mask=True
    )
    for kind in ("float32", "uint8", ml_dtypes.bfloat16):
        for tree, key in ((labels, "masks"), (outputs, "detection_masks")):
            tree[key] = (tree[key] * 255).astype(kind) / (
                1 if kind != "float32" else 255
            )
            tree[key] = tree[key].astype(kind)
        metric.reset_state()
        metric.update_state(labels, outputs)
        assert metric.result() == expected
    # 0.5 is not inside.
    masks = np.where(outputs["detection_masks"], 0.6, 0.5)
    for each in (masks, masks.astype(ml_dtypes.bfloat16)):
        outputs["detection_masks"] = each
        metric.reset_state()
        metric.update_state(labels, outputs)
        assert metric.result() == expected
    for tree, key, masks in (
        (labels, "masks", "masks"),
        (outputs, "detection_masks", "found_masks"),
    ):
        count = tree[key].shape[1]
        tree[key] = [
            [as_rle(each) for each in image[masks]]
            + [None] * (count - len(image[masks]))
            for image in images
        ]
    del labels["height"]
    metric.reset_state()
    metric.update_state(labels, outputs)
    assert metric.result() == expected


def test_masks_are_kept_as_run_lengths():
    images = random_images(61, 3, masks=True)
    metric = CocoMetric(
        box_format="xyxy", categories=CATEGORIES, include_mask=True
    )
    metric.update_state(*batch_of(images, masks=True))
    for image in metric._images.values():
        for rle in [*image.truths.masks, *image.detections.masks]:
            assert isinstance(rle["counts"], bytes)
            assert len(rle["counts"]) < 1000


def emptied(images, *keys):
    return [
        {k: v[:0] if k in keys else v for k, v in each.items()}
        for each in images
    ]


TRUTH = ("boxes", "classes", "crowds", "areas")
FOUND = ("found", "found_classes", "scores")


def test_without_detections():
    images = emptied(random_images(70), *FOUND)
    figures = measured(images)
    check(figures, reference(images, reference_truth(images)))
    assert figures["AP"] == figures["AR100"] == 0


def test_without_truths():
    images = emptied(random_images(70), *TRUTH)
    figures = measured(images, per_category=True)
    assert set(figures.pop("by_category")) == set(CATEGORIES.values())
    assert set(figures.values()) == {-1.0}
    assert measured(images, categories=None) == figures


def test_without_anything():
    assert set(measured([]).values()) == {-1.0}
    images = emptied(random_images(70), *TRUTH, *FOUND)
    assert set(measured(images).values()) == {-1.0}


def test_only_crowds():
    images = random_images(71)
    for image in images:
        image["crowds"][:] = True
    figures = measured(images)
    check(figures, reference(images, reference_truth(images)))
    assert figures["AP"] == -1


def test_images_without_one_or_the_other():
    images = random_images(72)
    images = (
        emptied(images[:6], *TRUTH)
        + emptied(images[6:12], *FOUND)
        + emptied(images[12:14], *TRUTH, *FOUND)
        + images[14:]
    )
    check(measured(images), reference(images, reference_truth(images)))


def test_categories_from_labels():
    images = random_images(73)
    figures = measured(images, categories=None, per_category=True)
    expected = reference(images, reference_truth(images))
    check(figures, expected)
    assert list(figures["by_category"]) == ["1", "3", "7"]


def test_a_perfect_and_a_worthless_model():
    images = random_images(74)
    for image in images:
        image["found"] = image["boxes"].copy()
        image["found_classes"] = image["classes"].copy()
        image["scores"] = np.ones(len(image["classes"]), "float32")
    assert measured(images)["AP"] == 1
    for image in images:
        image["found_classes"] = np.full(len(image["classes"]), 90)
    assert measured(images)["AP"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"box_format": "cxcywh"}, '"xyxy", "yxyx" or "xywh"'),
        ({"categories": {}}, "not empty"),
        ({"categories": ["person"]}, "must be a dict"),
        ({"categories": {1: "a", 2: "a"}}, "different names"),
        ({"categories": {"1": "a"}}, "names by ids"),
        ({"categories": {-1: "a"}}, "at least 0"),
        ({"annotation_file": "gone.json"}, "gone.json.*cannot be read"),
        ({"name": ""}, "not empty"),
        ({"annotation_file": 3}, "annotation_file=3.*path"),
        ({"include_mask": "yes"}, "include_mask='yes'.*True or False"),
        ({"need_rescale_bboxes": 2}, "need_rescale_bboxes=2"),
        ({"per_category": None}, "per_category=None"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigError, match=words):
        CocoMetric(**{"box_format": "xyxy"} | arguments)


# Of what the library would never come back, or take it for a mask.
WRONG_RUNS = [
    ({"counts": [0, 50]}, "add up to 50"),
    ({"counts": [0, 5000]}, "add up to 5000"),
    ({"counts": []}, "add up to 0"),
    ({"counts": [1030, -6]}, "the least is -6"),
    ({"counts": [0.5, 1023.5]}, "0.5 is no whole number"),
    ({"counts": "zzzz"}, "the character 'z'"),
    ({"counts": "P"}, "end within a number"),
    ({"counts": "11"}, "add up to 2"),
    ({"counts": None}, "not iterable"),
    ({"counts": [float("inf")]}, "inf is no whole number"),
    ({"size": [32, 32, 1], "counts": [1024]}, "a height and a width"),
    ({"size": [32, -32], "counts": [0]}, "at least 1"),
]


def segmented(rle):
    return lambda truth: truth["annotations"][0].update(segmentation=rle)


def spoil(key, place, value):
    def change(truth):
        truth["annotations"][0][key][place : place + 1] = [value]

    return change


def test_objects_of_images_that_a_file_has_not_are_passed_over(tmp_path):
    truth = reference_truth(random_images(80, 4, masks=True), masks=True)
    rle = {"size": [9, 9], "counts": [81]}
    truth["annotations"].append(
        truth["annotations"][0] | {"image_id": 10**6, "segmentation": rle}
    )
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    CocoMetric(path, box_format="xyxy", include_mask=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda truth: truth.pop("images"), "KeyError: 'images'"),
        (lambda truth: truth["annotations"][0].pop("area"), "'area'"),
        (
            lambda truth: truth["annotations"][0].pop("segmentation"),
            "'segmentation'",
        ),
        (lambda truth: truth["images"][0].pop("height"), "no height"),
        (lambda truth: truth["categories"].pop(), "no category 90"),
        (
            lambda truth: truth["categories"][0].update(name="car"),
            r"instances.json'\): the categories .*different names",
        ),
        (spoil("bbox", 2, np.nan), "four finite numbers"),
        (spoil("bbox", 2, -1), "at least 0"),
        (spoil("bbox", 4, 1), "four finite numbers"),
        (
            lambda truth: truth["annotations"][0].update(area=np.nan),
            "finite numbers",
        ),
        (
            lambda truth: truth["annotations"][0].update(image_id=1.5),
            "the id 1.5 is no whole number",
        ),
        (
            lambda truth: truth["images"][0].update(id=1.5),
            "the id 1.5 is no whole number",
        ),
        (
            lambda truth: truth["images"].append(truth["images"][0]),
            "two images have one id",
        ),
        (
            lambda truth: truth["categories"].append(truth["categories"][0]),
            "two categories have one id",
        ),
        (segmented({"size": [9, 9], "counts": [81]}), r"size \[9, 9\]"),
        *(
            (segmented({"size": [32, 32], **change}), words)
            for change, words in WRONG_RUNS
        ),
    ],
)
def test_bad_files(change, words, tmp_path):
    images = random_images(80, 4, masks=True)
    truth = reference_truth(images, masks=True)
    truth["annotations"][0]["category_id"] = 90
    change(truth)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    with pytest.raises(ConfigError, match=words):
        CocoMetric(path, box_format="xyxy", include_mask=True)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        CocoMetric(path, box_format="xyxy")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'legato\[coco\]'"):
        CocoMetric(box_format="xyxy")


def test_an_image_comes_twice():
    images = random_images(81, 4)
    metric = CocoMetric(box_format="xyxy")
    metric.update_state(*batch_of(images))
    again = f"source_id {images[2]['id']} came twice.*sample_weight of 0"
    with pytest.raises(DataError, match=again):
        metric.update_state(*batch_of([images[2]]))
    metric.reset_state()
    with pytest.raises(DataError, match=again):
        metric.update_state(*batch_of([images[2], images[2]]))


def test_an_unknown_image(tmp_path):
    images = random_images(82, 4)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(reference_truth(images[1:])))
    metric = CocoMetric(path, box_format="xyxy")
    with pytest.raises(DataError, match=f"no image with the id.*{3} images"):
        metric.update_state(*batch_of(images))


def labels_with(**changes):
    return lambda labels, outputs: labels.update(changes)


def outputs_with(**changes):
    return lambda labels, outputs: outputs.update(changes)


def crowds(value):
    def change(labels, outputs):
        labels["is_crowds"] = np.full(labels["classes"].shape, value)

    return change


def sized(height, width):
    return labels_with(height=np.full(3, height), width=np.full(3, width))


def put(side, key, where, value):
    def change(labels, outputs):
        (labels if side == "labels" else outputs)[key][where] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels, outputs: labels.pop("boxes"), "labels have no 'boxes'"),
        (labels_with(source_id=np.float32([1, 2, 3])), "must be integers"),
        (labels_with(source_id=np.int32([[1, 2, 3]])), r"must be \[batch\]"),
        (labels_with(boxes=np.zeros((3, 4))), r"must be \[3, \?, 4\]"),
        (labels_with(classes=np.zeros((3, 1), int)), "'classes'.*shape"),
        (outputs_with(detection_scores=np.zeros((2, 9))), "detection_scores"),
        (outputs_with(num_detections=np.zeros((3, 1))), "num_detections"),
        (put("labels", "classes", (0, 0), 5), r"has \[5\].*ids of categories"),
        (put("outputs", "detection_classes", (0, 0), 0), r"has \[0\]"),
        (put("outputs", "detection_boxes", (0, 0), np.inf), "not finite"),
        (put("outputs", "detection_scores", (0, 0), np.nan), "not finite"),
        (put("labels", "boxes", (0, 0), np.nan), "not finite"),
        (put("labels", "boxes", (0, 0, 0), 500), "before it begins.*xyxy"),
        (
            lambda labels, outputs: labels.update(
                areas=np.full(labels["classes"].shape, np.nan)
            ),
            r"labels\['areas'\].*not finite",
        ),
        (
            lambda labels, outputs: labels.update(
                areas=np.full(labels["classes"].shape, -4.0)
            ),
            r"labels\['areas'\].*has -4.0.*at least 0",
        ),
        (crowds(np.nan), r"labels\['is_crowds'\].*has \[nan"),
        (crowds(-1), r"labels\['is_crowds'\].*has \[-1"),
        (outputs_with(num_detections=np.float32([1, np.nan, 0])), "holds nan"),
        (outputs_with(num_detections=np.float32([1, 0.5, 0])), "holds 0.5"),
    ],
)
def test_bad_batches(change, words):
    images = [each for each in random_images(83) if len(each["boxes"])][:3]
    images[0]["found"] = images[0]["boxes"].copy()
    images[0]["found_classes"] = images[0]["classes"].copy()
    images[0]["scores"] = np.ones(len(images[0]["classes"]), "float32")
    labels, outputs = batch_of(images)
    change(labels, outputs)
    metric = CocoMetric(box_format="xyxy", categories=CATEGORIES)
    with pytest.raises(DataError, match=words):
        metric.update_state(labels, outputs)
    # Nothing of it was taken: mended, it may come again.
    labels, outputs = batch_of(images)
    metric.update_state(labels, outputs)
    assert metric.result()["AP"] > 0


@pytest.mark.parametrize(("change", "words"), WRONG_RUNS)
def test_run_lengths_that_are_none_are_refused(change, words):
    rle = {"size": [32, 32], **change}
    labels, outputs = batch_of(random_images(84, masks=True)[:3], masks=True)
    for tree, key in ((labels, "masks"), (outputs, "detection_masks")):
        metric = CocoMetric(
            box_format="xyxy", categories=CATEGORIES, include_mask=True
        )
        kept, tree[key] = tree[key], [[rle] * tree[key].shape[1]] * 3
        with pytest.raises(DataError, match=words):
            metric.update_state(labels, outputs)
        tree[key] = kept


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (0, 30, "height 0 and the width 30"),
        (20, -5, "width -5"),
        (np.nan, 5, "height nan"),
        (np.inf, 5, "height inf"),
        (20.5, 5, r"height 20\.5"),
    ],
)
def test_a_size_that_is_none_is_refused(height, width, words):
    labels, outputs = batch_of(random_images(84, masks=True)[:3], masks=True)
    sized(height, width)(labels, outputs)
    metric = CocoMetric(
        box_format="xyxy", categories=CATEGORIES, include_mask=True
    )
    with pytest.raises(DataError, match=words):
        metric.update_state(labels, outputs)
    # Boxes alone need none.
    CocoMetric(box_format="xyxy").update_state(labels, outputs)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_none_is_refused(scale):
    labels, outputs = batch_of(random_images(83)[:3])
    metric = CocoMetric(
        box_format="xyxy", categories=CATEGORIES, need_rescale_bboxes=True
    )
    labels["image_scale"] = np.full(3, scale)
    with pytest.raises(DataError, match=r"scale .*above 0"):
        metric.update_state(labels, outputs)


def test_detections_that_end_before_they_begin_are_empty():
    """Those of a model that has learnt little: told, and no error."""
    images = [each for each in random_images(83) if len(each["boxes"])][:3]
    found = {}
    for name, end in {"empty": 0.0, "inverted": -7.0}.items():
        metric = CocoMetric(box_format="xywh", categories=CATEGORIES)
        for image in images:
            image["found"] = image["boxes"].copy()
            image["found_classes"] = image["classes"].copy()
            image["scores"] = np.ones(len(image["classes"]), "float32")
        labels, outputs = batch_of(images)
        outputs["detection_boxes"][0, 0, 2:] = end
        if end < 0:
            told = r"outputs\['detection_boxes'\].*before it begins.*xywh"
            with pytest.warns(LegatoWarning, match=told) as caught:
                metric.update_state(labels, outputs)
            assert len(caught) == 1
        else:
            metric.update_state(labels, outputs)
        found[name] = metric.result()
    assert found["empty"] == found["inverted"]
    assert found["empty"]["AP"] > 0


def test_bad_masks_weights_and_structures():
    images = [
        each for each in random_images(84, masks=True) if len(each["boxes"])
    ][:3]
    labels, outputs = batch_of(images, masks=True)
    metric = CocoMetric(
        box_format="xyxy", categories=CATEGORIES, include_mask=True
    )
    with pytest.raises(DataError, match="no 'masks'"):
        metric.update_state(
            {k: v for k, v in labels.items() if k != "masks"}, outputs
        )
    with pytest.raises(DataError, match="whole original image"):
        metric.update_state(
            labels | {"masks": labels["masks"][:, :, :28, :28]}, outputs
        )
    other = [[as_rle(np.ones((9, 9)))] * labels["boxes"].shape[1]] * 3
    with pytest.raises(DataError, match=r"size \[9, 9\]"):
        metric.update_state(labels | {"masks": other}, outputs)
    with pytest.raises(DataError, match="for each of 3 images"):
        metric.update_state(labels | {"masks": other[:2]}, outputs)
    for weights in (np.float32([1, 0.5, 1]), np.array([1, 1]), [-1, 1, 2]):
        with pytest.raises(DataError, match="no weights"):
            metric.update_state(labels, outputs, weights)
    unknown = np.where(labels["masks"], np.nan, 0.0)
    with pytest.raises(DataError, match="has NaN"):
        metric.update_state(labels | {"masks": unknown}, outputs)
    with pytest.raises(DataError, match="must be a dict"):
        metric.update_state(labels["boxes"], outputs)
    metric = CocoMetric(box_format="xyxy", need_rescale_bboxes=True)
    with pytest.raises(DataError, match="'image_scale'"):
        metric.update_state(labels, outputs)
