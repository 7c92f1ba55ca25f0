"""What goes along with the training: checkpoints to resume from, and a progress bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
from tqdm import tqdm


class Checkpoints(L.Callback):
    """Saves the state now and then, in a way that no kill leaves half of it behind.

    Args:
        path: where to.
        every: steps between two.
        expired: asked at each checkpoint; true ends the training there.
    """

    def __init__(self, path: Path, every: int, expired: Callable[[], bool]) -> None:
        self.path = path
        self.every = every
        self.expired = expired
        self._since = time.monotonic()

    def on_train_start(self, *_: Any) -> None:
        """Starts the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Saves, if it is time, and at the end."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            now = time.monotonic()
            module.seconds += now - self._since
            self._since = now
            partial = self.path.with_suffix(".partial")
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                os.replace(partial, self.path)
            if self.expired():
                trainer.should_stop = True


class Progress(L.Callback):
    """A progress bar on stderr."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Opens the bar."""
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=self.title,
            file=sys.stderr,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Moves it on, without asking the device for the loss."""
        if module.curve:
            self._bar.set_postfix(loss=module.curve[-1], refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *_: Any) -> None:
        """Closes it."""
        self._bar.close()
