"""Grid R-CNN (Lu et al., CVPR 2019): boxes from a grid of points."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

from alphafpn.tiny import tiny_faster_rcnn
from alphafpn.tiny.detectors import Alpha, PerLevel
from benchmarks.paper.detectors.libra_rcnn import RATIOS, SIZES

SIDE = 3  # points along each side of a box
POINTS = SIDE * SIDE
POOLED, MAP = 14, 56
_GROUPS = 36  # of the normalisation
_RARE = -4.6  # logit of a heat map at the start: few pixels are points
_GRID_WEIGHT = 15.0
_NMS = 0.3


def grid_rcnn(
    backbone: str | nn.Module = "resnet50",
    *,
    num_classes: int = 2,
    alpha: Alpha | None = None,
    anchor_sizes: PerLevel = SIZES,
    aspect_ratios: PerLevel = RATIOS,
    grid_channels: int = 576,
    grid_convolutions: int = 8,
    grid_rois: int = 96,
    **kwargs: Any,
) -> FasterRCNN:
    """Builds Grid R-CNN on `tiny_faster_rcnn`: RoIs are classified, then found by 3 x 3 points.

    RoIs that are left after an NMS at 0.3 are detections; their boxes are then replaced by those of
    the grid. There is no box regression but the RPN's. S-alpha counts the anchors of the RPN, as
    for Faster R-CNN. What the paper leaves open is as in its authors' code: group normalisation
    in the grid's head, and the weight of its loss, 15.

    Args:
        backbone: As in `tiny_faster_rcnn`.
        num_classes: Including the background, which has label 0.
        alpha: As in `tiny_faster_rcnn`.
        anchor_sizes: As in `tiny_faster_rcnn`, other than by default.
        aspect_ratios: As in `tiny_faster_rcnn`, other than by default.
        grid_channels: Of the grid's head, over all points: a multiple of 36.
        grid_convolutions: How many come before the points exchange their features.
        grid_rois: Of each image, at most so many RoIs on objects train the grid.
        **kwargs: For `tiny_faster_rcnn`; `box_nms_thresh` is the NMS before the grid.

    Returns:
        The detector, in training mode.

    Raises:
        TypeError: As in `tiny_faster_rcnn`.
        ValueError: If `grid_channels` is no multiple of 36, and as in `tiny_faster_rcnn`.
    """
    if grid_channels < 1 or grid_channels % _GROUPS:
        raise ValueError(f"grid_channels: expected a multiple of {_GROUPS}, found {grid_channels}")
    model = tiny_faster_rcnn(
        backbone,
        num_classes=num_classes,
        alpha=alpha,
        anchor_sizes=anchor_sizes,
        aspect_ratios=aspect_ratios,
        **{"box_nms_thresh": _NMS, **kwargs},
    )
    head = GridHead(model.backbone.out_channels, grid_channels, grid_convolutions)
    model.roi_heads = GridRoIHeads(model.roi_heads, head, grid_rois)
    return model


class GridRoIHeads(RoIHeads):  # type: ignore[misc]
    """Modifications: RoIs are classified only, and boxes come from grid points.

    Args:
        stock: The heads to take all other parts from.
        head: What predicts the points.
        grid_rois: As in `grid_rcnn`.
    """

    def __init__(self, stock: RoIHeads, head: GridHead, grid_rois: int) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(stock))
        self.box_predictor = Classifier(stock.box_predictor.cls_score)
        self.grid_roi_pool = MultiScaleRoIAlign(
            stock.box_roi_pool.featmap_names, output_size=POOLED, sampling_ratio=2
        )
        self.grid_head = head
        self.grid_rois = grid_rois

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses in training, else detections."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        found, _ = super().forward(features, proposals, image_shapes)
        boxes = [entry["boxes"] for entry in found]
        maps = self.grid_head(self.grid_roi_pool(features, boxes, image_shapes))
        placed = boxes_from_maps(maps, torch.cat(boxes)).split([len(part) for part in boxes])
        for entry, part, shape in zip(found, placed, image_shapes, strict=True):
            entry["boxes"] = clip_boxes_to_image(part, shape)
        return found, {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        proposals, matches, labels, _ = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, _ = self.box_predictor(self.box_head(pooled))
        rois, truth = [], []
        for i, target in enumerate(targets or ()):
            objects = torch.where(labels[i] > 0)[0]
            chosen = objects[torch.randperm(len(objects), device=objects.device)[: self.grid_rois]]
            rois.append(proposals[i][chosen])
            truth.append(target["boxes"][matches[i][chosen]])
        maps = self.grid_head(self.grid_roi_pool(features, rois, image_shapes))
        wanted = target_maps(torch.cat(rois), torch.cat(truth))
        loss = F.binary_cross_entropy_with_logits(maps.float(), wanted, reduction="sum")
        return {
            "loss_classifier": F.cross_entropy(logits, torch.cat(labels)),
            "loss_grid": _GRID_WEIGHT * loss / max(1, wanted.numel()),
        }


class Classifier(nn.Module):
    """Class scores of RoIs, and box deltas that leave them where they are."""

    def __init__(self, cls_score: nn.Linear) -> None:
        super().__init__()
        self.cls_score = cls_score

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, C] and deltas [N, 4 * C] of pooled features [N, F]."""
        logits = self.cls_score(x)
        return logits, logits.new_zeros(len(logits), 4 * logits.shape[1])


