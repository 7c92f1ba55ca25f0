"""The demo: what its scenes are made of, what it reports, and what it leaves on the disk."""

from __future__ import annotations

import builtins
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from alphafpn.demo import BASELINE, ESTIMATED, Settings, run, run_demo, training
from alphafpn.demo.scenes import as_tensors, drawn_scenes, own_scenes
from alphafpn.estimate.for_detector import estimate_alpha_for

SMALL = Settings(side=64, train=8, val=4, steps=3, channels=8, seeds=(0,))
LEARNING = Settings(side=64, train=12, val=6, steps=30, channels=16, seeds=(0,))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def coco(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that learns a little, in its folder."""
    out = tmp_path_factory.mktemp("demo")
    random_state = torch.get_rng_state()
    outcome = run_demo(out, settings=LEARNING)
    assert torch.equal(torch.get_rng_state(), random_state)
    return out, outcome


@pytest.fixture
def own(tmp_path):
    """A user's data: six pictures in two folders, objects of about 40 pixels, two categories."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(6):
        name = f"{'ab'[i % 2]}/{i}.jpg"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (400, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        images.append({"id": 10 * i, "file_name": name, "width": 600, "height": 400})
        for x, y in rng.uniform(0, 350, (9, 2)).tolist():
            box = {"id": len(annotations) + 1, "image_id": 10 * i, "bbox": [x, y, 32, 50]}
            annotations.append(box | {"category_id": 1 + i % 2, "area": 1600, "iscrowd": 0})
    categories = [{"id": 1, "name": "boat"}, {"id": 2, "name": "bird"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data))
    return tmp_path / "images", path, data


@pytest.fixture
def no_picture(monkeypatch):
    """Spares the second that drawing takes."""
    monkeypatch.setattr(run, "draw_picture", lambda *args: b"picture")


# Drawn scenes


def test_scenes_are_the_same_every_time_and_differ_from_each_other():
    first, again = (list(drawn_scenes(3, 64, seed=0)) for _ in range(2))
    for (pixels, marks), (others, other_marks) in zip(first, again, strict=True):
        assert np.array_equal(pixels, others)
        assert marks == other_marks
    different = first + list(drawn_scenes(3, 64, seed=1))
    assert len({pixels.tobytes() for pixels, _ in different}) == 6


def test_boxes_lie_in_the_scene_and_fit_what_is_drawn():
    sizes = []
    for pixels, marks in drawn_scenes(20, 192, seed=0):
        assert pixels.shape == (192, 192, 3)
        for x, y, w, h in (mark["bbox"] for mark in marks):
            assert 0 <= x <= x + w <= 192
            assert 0 <= y <= y + h <= 192
            sizes.append(math.sqrt(w * h))
    # About TinyPerson's: most objects are tiny, a few are large.
    assert 7 < np.median(sizes) < 13
    assert np.mean(np.array(sizes) < 20) > 0.7
    assert max(sizes) > 60


def test_the_factors_of_the_full_demo_lie_inside_the_clamp():
    settings = Settings()
    scenes = as_tensors(list(drawn_scenes(settings.train, settings.side, seed=0)))
    items = [(image.shape[1:], boxes) for image, boxes in scenes]
    estimate = estimate_alpha_for(training.small_detector(settings), items)
    assert estimate.alpha == estimate.ratios
    assert all(0.25 < ratio < 1 for ratio in estimate.ratios)


# The outcome


def test_the_outcome_is_what_is_on_the_disk(finished):
    out, outcome = finished
    assert coco(out / "outcome.json") == outcome
    assert Image.open(out / "demo.png").format == "PNG"
    assert set(contents(out)) == {
        *(f"data/train/{i:04}.png" for i in range(LEARNING.train)),
        *(f"data/val/{i:04}.png" for i in range(LEARNING.val)),
        *("data/train.json", "data/val.json", "demo.png", "outcome.json", ".alphafpn-demo"),
    }


def test_the_files_are_a_data_set_with_the_factors_that_were_used(finished):
    out, outcome = finished
    estimate = estimate_alpha_for(training.small_detector(LEARNING), out / "data" / "train.json")
    assert list(estimate.alpha) == outcome["estimate"]["alpha"]
    assert list(estimate.counts) == outcome["estimate"]["counts"]
    for entry in coco(out / "data" / "val.json")["images"]:
        image = Image.open(out / "data" / entry["file_name"])
        assert image.size == (entry["width"], entry["height"]) == (64, 64)


def test_both_kinds_of_factors_are_reported_for_each_seed(finished):
    _, outcome = finished
    results, difference = outcome["results"], outcome["AP50_tiny_difference"]
    assert [[run["seed"] for run in results[name]] for name in (BASELINE, ESTIMATED)] == [[0], [0]]
    assert results[BASELINE][0]["last_loss"] != results[ESTIMATED][0]["last_loss"]
    expected = results[ESTIMATED][0]["AP50_tiny"] - results[BASELINE][0]["AP50_tiny"]
    assert difference["per_seed"] == [expected]
    assert difference["mean"] == pytest.approx(expected)
    assert "proves nothing" in outcome["note"]


def test_the_folded_stock_detector_finds_the_same(finished):
    folding = finished[1]["folding"]
    assert folding["detections"] > 0
    assert folding["same"]
    assert folding["largest_difference_in_pixels"] < 1e-9
    assert folding["largest_difference_in_score"] < 1e-9


def test_a_pair_starts_alike_and_learns(monkeypatch):
    scenes = as_tensors(list(drawn_scenes(8, 64, seed=0)))
    seen = []
    real = training.small_detector

    def recording(*args):
        model = real(*args)
        state = {name: t.clone() for name, t in model.state_dict().items() if "alpha" not in name}
        batches = []
        model.register_forward_pre_hook(lambda m, args: batches.append(torch.stack(args[0])))
        seen.append((state, batches))
        return model

    monkeypatch.setattr(training, "small_detector", recording)
    _, first_loss = training.train_detector(1.0, scenes, 0, Settings(steps=1, channels=16), int)
    _, last_loss = training.train_detector(1.0, scenes, 0, Settings(steps=30, channels=16), int)
    assert last_loss < 0.8 * first_loss
    training.train_detector([0.3, 0.4, 0.5], scenes, 0, Settings(steps=3, channels=16), int)
    _, (state, batches), (other_state, other_batches) = seen
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    assert all(torch.equal(a, b) for a, b in zip(batches, other_batches, strict=False))
    assert len(other_batches) == 3


def test_detections_are_compared_whatever_their_order():
    boxes = torch.tensor([[0.0, 0, 8, 8], [20, 20, 30, 34]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.5])}]
    moved = [{"boxes": boxes.flip(0) + 1e-3, "scores": torch.tensor([0.5, 0.9])}]
    difference = run._difference(found, moved)
    assert difference["same"]
    assert difference["largest_difference_in_pixels"] == pytest.approx(1e-3, rel=1e-2)
    fewer = [{"boxes": boxes[:1], "scores": torch.tensor([0.9])}]
    assert run._difference(found, fewer)["without_partner"] == 1
    worse = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.6])}]
    assert run._difference(found, worse)["without_partner"] == 2
    nothing = [{"boxes": boxes[:0], "scores": torch.zeros(0)}]
    assert run._difference(nothing, nothing)["same"]


