"""The TinyPerson protocol: AP, AR and miss rate by object size, with regions to ignore.

AP and AR are COCO's, from faster-coco-eval; the log-average miss rate (MR) is Caltech's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alphafpn.estimate.coco import Id, as_box, as_flag, as_id, plain, show
from alphafpn.tiny import _coco

_Floats: TypeAlias = NDArray[np.float64]
_Integers: TypeAlias = NDArray[np.int64]
_Flags: TypeAlias = NDArray[np.bool_]

_IOUS = {25: 0.25, 50: 0.5, 75: 0.75}  # by percent, as keys of the results have them
_AREAS = {  # AP, AR: area in square pixels, both ends included
    "all": (1.0, 1e10),
    "tiny": (1.0, 400.0),
    "tiny1": (1.0, 64.0),
    "tiny2": (64.0, 144.0),
    "tiny3": (144.0, 400.0),
    "small": (400.0, 1024.0),
    "reasonable": (1024.0, 1e10),
}
_SIZES = {  # MR: square root of the area in pixels, both ends included
    "all": (-1.0, 1e10),
    "tiny": (2.0, 20.0),
    "tiny1": (2.0, 8.0),
    "tiny2": (8.0, 12.0),
    "tiny3": (12.0, 20.0),
    "small": (20.0, 32.0),
}
_SIZE_MARGIN = 1.25  # MR leaves out detections that miss the range by more than this factor
_MIN_VISIBLE = 0.65
_MR_DETECTIONS = 1000  # the best ones per image and category
# False positives per image. The hair above the round values admits rates of exactly 0.1 and 1.
_FPPI = np.logspace(-2, 0, 9) * (1 + 1e-12)


class _Truths(NamedTuple):
    """Ground truths by cell, which stands for an image and a category: `image + n * category`."""

    cell: _Integers
    bbox: _Floats  # [N, 4], xywh
    area: _Floats
    size: _Floats
    ap_ignored: _Flags  # whatever the range of sizes
    mr_ignored: _Flags


class _Detections(NamedTuple):
    """Detections by cell, then by falling score."""

    cell: _Integers
    bbox: _Floats
    area: _Floats
    score: _Floats
    rank: _Integers  # in its cell, from 0


class _Pairs(NamedTuple):
    """Overlapping detections and ground truths of a cell: by detection, best partner first."""

    detection: _Integers
    truth: _Integers
    iou: _Floats
    iod: _Floats  # intersection over the detection's area


def evaluate_tiny(
    ground_truth: str | os.PathLike[str] | Mapping[str, Any],
    detections: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    quirks: bool = True,
    max_detections: int = 200,
) -> dict[str, float]:
    """Computes AP, average recall and miss rate of tiny objects, as TinyPerson defines them.

    In each range of sizes, objects outside of it and those marked `ignore` or `uncertain` (for AP
    and AR also `iscrowd`) need not be found, and detections that lie inside them, by intersection
    over the detection's own area, are no mistakes.

    Args:
        ground_truth: COCO dict with `images`, `annotations` and `categories`, or the path of such a
            JSON file. Boxes are `xywh` in pixels. Without `area`, an annotation has its box's.
            Broken annotations are left out, with a warning.
        detections: COCO results, a list of dicts with `image_id`, `category_id`, `bbox` (`xywh`)
            and `score`, or the path of such a JSON file.
        quirks: Whether the miss rate is the official code's to the last digit. If not, two slips
            are mended: detections that barely touch a large ignored region are mistakes, and a rate
            of false positives that the first detection already exceeds has recall 0, not that of
            all detections (which takes fewer than 100 images).
        max_detections: How many detections of an image and category, the best first, count for AP
            and AR. The miss rate always takes 1000.

    Returns:
        Figures from 0 to 1, or -1 where a range has no ground truth. Keys are metric (AP, AR, MR),
        IoU threshold in percent (25, 50, 75) and range (all, tiny, tiny1, tiny2, tiny3, small; for
        AP and AR also reasonable): `AP50_tiny`, `MR25_all`. AP and AR are means over categories;
        the miss rate is the geometric mean over categories and rates of false positives.

    Raises:
        ImportError: If faster-coco-eval is not installed.
        TypeError: If an argument is neither COCO data nor a path.
        ValueError: If the ground truth is no COCO data set, an annotation has a category that is
            not listed, or a detection is incomplete, of a wrong type, not finite, negative in size,
            or of an image or category that does not exist; if `max_detections` is no positive
            integer.

    Examples:
        >>> person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 30, 8, 16]}
        >>> truth = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [person]}
        >>> found = {"image_id": 1, "category_id": 1, "bbox": [20, 30, 8, 10], "score": 0.9}
        >>> results = evaluate_tiny(truth, [found])
        >>> {key: round(results[key], 3) for key in ("AP50_tiny", "AP75_tiny", "MR50_small")}
        {'AP50_tiny': 1.0, 'AP75_tiny': 0.0, 'MR50_small': -1.0}
    """
    if type(max_detections) is not int or max_detections < 1:
        raise ValueError(f"max_detections: expected a positive integer, found {max_detections}")
    truths, images, categories = _truths(ground_truth)
    limit = max(max_detections, _MR_DETECTIONS)
    found = _detections(detections, images, categories, limit)
    data = truths, found, _overlaps(truths, found), len(images), len(categories)
    return _precisions(*data, max_detections) | _miss_rates(*data, quirks)


def format_tiny(results: Mapping[str, float]) -> str:
    """Formats the figures of `evaluate_tiny` as a table in percent, a row for each range of sizes.

    Args:
        results: What `evaluate_tiny` returned.

    Returns:
        Lines of text, with `-` where there is no figure.

    Examples:
        >>> print(format_tiny({"AP50_tiny": 0.5, "MR50_tiny": 0.25}).splitlines()[2])
        tiny            -  50.00      -      -      -      -      -  25.00      -
    """
    columns = [f"{metric}{percent}" for metric in ("AP", "AR", "MR") for percent in _IOUS]
    lines = [" " * 10 + "".join(f"{column:>7}" for column in columns)]
    for name in _AREAS:
        figures = [results.get(f"{column}_{name}", -1.0) for column in columns]
        cells = ["-" if figure < 0 else f"{100 * figure:.2f}" for figure in figures]
        lines.append(f"{name:<10}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)


def _truths(ground_truth: Any) -> tuple[_Truths, dict[Id, int], dict[Id, int]]:
    """Reads the ground truth, and the ranks of its images and categories by id."""
    coco, columns, rows = _coco.read(ground_truth, "ground_truth", need_sizes=False)
    used = [columns.category_ids[row] for row in rows.tolist()]
    # Without a list of categories, they are those of the annotations.
    listed = columns.listed or {category for category in used if category is not None}
    images, categories = _ranks(columns.image_ids), _ranks(listed)
    for row, category in zip(rows.tolist(), used, strict=True):
        if category not in categories:
            raise ValueError(
                f"ground_truth: annotations[{row}]: expected a category_id that `categories` lists,"
                f" found {show(category)}"
            )
    entries = [coco["annotations"][row] for row in rows.tolist()]

    def column(field: str, default: _Floats) -> _Floats:
        values = []
        for row, entry, own in zip(rows.tolist(), entries, default.tolist(), strict=True):
            found = plain(entry.get(field))
            value = own if found is None else found
            if not (type(value) in (int, float) and 0 <= value < np.inf):
                raise ValueError(
                    f"ground_truth: annotations[{row}]: expected as {field} a finite number of 0 or"
                    f" more, found {show(value)}"
                )
            values.append(value)
        return np.array(values, np.float64)

    def flag(field: str) -> _Flags:
        return np.array([as_flag(entry.get(field)) for entry in entries], np.bool_)

    bbox = columns.boxes[rows]
    area = column("area", bbox[:, 2] * bbox[:, 3])
    size = column("size", np.sqrt(area))
    visible = column("vis_ratio", np.array([_visible(entry) for entry in entries]))
    ignored = flag("ignore") | flag("uncertain")
    ranks = np.array([images[image_id] for image_id in columns.image_ids], np.int64)
    category = np.array([categories[category] for category in used], np.int64)
    cell = ranks[columns.image_index[rows]] + len(images) * category
    by = np.argsort(cell, kind="stable")
    ap_ignored, mr_ignored = ignored | flag("iscrowd"), ignored | (visible < _MIN_VISIBLE)
    truths = _Truths(cell[by], bbox[by], area[by], size[by], ap_ignored[by], mr_ignored[by])
    return truths, images, categories


def _ranks(ids: Iterable[Id]) -> dict[Id, int]:
    """Places of the ids in ascending order, in which the protocol goes through images."""
    ordered = sorted(ids, key=lambda identity: (isinstance(identity, str), identity))
    return {identity: rank for rank, identity in enumerate(ordered)}


def _visible(entry: Mapping[str, Any]) -> float:
    """Share of the box that `vis`, CityPersons' box of what is visible, makes of it."""
    (_, _, width, height), vis = as_box(entry["bbox"]), as_box(entry.get("vis"))
    return vis[3] / height * (vis[2] / width) if vis and width * height else 1.0


