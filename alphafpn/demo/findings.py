"""What the figures of a demo say, in words that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from alphafpn.demo.training import BASELINE, ESTIMATED, FIRST, MEASURE, NONE

Results: TypeAlias = dict[str, list[dict[str, Any]]]  # runs by row, in the order of seeds

CLOSE = 3.0  # points; rows on near scenes have not been seen to differ by as much
LOSES, GAINS, EQUAL, SPLIT = "loses", "gains", f"is within {CLOSE:g} points", "differs by the seed"

_UNRANKED = (
    f"Not shown: two seeds rank no rows that are within {CLOSE:g} points of each other, or whose "
    "order differs by the seed."
)
NOTES = {
    "drawn": f"{_UNRANKED} Nothing here is about real images.",
    "own": f"{_UNRANKED} Short trainings of a small detector say little about another one.",
}


def differences(results: Results, row: str, other: str = BASELINE) -> list[float]:
    """What a row has more than another, in points of `MEASURE` by seed."""
    pairs = zip(results[row], results[other], strict=True)
    return [100 * (run[MEASURE] - against[MEASURE]) for run, against in pairs]


def verdict(points: Sequence[float]) -> str:
    """What all seeds say alike, if they do."""
    if all(value < -CLOSE for value in points):
        return LOSES
    if all(value > CLOSE for value in points):
        return GAINS
    return EQUAL if all(abs(value) <= CLOSE for value in points) else SPLIT


def findings(
    results: Results, near: Results | None, s_alpha: Sequence[Sequence[float]]
) -> list[str]:
    """Sentences on the results.

    Args:
        results: Of a user's scenes, or of those where what decides is far away.
        near: Of those where it is near; None with a user's scenes.
        s_alpha: Factors of each of the two.
    """
    if near is None:
        return [_rows("On your scenes", results)]
    sentences = [
        _rows("Where what decides lies 64 px or more from all that is tiny", results),
        _rows("Where every object shows by itself what it is, on the same images", near),
    ]
    far_verdict, near_verdict = (verdict(differences(part, ESTIMATED)) for part in (results, near))
    factors = [", ".join(f"{factor:.2f}" for factor in part) for part in s_alpha]
    if far_verdict == LOSES and near_verdict != LOSES:
        none, first = (verdict(differences(results, row)) for row in (NONE, FIRST))
        cut = "; so does alpha = 0, which cuts it off" if none == LOSES else ""
        if first in (EQUAL, GAINS):
            cut += "; alpha = 1 from the same first function does not"
        sentences.append(
            "In so short a training small factors hold back what lies far away: S-alpha loses only "
            "where that decides"
            f"{cut}. S-alpha cannot know, as it reads sizes alone: it is {factors[0]} where what "
            f"decides is far, {factors[1]} where it is near."
        )
    else:
        sentences.append(
            f"S-alpha is {factors[0]} where what decides is far and {factors[1]} where it is near: "
            f"against {BASELINE} it {far_verdict} there and {near_verdict} here. That small "
            "factors harm only where what decides is far, these trainings do not show."
        )
    kinds = {NONE: "no top-down path at all (alpha = 0)", FIRST: "the first function alone"}
    against = "; ".join(
        f"{words} {_compared(differences(near, row, ESTIMATED))}" for row, words in kinds.items()
    )
    return [*sentences, f"Where it is near, against S-alpha: {against}."]


def _rows(where: str, results: Results) -> str:
    base = " and ".join(f"{100 * run[MEASURE]:.1f}" for run in results[BASELINE])
    others = "; ".join(
        f"{row} {_compared(differences(results, row))}" for row in results if row != BASELINE
    )
    return f"{where}, {BASELINE} has {MEASURE} {base}. Against it, {others}."


def _compared(points: Sequence[float]) -> str:
    return f"{verdict(points)} ({', '.join(f'{value:+.1f}' for value in points)})"
