"""Error messages as tests write them."""

from __future__ import annotations

import re


def pattern(message: str) -> str:
    """A regular expression for a message, in which "..." stands for what is left out."""
    return ".*".join(map(re.escape, message.split("...")))