def _detections(
    results: Any, images: dict[Id, int], categories: dict[Id, int], limit: int
) -> _Detections:
    name, found = _coco.read_detections(results, "detections", list(images))
    category = np.empty(len(found.entries), np.int64)
    for index, entry in enumerate(found.entries):
        category_id = as_id(entry.get("category_id"))
        if category_id is None or category_id not in categories:
            raise ValueError(
                f"{name}[{index}]: expected as category_id one of the ground truth, found"
                f" {show(entry.get('category_id'))}"
            )
        category[index] = categories[category_id]
    cell, bbox, score = found.image_index + len(images) * category, found.boxes, found.scores
    by = np.lexsort((-score, cell))
    rank = np.arange(len(by)) - np.searchsorted(cell[by], cell[by])
    by, rank = by[rank < limit], rank[rank < limit]
    return _Detections(cell[by], bbox[by], bbox[by, 2] * bbox[by, 3], score[by], rank)


def _overlaps(truths: _Truths, found: _Detections) -> _Pairs:
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for cell in np.intersect1d(truths.cell, found.cell).tolist():
        first, stop = np.searchsorted(found.cell, (cell, cell + 1)).tolist()
        first_truth, stop_truth = np.searchsorted(truths.cell, (cell, cell + 1)).tolist()
        a, b = found.bbox[first:stop, None], truths.bbox[None, first_truth:stop_truth]
        end = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
        sides = np.maximum(end - np.maximum(a[..., :2], b[..., :2]), 0)
        inside = sides[..., 0] * sides[..., 1]
        detection, truth = np.nonzero(inside)
        parts.append((detection + first, truth + first_truth, inside[detection, truth]))
    detection, truth, inside = (np.concatenate(part) for part in zip(*parts, strict=True))
    area = found.area[detection]
    iou = inside / (area + truths.bbox[truth, 2] * truths.bbox[truth, 3] - inside)
    by = np.lexsort((-truth, -iou, detection))  # of equally good partners the last one first
    return _Pairs(detection[by], truth[by], iou[by], (inside / area)[by])


