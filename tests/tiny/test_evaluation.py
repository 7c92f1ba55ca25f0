from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphafpn.tiny.evaluation import evaluate_tiny, format_tiny

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "golden"
AREAS = {
    "all": (1, 1e10),
    "tiny": (1, 400),
    "tiny1": (1, 64),
    "tiny2": (64, 144),
    "tiny3": (144, 400),
    "small": (400, 1024),
    "reasonable": (1024, 1e10),
}
SIZES = {
    "all": (-1, 1e10),
    "tiny": (2, 20),
    "tiny1": (2, 8),
    "tiny2": (8, 12),
    "tiny3": (12, 20),
    "small": (20, 32),
}
SEEDS = st.integers(0, 2**32 - 1)


def golden(name):
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


MICRO = golden("micro")


def assert_equal(results, expected, tolerance=1e-9):
    assert results.keys() == expected.keys()
    wrong = {
        key: (results[key], expected[key])
        for key in expected
        if not abs(results[key] - expected[key]) <= tolerance
    }
    assert wrong == {}


def official(expected):
    return {key.replace("_All", "_all"): value for key, value in expected.items()}


# The protocol once more, as literally and slowly as it is told.


def intersection(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def box_area(box):
    return box[2] * box[3]


def iou_of(a, b):
    inside = intersection(a, b)
    return inside / (box_area(a) + box_area(b) - inside) if inside else 0.0


def iod_of(box, region):
    inside = intersection(box, region)
    return inside / box_area(box) if inside else 0.0


def judge(detections, truths, is_ignored, threshold, excuses):
    """Right, wrong or excused, for each detection of an image; best scores first."""
    free = [t for t in truths if not is_ignored(t)]
    ignored = [t for t in truths if is_ignored(t)]
    verdicts = []
    for detection in detections:
        best, partner = threshold, None
        for truth in free:
            overlap = iou_of(detection["bbox"], truth["bbox"])
            if overlap >= best:
                best, partner = overlap, truth
        if partner is not None:
            free = [t for t in free if t is not partner]
            verdicts.append("right")
        elif excuses(detection, ignored):
            verdicts.append("excused")
        else:
            verdicts.append("wrong")
    return verdicts


def curve_of(coco, detections, category, limit, keep, is_ignored, threshold, excuses):
    """Verdicts by falling score over all images, and how many objects there are to be found."""
    scored, total = [], 0
    for image in sorted(image["id"] for image in coco["images"]):
        place = {"image_id": image, "category_id": category}

        def here(entry, place=place):
            return all(entry[key] == place[key] for key in place)

        truths = list(filter(here, coco["annotations"]))
        best = sorted(filter(here, detections), key=lambda d: -d["score"])[:limit]
        best = list(filter(keep, best))
        verdicts = judge(best, truths, is_ignored, threshold, excuses)
        scored += [(d["score"], v) for d, v in zip(best, verdicts, strict=True)]
        total += sum(not is_ignored(t) for t in truths)
    scored.sort(key=lambda entry: -entry[0])
    return [verdict for _, verdict in scored], total


def slow_precision_and_recall(coco, detections, bounds, threshold):
    low, high = bounds

    def is_ignored(t):
        flagged = t.get("ignore") or t.get("uncertain") or t.get("iscrowd")
        return bool(flagged) or not low <= t.get("area", box_area(t["bbox"])) <= high

    def excuses(d, regions):
        outside = not low <= box_area(d["bbox"]) <= high
        return outside or any(iod_of(d["bbox"], r["bbox"]) >= threshold for r in regions)

    precisions, recalls = [], []
    for category in coco["categories"]:
        verdicts, total = curve_of(
            coco, detections, category["id"], 200, lambda d: True, is_ignored, threshold, excuses
        )
        if total == 0:
            continue
        points, right, wrong = [], 0, 0
        for verdict in verdicts:
            right, wrong = right + (verdict == "right"), wrong + (verdict == "wrong")
            points.append((right / total, right / max(right + wrong, 1)))
        precisions += [
            max((precision for recall, precision in points if recall >= level), default=0.0)
            for level in np.linspace(0, 1, 101)
        ]
        recalls.append(right / total)
    if not recalls:
        return -1.0, -1.0
    return sum(precisions) / len(precisions), sum(recalls) / len(recalls)


def slow_miss_rate(coco, detections, bounds, threshold, quirks):
    low, high = bounds

    def is_ignored(t):
        size = t.get("size", math.sqrt(t.get("area", box_area(t["bbox"]))))
        flagged = t.get("ignore") or t.get("uncertain") or t.get("vis_ratio", 1) < 0.65
        return bool(flagged) or not low <= size <= high

    def is_slip(d, region, x):
        area = region.get("area", box_area(region["bbox"]))
        return quirks and x > 0 and x / (1 + x) * (1 + area / box_area(d["bbox"])) > 0.5

    def excuses(d, regions):
        inside = [(region, iod_of(d["bbox"], region["bbox"])) for region in regions]
        return any(x >= threshold or is_slip(d, region, x) for region, x in inside)

    def keep(d):
        return low / 1.25 <= math.sqrt(box_area(d["bbox"])) < high * 1.25

    logs = []
    for category in coco["categories"]:
        verdicts, total = curve_of(
            coco, detections, category["id"], 1000, keep, is_ignored, threshold, excuses
        )
        if total == 0:
            continue
        right, wrong, recalls, rates = 0, 0, [], []
        for verdict in verdicts:
            right, wrong = right + (verdict == "right"), wrong + (verdict == "wrong")
            recalls.append(right / total)
            rates.append(wrong / len(coco["images"]))
        step = math.log(100) / 8
        for point in np.exp(np.arange(math.log(0.01), math.log(1.0) + 1e-10, step)):
            start = recalls[-1] if quirks and recalls else 0.0
            reached = [r for r, rate in zip(recalls, rates, strict=True) if rate <= point]
            recall = [start, *reached][-1]
            logs.append(math.log(1 - recall) if recall < 1 else -math.inf)
    return math.exp(sum(logs) / len(logs)) if logs else -1.0


def slow_evaluation(coco, detections, quirks):
    results = {}
    for percent in (25, 50, 75):
        for name, bounds in AREAS.items():
            figures = slow_precision_and_recall(coco, detections, bounds, percent / 100)
            results[f"AP{percent}_{name}"], results[f"AR{percent}_{name}"] = figures
        for name, bounds in SIZES.items():
            figure = slow_miss_rate(coco, detections, bounds, percent / 100, quirks)
            results[f"MR{percent}_{name}"] = figure
    return results


def random_data(seed, *, grid, num_categories, num_boxes, num_found):
    """People of all sizes on two images, half of the detections near them.

    On the grid, everything meets: sizes the ends of ranges, overlaps the thresholds, scores and
    overlaps each other. Off it, nothing ties.
    """
    rng = np.random.default_rng(seed)
    images = rng.permutation([100, 101]).tolist()
    categories = rng.permutation(np.arange(7, 7 + num_categories)).tolist()
    sides = [1, 2, 4, 8, 12, 16, 20, 32, 40]

    def box(near=None):
        if near is not None and rng.random() < 0.5:
            x, y, w, h = near
            if grid:
                shift = rng.integers(-2, 3, 4) * [w / 8, h / 8, w / 4, h / 4]
                return [x + shift[0], y + shift[1], w + shift[2], h + shift[3]]
            factors = np.exp(rng.normal(0, 0.15, 2))
            shift = rng.normal(0, 0.15, 2) * [w, h]
            return [x + shift[0], y + shift[1], w * factors[0], h * factors[1]]
        if grid:
            return [*rng.integers(0, 12, 2) * 4.0, *rng.choice(sides, 2).astype(float)]
        return [*rng.uniform(0, 60, 2), *np.exp(rng.uniform(0, 4, 2))]

    def optional(**fields):
        return {key: value for key, value in fields.items() if rng.random() < 0.15}

    annotations = []
    for identity in rng.permutation(num_boxes).tolist():
        bbox = [float(v) for v in box()]
        extra = optional(
            ignore=True, uncertain=1, iscrowd=1, area=box_area(bbox) * rng.choice([0.5, 1])
        )
        if grid:
            extra |= optional(
                size=float(rng.choice(sides)), vis_ratio=float(rng.choice([0.6, 0.65]))
            )
        place = {"image_id": int(rng.choice(images)), "category_id": int(rng.choice(categories))}
        annotations.append({"id": identity, **place, "bbox": bbox, **extra})
    found = []
    for rank in rng.permutation(num_found).tolist():
        near = annotations[rng.integers(num_boxes)]
        where = {key: near[key] for key in ("image_id", "category_id")}
        bbox = [float(v) for v in box(near["bbox"])]
        score = rank // 3 / 8 if grid else (rank + 0.5) / num_found
        found.append({**where, "bbox": bbox, "score": score})
    coco = {
        "images": [{"id": identity} for identity in images],
        "categories": [{"id": identity} for identity in categories],
        "annotations": annotations,
    }
    return coco, found


def person(identity=1, bbox=(10, 10, 10, 10), **more):
    return {"id": identity, "image_id": 1, "category_id": 1, "bbox": list(bbox), **more}


def guess(bbox=(10, 10, 10, 10), score=0.5, **more):
    return {"image_id": 1, "category_id": 1, "bbox": list(bbox), "score": score, **more}


def scene(*annotations, num_images=100):
    images = [{"id": identity} for identity in range(1, num_images + 1)]
    return {"images": images, "categories": [{"id": 1}], "annotations": list(annotations)}


class TestOfficialFigures:
    def test_whole_set_from_files(self, tmp_path):
        for name in ("gt_a", "dt_a"):
            (tmp_path / f"{name}.json").write_text(json.dumps(golden(name)))
        results = evaluate_tiny(tmp_path / "gt_a.json", str(tmp_path / "dt_a.json"))
        assert_equal(results, official(golden("expected_a")))

    @pytest.mark.parametrize("name", MICRO)
    def test_single_rules(self, name):
        case = MICRO[name]
        assert_equal(evaluate_tiny(case["gt"], case["dt"]), official(case["expected"]))

    @settings(max_examples=80, deadline=None)
    @given(
        seed=SEEDS,
        quirks=st.booleans(),
        grid=st.booleans(),
        crowded=st.booleans(),
        images=st.sampled_from([1, 4, 120]),
    )
    def test_equals_the_slow_reference(self, seed, quirks, grid, crowded, images):
        coco, found = random_data(
            seed,
            grid=grid,
            num_categories=1 + seed % 2,
            num_boxes=12 if crowded else 4,
            num_found=30 if crowded else 8,
        )
        coco["images"] += [{"id": 1000 + index} for index in range(images - 1)]
        assert_equal(
            evaluate_tiny(coco, found, quirks=quirks), slow_evaluation(coco, found, quirks)
        )


class TestRules:
    @pytest.mark.parametrize("coco", [scene(), {"images": [], "categories": [], "annotations": []}])
    def test_nothing_to_find(self, coco):
        found = [guess()] if coco["images"] else []
        assert set(evaluate_tiny(coco, found).values()) == {-1.0}

    def test_nothing_found(self):
        results = evaluate_tiny(scene(person()), [])
        figures = {key: value for key, value in results.items() if value != -1}
        assert figures
        assert figures == {key: float(key.startswith("MR")) for key in figures}

    @pytest.mark.parametrize("limit", [200, 1, 1500])
    @pytest.mark.parametrize("more", [0, 1])
    def test_precision_takes_the_best_detections_of_an_image(self, limit, more):
        found = [*[guess((500, 500, 10, 10), 0.9)] * (limit - 1 + more), guess()]
        options = {} if limit == 200 else {"max_detections": limit}
        results = evaluate_tiny(scene(person()), found, **options)
        assert results["AR50_tiny"] == 1 - more

    @pytest.mark.parametrize("limit", [200, 1500])
    @pytest.mark.parametrize("more", [0, 1])
    def test_miss_rate_takes_1000_detections_of_an_image(self, limit, more):
        found = [*[guess((500, 500, 10, 10), 0.9)] * (999 + more), guess()]
        results = evaluate_tiny(scene(person(), num_images=1000), found, max_detections=limit)
        assert results["MR50_tiny"] == more

    @pytest.mark.parametrize("limit", [0, 1.5, True])
    def test_a_limit_is_a_positive_integer(self, limit):
        with pytest.raises(ValueError, match=f"max_detections: expected .*found {limit}"):
            evaluate_tiny(scene(), [], max_detections=limit)

    def test_the_limits_hold_per_category(self):
        coco = scene(person())
        coco["categories"].append({"id": 2})
        wrong = [guess((500, 500, 10, 10), 0.9, category_id=2)] * 1000
        results = evaluate_tiny(coco, [*wrong, guess()])
        assert results["AP50_tiny"] == pytest.approx(1)
        assert results["MR50_tiny"] == 0

    @pytest.mark.parametrize(
        ("fields", "counts"),
        [
            ({"vis": [10, 10, 10, 6.5]}, True),
            ({"vis": [10, 10, 8, 8]}, False),
            ({"vis": [10, 10, 8, 8], "vis_ratio": 0.7}, True),
        ],
    )
    def test_hidden_people_are_ignored_by_the_miss_rate(self, fields, counts):
        results = evaluate_tiny(scene(person(**fields)), [guess()])
        assert results["MR50_tiny"] == (0 if counts else -1)
        assert results["AP50_tiny"] == pytest.approx(1)

    def test_people_under_a_pixel_are_ignored_by_precision_only(self):
        results = evaluate_tiny(scene(person(bbox=(10, 10, 0.5, 0.5))), [])
        assert (results["AP50_all"], results["MR50_all"]) == (-1, 1)


class TestInput:
    @pytest.mark.parametrize(
        ("image", "category", "change"),
        [
            ("a.jpg", "person", {}),
            (1.0, 1, {"image_id": 1, "category_id": 1.0}),
            (1, 1, {"ignore": "0", "iscrowd": None, "area": math.nan, "vis": None}),
            (1, 1, {"id": None}),
        ],
    )
    def test_the_forms_that_exporters_write(self, image, category, change):
        names = {"image_id": image, "category_id": category}
        coco = scene(person() | names | change, num_images=1)
        coco["images"][0]["id"], coco["categories"][0]["id"] = image, category
        expected = evaluate_tiny(scene(person(), num_images=1), [guess()])
        assert evaluate_tiny(coco, [guess(**names)]) == expected
        coco["categories"] = None
        assert evaluate_tiny(coco, [guess(**names)]) == expected

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("category_id", 999),
            ("area", -1),
            ("area", "4"),
            ("size", math.inf),
            ("vis_ratio", True),
            ("vis", [0, 0, math.nan, 1]),
        ],
    )
    def test_what_only_this_protocol_reads_must_be_right(self, field, value):
        coco = scene(person(), person(2) | {field: value})
        with pytest.raises(ValueError, match=rf"annotations\[1\]: expected .*{field}.*found"):
            evaluate_tiny(coco, [])

    @pytest.mark.parametrize("category", [999, "1", None])
    def test_detections_have_a_category_of_the_ground_truth(self, category):
        message = rf"^detections\[1\]: expected as category_id .* found {category!r}"
        with pytest.raises(ValueError, match=message):
            evaluate_tiny(scene(person()), [guess(), guess(category_id=category)])

    def test_a_missing_evaluator_is_named_with_its_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        with pytest.raises(ImportError, match=r'pip install "alphafpn\[tiny\]"'):
            evaluate_tiny(scene(), [])


class TestTable:
    def test_has_every_figure_once(self):
        results = evaluate_tiny(golden("gt_a"), golden("dt_a"))
        header, *rows = format_tiny(results).splitlines()
        columns = header.split()
        shown = {
            f"{column}_{name}": figure
            for name, *figures in map(str.split, rows)
            for column, figure in zip(columns, figures, strict=True)
            if figure != "-"
        }
        assert shown == {key: f"{100 * figure:.2f}" for key, figure in results.items()}
        assert len({len(line) for line in (header, *rows)}) == 1

    def test_shows_a_dash_where_there_is_nothing_to_find(self):
        lines = format_tiny(evaluate_tiny(scene(person()), [guess()])).splitlines()
        assert lines[2].split() == ["tiny", *["100.00"] * 6, *["0.00"] * 3]
        assert lines[6].split() == ["small", *["-"] * 9]
