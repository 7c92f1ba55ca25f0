"""The other detectors' losses and samplings, literally and in loops: slow, and meant to be read."""

from __future__ import annotations

import math


def iou(a, b):
    """Of two boxes, xyxy."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = w * h
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def encode(box, anchor):
    """The deltas that take an anchor to a box, weighted as the paper's."""
    (aw, ah), (bw, bh) = ((part[2] - part[0], part[3] - part[1]) for part in (anchor, box))
    across = (box[0] + bw / 2 - anchor[0] - aw / 2) / aw
    down = (box[1] + bh / 2 - anchor[1] - ah / 2) / ah
    return 10 * across, 10 * down, 5 * math.log(bw / aw), 5 * math.log(bh / ah)


def decode(deltas, anchor):
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = anchor[0] + w / 2 + deltas[0] / 10 * w
    y = anchor[1] + h / 2 + deltas[1] / 10 * h
    w, h = w * math.exp(deltas[2] / 5), h * math.exp(deltas[3] / 5)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def free_anchor(images, bag_size):
    """FreeAnchor's two losses.

    `images` holds (probabilities per anchor and class, deltas, anchors, boxes, labels).
    """
    positive = negative = objects = 0
    for scores, deltas, anchors, boxes, labels in images:
        found = [decode(delta, anchor) for delta, anchor in zip(deltas, anchors, strict=True)]
        for box, label in zip(boxes, labels, strict=True):
            objects += 1
            ranked = sorted(range(len(anchors)), key=lambda j: -iou(box, anchors[j]))
            above = below = 0.0
            for j in ranked[:bag_size]:
                loss = 0.0
                for delta, wanted in zip(deltas[j], encode(box, anchors[j]), strict=True):
                    x = abs(delta - wanted)
                    loss += x * x / (2 * 0.11) if x < 0.11 else x - 0.11 / 2
                matched = scores[j][label] * math.exp(-0.75 * loss)
                above += matched / (1 - matched)
                below += 1 / (1 - matched)
            positive -= 0.5 * math.log(above / below)
        for j in range(len(anchors)):
            for label, score in enumerate(scores[j]):
                taken = 0.0
                for box, own in zip(boxes, labels, strict=True):
                    if own == label:
                        best = max(iou(box, other) for other in found)
                        here = iou(box, found[j])
                        if here > 0.6:
                            taken = max(taken, (here - 0.6) / (best - 0.6))
                wrong = score * (1 - taken)
                negative -= 0.5 * wrong**2 * math.log(1 - wrong)
    return positive / max(1, objects), negative / (max(1, objects) * bag_size)


def balanced_l1(x):
    """Libra R-CNN's loss of one difference."""
    b = math.exp(1.5 / 0.5) - 1
    x = abs(x)
    if x < 1:
        return 0.5 / b * (b * x + 1) * math.log(b * x + 1) - 0.5 * x
    return 1.5 * x + 1.5 / b - 0.5


def target_map(roi, box, row, column):
    """Grid R-CNN's target for one point: which of 56 x 56 pixels are 1."""
    width, height = roi[2] - roi[0], roi[3] - roi[1]
    # A pixel h of the map is at P + (4 h - 56) / (2 * 56) * side in the image.
    px = (box[0] + column / 2 * (box[2] - box[0]) - roi[0]) / width
    py = (box[1] + row / 2 * (box[3] - box[1]) - roi[1]) / height
    x, y = (math.floor((2 * 56 * share + 56) / 4) for share in (px, py))
    marked = [[0.0] * 56 for _ in range(56)]
    for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        if 0 <= x + dx < 56 and 0 <= y + dy < 56:
            marked[y + dy][x + dx] = 1.0
    return marked


def box_from_maps(maps, roi):
    """Grid R-CNN's box from nine maps of probabilities, row by row."""
    width, height = roi[2] - roi[0], roi[3] - roi[1]
    points = []
    for probabilities in maps:
        best = max(
            ((y, x) for y in range(56) for x in range(56)),
            key=lambda place: probabilities[place[0]][place[1]],
        )
        y, x = best
        points.append(
            (
                roi[0] + (4 * (x + 0.5) - 56) / (2 * 56) * width,
                roi[1] + (4 * (y + 0.5) - 56) / (2 * 56) * height,
                probabilities[y][x],
            )
        )
    sides = []
    for axis, members in ((0, (0, 3, 6)), (1, (0, 1, 2)), (0, (2, 5, 8)), (1, (6, 7, 8))):
        total = sum(points[i][2] for i in members)
        sides.append(sum(points[i][axis] * points[i][2] for i in members) / total)
    return sides