def _precisions(
    truths: _Truths,
    found: _Detections,
    pairs: _Pairs,
    num_images: int,
    num_categories: int,
    max_detections: int,
) -> dict[str, float]:
    """AP and AR.

    Whatever is ignored is a crowd to the evaluator, which lets a crowd take any number of
    detections that no object has taken, by intersection over the detection's area: the protocol's
    rule exactly. Which objects are ignored depends on the range, so each range is a run of its own.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        message = 'evaluate_tiny needs faster-coco-eval: pip install "alphafpn[tiny]"'
        raise ImportError(message) from error

    def rows(
        boxes: _Truths | _Detections, field: str, values: NDArray[Any]
    ) -> list[dict[str, Any]]:
        images, categories = boxes.cell % num_images, boxes.cell // num_images
        ids = np.arange(1, len(boxes.cell) + 1)  # the evaluator takes id 0 for "no match"
        columns = (ids, images, categories, boxes.bbox, boxes.area, values)
        keys = ("id", "image_id", "category_id", "bbox", "area", field)
        entries = zip(*(column.tolist() for column in columns), strict=True)
        return [dict(zip(keys, entry, strict=True)) for entry in entries]

    table = {
        "images": [{"id": image} for image in range(num_images)],
        "categories": [{"id": category} for category in range(num_categories)],
    }
    detections = rows(found, "score", found.score)
    results = {}
    for name, (low, high) in _AREAS.items():
        ignored = truths.ap_ignored | (truths.area < low) | (truths.area > high)
        precision = recall = -np.ones((len(_IOUS), 1))
        if not ignored.all():
            # A detection outside the range that overlaps no object inside it can be neither right
            # nor wrong. Left out, it changes nothing and saves time.
            useful = (found.area >= low) & (found.area <= high)
            useful[pairs.detection[~ignored[pairs.truth]]] = True
            useful &= found.rank < max_detections
            evaluation = COCOeval_faster(
                COCO({**table, "annotations": rows(truths, "iscrowd", ignored.astype(int))}),
                COCO({**table, "annotations": list(compress(detections, useful))}),
                "bbox",
            )
            evaluation.params.iouThrs = np.array(list(_IOUS.values()))
            evaluation.params.areaRng = [[low, high]]
            evaluation.params.areaRngLbl = [name]
            evaluation.params.maxDets = [max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
            precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        for metric, figures in (("AP", precision), ("AR", recall)):
            for percent, values in zip(_IOUS, figures, strict=True):
                known = values[values > -1]  # -1: a category without ground truth
                figure = float(known.mean()) if known.size else -1.0
                results[f"{metric}{percent}_{name}"] = figure
    return results


def _miss_rates(
    truths: _Truths,
    found: _Detections,
    pairs: _Pairs,
    num_images: int,
    num_categories: int,
    quirks: bool,
) -> dict[str, float]:
    size = np.sqrt(found.area)
    areas = truths.area[pairs.truth] / found.area[pairs.detection]
    # The official code's second chance for a detection, meant to make an IoD of an IoU: but what
    # goes in is IoD already.
    slip = quirks & (pairs.iod / (1 + pairs.iod) * (1 + areas) > 0.5)
    starts = np.arange(num_categories + 1) * num_images
    edges = [np.searchsorted(cell, starts).tolist() for cell in (found.cell, truths.cell)]
    results = {}
    for name, (low, high) in _SIZES.items():
        ignored = truths.mr_ignored | (truths.size < low) | (truths.size > high)
        kept = (size >= low / _SIZE_MARGIN) & (size < high * _SIZE_MARGIN)
        kept &= found.rank < _MR_DETECTIONS
        for percent, iou in _IOUS.items():
            candidates = kept[pairs.detection] & ~ignored[pairs.truth] & (pairs.iou >= iou)
            right = _match(pairs.detection[candidates], pairs.truth[candidates], len(kept))
            excuses = ignored[pairs.truth] & (slip | (pairs.iod >= iou))
            wrong = ~right
            wrong[pairs.detection[excuses]] = False
            recalls = []
            for category in range(num_categories):
                (first, stop), objects = (edge[category : category + 2] for edge in edges)
                total = np.count_nonzero(~ignored[slice(*objects)])
                if total == 0:
                    continue
                curve = first + np.flatnonzero(kept[first:stop])
                curve = curve[np.argsort(-found.score[curve], kind="stable")]
                recall = np.cumsum(right[curve]) / total
                rate = np.cumsum(wrong[curve]) / num_images
                if not quirks or curve.size == 0:
                    # Where the curve starts beyond a rate, the index below is -1.
                    recall = np.append(recall, 0.0)
                recalls.append(recall[np.searchsorted(rate, _FPPI, side="right") - 1])
            with np.errstate(divide="ignore"):  # nothing missed: a miss rate of 0
                logs = np.log(1 - np.array(recalls))
            results[f"MR{percent}_{name}"] = float(np.exp(logs.mean())) if recalls else -1.0
    return results


def _match(detections: _Integers, truths: _Integers, count: int) -> _Flags:
    """Which of `count` detections get an object: in turn, each the best that is still free."""
    matched = np.zeros(count, np.bool_)
    taken: set[int] = set()
    last = -1
    for detection, truth in zip(detections.tolist(), truths.tolist(), strict=True):
        if detection != last and truth not in taken:
            taken.add(truth)
            matched[detection] = True
            last = detection
    return matched
