"""A configuration on Lightning: how it trains, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import repeat
from typing import Any

import lightning as L  # noqa: N812
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from alphafpn import alpha_parameters
from alphafpn.tiny import cut_dataset, evaluate_tiny, merge_detections
from benchmarks.batched import BatchedLoss, outputs
from benchmarks.paper.config import BATCHED, Config
from benchmarks.paper.data import Batches, Split

_POINTS = 40  # of the loss curve
_MULTIPLE = 32  # pixels; a batch's sides are multiples of it
_MOMENTUM, _DECAY = 0.9, 1e-4


class Experiment(L.LightningModule):
    """One configuration: trains in `fit`, judges in `validate`.

    Args:
        config: the configuration.
        detector: what to train.
        batches: what to train on.
        val: what to judge on.
        on_device: whether images stay on the device, or each batch is sent there.
        compiled: mode of `torch.compile` for the network in training; empty: not compiled.
    """

    def __init__(
        self,
        config: Config,
        detector: Any,
        batches: Batches,
        val: Split,
        *,
        on_device: bool,
        compiled: str = "",
    ) -> None:
        super().__init__()
        self.config = config
        self.detector = detector
        self.batches = batches
        self.val = val
        self.on_device = on_device
        self.curve: list[float] = []
        self.diverged_at: int | None = None
        self.seconds = 0.0
        self.every = max(1, config.steps // _POINTS)
        self._losses: list[Tensor] = []
        self._network: Callable[[Tensor], tuple[Tensor, Tensor]] = partial(outputs, detector)
        if compiled:
            self._network = torch.compile(self._network, mode=compiled, dynamic=False)
        self._loss: BatchedLoss | None = None
        self._images: Tensor | None = None
        self._found: list[dict[str, Any]] = []
        self._hooks: list[Any] = []
        self._factors: dict[nn.Module, list[Tensor]] = {}

    def configure_optimizers(self) -> Any:
        """SGD as the paper's: biases learn twice as fast without decay, factors have no decay."""
        factors = alpha_parameters(self.detector)
        known = {id(factor) for factor in factors}
        groups: list[dict[str, Any]] = [{"params": factors, "weight_decay": 0.0}]
        named = [
            (name, parameter)
            for name, parameter in self.detector.named_parameters()
            if parameter.requires_grad and id(parameter) not in known
        ]
        biases = [parameter for name, parameter in named if name.endswith("bias")]
        groups.append({"params": biases, "weight_decay": 0.0, "lr": 2 * self.config.lr})
        groups.append({"params": [p for name, p in named if not name.endswith("bias")]})
        groups = [group for group in groups if group["params"]]
        lr = self.config.lr
        optimizer: torch.optim.Optimizer
        if self.config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr, momentum=_MOMENTUM, weight_decay=_DECAY)
        else:
            optimizer = torch.optim.AdamW(groups, lr, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _rate(self, step: int) -> float:
        config = self.config
        drops = (step >= config.steps / 2) + (step >= config.steps * 5 / 6)
        warm = 1.0 if step >= config.warmup else 1 / 3 + 2 / 3 * step / config.warmup
        return float(warm * 0.1**drops)

    def train_dataloader(self) -> Iterable[int]:
        """Goes on for ever: `training_step` makes its batch itself."""
        return _Endless()

    def training_step(self, *_: Any) -> Tensor:
        """The loss of the batch that belongs to this step."""
        # What torchvision draws (proposals to train on) must not depend on what was drawn before.
        step = self.global_step
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        images = self._open(self.batches.split)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        pixels, boxes, labels = self.batches(images, step, rank, world)
        losses = self.losses(pixels, boxes, labels)
        loss: Tensor = torch.stack([part.float() for part in losses.values()]).sum()
        self._losses.append(loss.detach())
        if len(self._losses) == self.every:
            # The only time that the loss is waited for.
            mean = self.trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
            self.curve.append(round(float(mean), 5))
            self._losses.clear()
            if not self.curve[-1] < float("inf"):
                self.diverged_at = step
                self.trainer.should_stop = True
        return loss

    def losses(
        self,
        pixels: Tensor,
        boxes: list[Tensor],
        labels: list[Tensor],
        *,
        batched: bool = True,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            pixels: uint8 [N, h, w, 3], on any device.
            boxes: xyxy [G_i, 4] of each image, on the CPU.
            labels: [G_i] of each image, on the CPU.
            batched: match and judge all images at once, where the detector's losses are those of
                `tiny_retinanet`.

        Returns:
            What the detector returns in training.
        """
        counts = [len(part) for part in boxes]
        where = self._send(torch.cat(boxes)).split(counts)
        what = self._send(torch.cat(labels)).split(counts)
        if not batched or self.config.detector not in BATCHED:
            targets = [{"boxes": b, "labels": n} for b, n in zip(where, what, strict=True)]
            found: dict[str, Tensor] = self.detector(self._floats(pixels), targets)
            return found
        images = self._normalised(pixels)
        if self._loss is None:
            self._loss = BatchedLoss(self.detector, images.shape[-2:])
        return self._loss(*self._network(images), self._loss.match(where), where, what)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the record needs."""
        losses = [float(loss) for loss in self._losses]
        checkpoint["record"] = [self.curve, losses, self.seconds, self.diverged_at]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what was kept."""
        self.curve, losses, self.seconds, self.diverged_at = checkpoint["record"]
        self._losses = [torch.tensor(loss, device=self.device) for loss in losses]

    def on_validation_start(self) -> None:
        """Lays out what to look at: whole images, or tiles."""
        self._images, self._found = None, []
        for gate in self._gates():
            self._hooks.append(gate.register_forward_hook(self._watch))

    def val_dataloader(self) -> Iterable[int]:
        """This device's share of what there is to look at."""
        count = len(self._views)
        return range(self.trainer.global_rank, count, self.trainer.world_size)

    def validation_step(self, index: int, _: int) -> None:
        """Collects what is detected."""
        view = self._views[index]
        x1, y1, x2, y2 = view["corner"]
        pixels = self._open(self.val)[view["row"], y1:y2, x1:x2]
        found = self.detector(self._floats(pixels[None]))[0]
        boxes = found["boxes"].float().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        kinds = [self.val.categories[n - 1] for n in found["labels"].tolist()]
        rows = zip(boxes.tolist(), found["scores"].tolist(), kinds, strict=True)
        for box, score, kind in rows:
            entry = {"image_id": view["id"], "category_id": kind, "bbox": box, "score": score}
            self._found.append(entry)

    def on_validation_epoch_end(self) -> None:
        """Judges what all devices found."""
        found = self._found
        if self.trainer.world_size > 1:
            shares: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, found)
            found = [entry for share in shares for entry in share]
        if self.config.tile:
            found = merge_detections(found, {"images": self._views})
        self.log_dict({**evaluate_tiny(self.val.coco, found), "detections": float(len(found))})
        if len(self.val.categories) > 1:
            self.log_dict(self._by_category(found))
        for hook in self._hooks:
            hook.remove()
        for edge, factor in enumerate(self._alpha()):
            self.log(f"alpha{edge}", factor)

    def _by_category(self, found: list[dict[str, Any]]) -> dict[str, float]:
        """AP50_all of each category alone, by its name."""
        coco, figures = self.val.coco, {}
        for category in coco["categories"]:
            truth, own = (
                [entry for entry in entries if entry["category_id"] == category["id"]]
                for entries in (coco["annotations"], found)
            )
            part = {**coco, "categories": [category], "annotations": truth}
            name = category.get("name", str(category["id"]))
            figures[f"AP50_all/{name}"] = evaluate_tiny(part, own)["AP50_all"]
        return figures

    def _gates(self) -> list[nn.Module]:
        return [*getattr(self.detector.backbone.fpn, "gates", [])]

    def _watch(self, gate: nn.Module, _: Any, factor: Tensor) -> None:
        self._factors.setdefault(gate, []).append(factor.detach().float().mean())

    def _alpha(self) -> list[float]:
        """The factors after training, finest edge first; with attention their means over images."""
        gates = self._gates()
        if gates:
            return [float(torch.stack(self._factors[gate]).mean()) for gate in gates]
        fpn = self.detector.backbone.fpn
        return [float(v) for v in fpn.alpha.detach().expand(len(fpn.inner_blocks) - 1)]

    @cached_property
    def _views(self) -> list[dict[str, Any]]:
        """What is looked at at once: with `row` in the array of images and `corner` in the row."""
        coco, row = self.val.coco, {}
        for index, image in enumerate(coco["images"]):
            row[image["id"]] = index
        if self.config.tile:
            tiles = cut_dataset(coco, tile_size=self.config.tile)["images"]
            return [{**tile, "row": row[tile["original_image_id"]]} for tile in tiles]
        height, width = self.config.size
        return [
            {"id": identity, "row": index, "corner": [0, 0, width, height]}
            for identity, index in row.items()
        ]

    def _open(self, split: Split) -> Tensor:
        if self._images is None:
            self._images = split.open()
            if self.on_device:
                self._images = self._images.to(self.device)
        return self._images

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _floats(self, pixels: Tensor) -> Tensor:
        """Pixels [N, H, W, 3] as a detector takes them."""
        return self._send(pixels).permute(0, 3, 1, 2).float().div_(255)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [N, H, W, 3] as the detector's backbone takes them: also padded."""
        transform = self.detector.transform
        mean, deviation = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (transform.image_mean, transform.image_std)
        )
        images = self._floats(pixels).sub_(mean).div_(deviation)
        missing = [-side % _MULTIPLE for side in images.shape[-2:]]
        return F.pad(images, [0, missing[1], 0, missing[0]]) if any(missing) else images


class _Endless:
    """Batches come from the step's number: the loader only has to go on."""

    def __iter__(self) -> Iterator[int]:
        return repeat(0)
