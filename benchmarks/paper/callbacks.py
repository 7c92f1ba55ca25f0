"""What goes along with the training: checkpoints to resume from, and a progress bar."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
from tqdm import tqdm


class Checkpoints(L.Callback):
    """Saves the state now and then, in a way that no kill leaves half of it behind.

    Args:
        path: where to.
        every: steps between two.
        deadline: in `time.time()`; the first checkpoint after it is the last.
    """

    def __init__(self, path: Path, every: int, deadline: float) -> None:
        self.path = path
        self.every = every
        self.deadline = deadline
        self._since = time.monotonic()

    def on_train_start(self, *_: Any) -> None:
        """Starts the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Saves, if it is time, and at the end."""
        step = trainer.global_step
        last = step == trainer.max_steps or module.diverged_at is not None
        if step % self.every == 0 or last:
            now = time.monotonic()
            module.seconds += now - self._since
            self._since = now
            partial = self.path.with_suffix(".partial")
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                os.replace(partial, self.path)
            late = time.time() > self.deadline
            if trainer.strategy.reduce_boolean_decision(late, all=False):
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
