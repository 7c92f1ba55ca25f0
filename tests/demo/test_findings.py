"""Words: they follow from the figures."""

from __future__ import annotations

import pytest

from alphafpn.demo.findings import EQUAL, GAINS, LOSES, SPLIT, findings, verdict
from alphafpn.demo.training import ROWS

FACTORS = [[0.36, 0.45, 0.23], [0.37, 0.42, 0.25]]


def results(**changed):
    """Two seeds of each row, in points; all alike but those named."""
    names = dict(zip(("one", "s_alpha", "half", "none", "first"), ROWS, strict=True))
    points = dict.fromkeys(ROWS, (70, 71)) | {names[name]: pair for name, pair in changed.items()}
    return {row: [{"AP50_tiny": value / 100} for value in pair] for row, pair in points.items()}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((-20, -4), LOSES),
        ((-20, -3), SPLIT),
        ((-20, 4), SPLIT),
        ((4, 20), GAINS),
        ((-3, 3), EQUAL),
        ((-4,), LOSES),
    ],
)
def test_a_verdict_is_what_all_seeds_say(points, expected):
    assert verdict(points) == expected


def test_a_loss_where_what_decides_is_far_is_told():
    far = results(s_alpha=(46, 48), none=(45, 50), half=(50, 70), first=(50, 72))
    text = " ".join(findings(far, results(none=(60, 60), first=(70, 72)), FACTORS))
    assert "S-alpha loses (-24.0, -23.0)" in text
    assert f"alpha = 0.5 {SPLIT} (-20.0, -1.0)" in text
    assert "S-alpha loses only where that decides; so does alpha = 0, which cuts it off. " in text
    assert "0.36, 0.45, 0.23 where what decides is far, 0.37, 0.42, 0.25" in text
    assert "no top-down path at all (alpha = 0) loses (-10.0, -11.0)" in text
    assert f"the first function alone {EQUAL} (+0.0, +1.0)" in text
    assert "do not show" not in text


@pytest.mark.parametrize(
    ("far", "near"),
    [((46, 70), (70, 71)), ((70, 71), (70, 71)), ((46, 48), (46, 48)), ((90, 90), (46, 48))],
)
def test_what_the_figures_do_not_show_is_not_claimed(far, near):
    text = " ".join(findings(results(s_alpha=far), results(s_alpha=near), FACTORS))
    assert "these trainings do not show" in text
    assert "hold back" not in text


def test_alpha_0_is_named_only_if_it_loses():
    text = " ".join(findings(results(s_alpha=(46, 48)), results(), FACTORS))
    assert "only where that decides; alpha = 1 from the same first function does not. " in text


def test_own_scenes_have_one_sentence():
    (text,) = findings(results(s_alpha=(90, 90)), None, FACTORS[:1])
    assert text.startswith("On your scenes, alpha = 1 has AP50_tiny 70.0 and 71.0.")
    assert "S-alpha gains (+20.0, +19.0)" in text