class GridHead(nn.Module):
    """Heat maps [N, 9, 56, 56] (logits) of pooled RoIs [N, C, 14, 14], points row by row.

    Args:
        in_channels: Of the pyramid.
        channels: Of the head, a ninth of them for each point.
        convolutions: How many come first.
    """

    def __init__(self, in_channels: int, channels: int, convolutions: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(convolutions):
            before = channels if i else in_channels
            layers += [
                nn.Conv2d(before, channels, 3, padding=2, dilation=2),
                nn.GroupNorm(_GROUPS, channels),
                nn.ReLU(),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.first_order = Exchange(channels // POINTS)
        self.second_order = Exchange(channels // POINTS)
        self.upsample = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 4, 2, 1, groups=POINTS),
            nn.GroupNorm(_GROUPS, channels),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, POINTS, 4, 2, 1, groups=POINTS),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        last = self.upsample[-1]
        nn.init.normal_(last.weight, std=0.001)
        nn.init.constant_(last.bias, _RARE)

    def forward(self, x: Tensor) -> Tensor:
        """Each point's own features, those of its neighbours, and of theirs."""
        own = self.convolutions(x)
        first = own + self.first_order(own)
        fused: Tensor = self.upsample(own + self.second_order(first))
        return fused


class Exchange(nn.Module):
    """What each point's features get from its neighbours in the grid (Sec. 3.2 of the paper).

    For each pair of neighbours three convolutions of 5 x 5 without anything between them; those of
    all pairs run as the groups of one.

    Args:
        channels: Of each point.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pairs = neighbours()
        width = len(self.pairs) * channels
        self.transform = nn.Sequential(
            *(nn.Conv2d(width, width, 5, padding=2, groups=len(self.pairs)) for _ in range(3))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sums over neighbours, for features [N, 9 * C, H, W]."""
        points = x.unflatten(1, (POINTS, -1))
        sent = points[:, [source for source, _ in self.pairs]].flatten(1, 2)
        received = self.transform(sent).unflatten(1, (len(self.pairs), -1))
        goals = torch.tensor([goal for _, goal in self.pairs], device=x.device)
        return torch.zeros_like(points).index_add(1, goals, received).flatten(1, 2)


def neighbours() -> list[tuple[int, int]]:
    """Pairs (source, goal) of points that are one step apart in the grid."""
    places = [divmod(point, SIDE) for point in range(POINTS)]
    return [
        (i, j)
        for i, (y, x) in enumerate(places)
        for j, (v, u) in enumerate(places)
        if abs(y - v) + abs(x - u) == 1
    ]


def target_maps(rois: Tensor, boxes: Tensor) -> Tensor:
    """Which pixels [N, 9, 56, 56] are 1: at each grid point a cross of five.

    The map covers twice the RoI's sides about its centre (the extended region mapping), so that it
    reaches points that the RoI leaves out.

    Args:
        rois: [N, 4], xyxy.
        boxes: Of their objects, [N, 4].
    """
    steps = torch.linspace(0, 1, SIDE, device=boxes.device)
    corner, sides = _region(rois)
    # [N, 3, 2]: where the grid's columns (x) and rows (y) are, in pixels of the map.
    points = boxes[:, None, :2] + steps[:, None] * (boxes[:, 2:] - boxes[:, :2])[:, None]
    places = ((points - corner[:, None]) / sides[:, None] * MAP).floor()
    pixels = torch.arange(MAP, device=boxes.device)
    across, down = ((pixels - places[..., axis, None]).abs() for axis in (0, 1))
    distance = down[:, :, None, :, None] + across[:, None, :, None, :]
    return (distance <= 1).flatten(1, 2).float()


def boxes_from_maps(maps: Tensor, rois: Tensor) -> Tensor:
    """Boxes [N, 4] from heat maps [N, 9, 56, 56] (logits) of RoIs [N, 4].

    A point is where its map is highest. A side of the box is the mean over its three points,
    weighted by their probabilities.
    """
    corner, sides = _region(rois)
    score, place = maps.flatten(2).float().sigmoid().max(2)
    pixel = torch.stack([place % MAP, place // MAP], 2) + 0.5
    points = corner[:, None] + pixel / MAP * sides[:, None]
    grid, weight = points.unflatten(1, (SIDE, SIDE)), score.unflatten(1, (SIDE, SIDE))

    def mean(part: Tensor, share: Tensor) -> Tensor:
        return (part * share).sum(1) / share.sum(1)

    left, right = (mean(grid[:, :, k, 0], weight[:, :, k]) for k in (0, -1))
    top, bottom = (mean(grid[:, k, :, 1], weight[:, k]) for k in (0, -1))
    # Points that were never trained may lie the other way round.
    low = torch.stack([left.minimum(right), top.minimum(bottom)], 1)
    high = torch.stack([left.maximum(right), top.maximum(bottom)], 1)
    return torch.cat([low, high], 1)


def _region(rois: Tensor) -> tuple[Tensor, Tensor]:
    """Upper left corner and sides [N, 2] of what the heat maps cover."""
    sides = rois[:, 2:] - rois[:, :2]
    return rois[:, :2] - sides / 2, 2 * sides