# A user's own data


def test_own_images_become_scenes_of_tiny_objects(own, tmp_path, no_picture):
    images, path, _ = own
    outcome = run_demo(tmp_path / "out", images, path, settings=SMALL)
    assert outcome["data"]["scale"] == pytest.approx(0.25, rel=0.01)
    assert outcome["data"]["train_scenes"] == 8
    for name in ("train", "val"):
        data = coco(tmp_path / "out" / "data" / f"{name}.json")
        assert {entry["category_id"] for entry in data["annotations"]} == {1}
        sizes = [math.sqrt(a["bbox"][2] * a["bbox"][3]) for a in data["annotations"]]
        assert np.median(sizes) == pytest.approx(10, rel=0.1)


def test_scenes_show_the_images_regions_at_the_common_scale(own):
    images, path, data = own
    for entry in data["images"]:
        shade = 100 + entry["id"]
        Image.new("RGB", (600, 400), (shade, 0, 0)).save(images / entry["file_name"])
    scale, train, val = own_scenes(images, path, 64, (100, 100))
    shades = []
    for part in (train, val):
        parts = [(pixels, marks) for pixels, marks in part]
        shades.append({round(float(pixels[..., 0].mean())) // 10 for pixels, _ in parts})
        assert all(max(pixels.shape[:2]) <= 64 for pixels, _ in parts)
        for pixels, marks in parts:
            for x, y, w, h in (mark["bbox"] for mark in marks):
                assert -1e-6 <= x <= x + w <= pixels.shape[1] + 1e-6
                assert -1e-6 <= y <= y + h <= pixels.shape[0] + 1e-6
                assert w <= 32 * scale + 1e-6
    # No image is on both sides.
    assert len(shades[0] & shades[1]) == 0
    assert len(shades[1]) == 1


def test_small_objects_are_enlarged_but_at_most_doubled(own):
    images, path, data = own
    for annotation in data["annotations"]:
        annotation["bbox"][2:] = [3, 3]
    path.write_text(json.dumps(data))
    scale, _, val = own_scenes(images, path, 64, (100, 100))
    assert scale == 2
    assert all(mark["bbox"][2] <= 6 for _, marks in val for mark in marks)


def test_flagged_regions_are_painted_over_to_train_and_kept_to_evaluate(own):
    images, path, data = own
    for annotation in data["annotations"][::3]:
        annotation[("iscrowd", "ignore", "uncertain")[annotation["id"] % 3]] = 1
    path.write_text(json.dumps(data))
    _, train, val = own_scenes(images, path, 64, (100, 100))
    for scenes, painted in ((train, True), (val, False)):
        scenes = list(scenes)
        for (_, marks), (_, boxes) in zip(scenes, as_tensors(scenes), strict=True):
            assert len(boxes) == sum("ignore" not in mark for mark in marks) > 0
        regions = [
            pixels[math.ceil(y) : int(y + h), math.ceil(x) : int(x + w)]
            for pixels, marks in scenes
            for x, y, w, h in (mark["bbox"] for mark in marks if "ignore" in mark)
        ]
        flat = [region.std((0, 1)).max() == 0 for region in regions]
        # A region that another one overlaps is painted twice.
        assert np.mean(flat) > 0.6 if painted else not any(flat)


# What is left behind


def test_a_second_run_replaces_its_own_files_and_no_others(tmp_path, no_picture):
    run_demo(tmp_path, settings=SMALL)
    before = contents(tmp_path)
    (tmp_path / "data" / "mine.txt").write_text("mine")
    (tmp_path / "data" / "val.json").write_text("damaged")
    run_demo(tmp_path, settings=SMALL)
    after = contents(tmp_path)
    assert after.pop("data/mine.txt") == b"mine"
    assert set(after) == set(before)
    for name in set(before) - {"outcome.json"}:
        assert after[name] == before[name], name


@pytest.mark.parametrize("name", ["data", "demo.png", "outcome.json"])
def test_other_peoples_files_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(FileExistsError, match=f"{name}: not written by the demo"):
        run_demo(tmp_path, settings=SMALL)
    assert contents(tmp_path) == {name: b"theirs"}


def test_an_interrupted_run_leaves_no_outcome_and_can_be_repeated(
    tmp_path, monkeypatch, no_picture
):
    run_demo(tmp_path, settings=SMALL)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_detector", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path, settings=SMALL)
    names = set(contents(tmp_path))
    assert "outcome.json" not in names
    assert not any("partial" in name for name in names)
    run_demo(tmp_path, settings=SMALL)
    assert set(contents(tmp_path)) == {*names, "outcome.json", "demo.png"}


# Mistakes


def without_names(data):
    for entry in data["images"]:
        del entry["file_name"]


def of_one_image(data):
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 10]


def negative(data):
    data["annotations"][4]["bbox"][2] = -1


def one_picture_missing(data):
    data["images"][5]["file_name"] = "a/missing.jpg"


def one_picture_smaller(data):
    for entry in data["images"]:
        entry["width"] = 700
    for annotation in data["annotations"]:
        annotation["bbox"][0] = 640


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (without_names, ValueError, r"own\.json: image .*expected a file_name"),
        (of_one_image, ValueError, r"own\.json: expected at least 2 images with objects, found 1"),
        (negative, ValueError, r"own\.json.*annotations\[4\]"),
        (one_picture_missing, FileNotFoundError, r"missing\.jpg"),
        (one_picture_smaller, ValueError, r"\.jpg: 600 x 400 pixels, expected at least 700"),
    ],
)
def test_mistakes_in_the_data_are_named_and_leave_nothing_behind(
    own, tmp_path, change, error, match
):
    images, path, data = own
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(error, match=match):
        run_demo(tmp_path / "out", images, path, settings=SMALL)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(own, tmp_path):
    images, path, _ = own
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        run_demo(tmp_path / "out", images, tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_demo(tmp_path / "out", tmp_path / "nowhere", path, settings=SMALL)
    with pytest.raises(ValueError, match="expected both or none"):
        run_demo(tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


def test_without_tiny_objects_there_is_nothing_to_compare(tmp_path, monkeypatch):
    large = (np.zeros((64, 64, 3), np.uint8), [{"bbox": [0.0, 0.0, 60.0, 60.0]}])
    monkeypatch.setattr(run, "own_scenes", lambda *args: (1.0, [large], [large]))
    with pytest.raises(ValueError, match=r"large\.json: expected tiny objects"):
        run_demo(tmp_path / "out", tmp_path, tmp_path / "large.json", settings=SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["matplotlib", "PIL", "faster_coco_eval"])
def test_a_missing_extra_is_named_before_any_work(tmp_path, monkeypatch, module):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "alphafpn\[(demo|tiny)\]"'):
        run_demo(tmp_path / "out", settings=SMALL)
    assert not (tmp_path / "out").exists()
