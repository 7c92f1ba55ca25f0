"""Turn results into the tables and pictures of docs/experiments.md and docs/paper-systems.md.

    python -m benchmarks.paper.report [RESULTS.jsonl ...]

Only what lies between the pages' marks is written anew. Tables 3 and 4 are printed, too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import results, tables
from benchmarks.paper.pairs import Mean, Setting, Variant, mean_of, settings
from benchmarks.paper.sizes import PAGE

_ROOT = Path(__file__).resolve().parents[2]
_MAIN = "AP50_tiny"
_OTHERS = ("AP25_tiny", "AP75_tiny", "AP50_tiny1", "AP50_tiny2", "AP50_tiny3", "MR50_tiny")


def report(records: Sequence[dict[str, Any]], page: Path) -> None:
    """Write tables into `page`, and pictures into `images/` beside it."""
    found = settings(records)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [_overview(found)] if len(found) > 1 else []
    for number, setting in enumerate(found, start=1):
        inside = [_facts(setting), table(setting), *_remarks(setting)]
        for name, draw in (("alpha", draw_alpha), ("pairs", draw_pairs)):
            file = images / f"experiments-{number}-{name}.svg"
            caption = draw(setting, file)
            if caption:
                inside.append(f"![{caption}](images/{file.name})")
        parts.append(results.fold(f"{number}. {title(setting)}", "\n\n".join(inside)))
    results.fill(page, "results", ["\n\n".join(parts)])


def title(setting: Setting) -> str:
    """What the runs of a setting have in common, in a line."""
    config = setting.config
    parts = [
        config["detector"],
        config["backbone"],
        "x".join(map(str, config["size"])),
        f"{config['steps']} steps of {config['batch']}",
        config["optimizer"],
    ]
    if config["scale_match"] != "none":
        parts.append(config["scale_match"])
    if config["init"]:
        parts.append(f"from {config['init'].split()[0]}")
    return ", ".join(parts)


def table(setting: Setting) -> str:
    """A row for each kind of factors."""
    lines = [
        f"| factors | at the end | seeds | {_MAIN} | against baseline | detectable | "
        + " | ".join(_OTHERS)
        + " |",
        "|---" * (6 + len(_OTHERS)) + "|",
    ]
    for variant in setting.variants:
        main = mean_of(variant.values(_MAIN))
        seeds = str(main.count)
        if variant.diverged:
            seeds += f" ({variant.diverged} diverged)"
        cells = [
            variant.name,
            " ".join(f"{factor:.3g}" for factor in variant.factors),
            seeds,
            _shown(main),
            *_difference(setting, variant),
            *(f"{mean_of(variant.values(figure)).mean:.2f}" for figure in _OTHERS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_alpha(setting: Setting, file: Path) -> str:
    """Fig. 1: AP against constant factors; S-alpha at the mean of its factors."""
    known = [v for v in setting.variants if v.constant is not None and v.runs]
    if len(known) < 3:
        return ""
    _, axes = _axes()
    points = sorted((v.constant or 0.0, mean_of(v.values(_MAIN))) for v in known)
    axes.errorbar(
        [x for x, _ in points],
        [m.mean for _, m in points],
        [0 if math.isnan(m.half) else m.half for _, m in points],
        marker="o",
        capsize=3,
        label="constant",
    )
    for variant in setting.variants:
        if variant.alpha == "s-alpha" and variant.runs:
            main = mean_of(variant.values(_MAIN))
            place = sum(variant.factors) / len(variant.factors)
            half = 0 if math.isnan(main.half) else main.half
            axes.errorbar([place], [main.mean], [half], marker="*", markersize=12, capsize=3,
                          linestyle="", label="S-alpha, at its mean")  # fmt: skip
    axes.set_title(title(setting), fontsize=9)
    axes.set_xlabel("factor")
    axes.set_ylabel(f"{_MAIN}, %")
    axes.legend()
    _save(axes, file)
    return f"{_MAIN} against the factor, means over seeds with 95 % intervals"


def draw_pairs(setting: Setting, file: Path) -> str:
    """Differences to the baseline, seed by seed."""
    base = setting.baseline
    others = [v for v in setting.variants if not v.is_baseline]
    drawn = [(v, d) for v in others if base and (d := v.against(base, _MAIN))]
    if not drawn:
        return ""
    _, axes = _axes()
    axes.axhline(0, color="grey", linewidth=1)
    for place, (_, differences) in enumerate(drawn):
        values = list(differences.values())
        axes.plot([place] * len(values), values, "o", alpha=0.5, color="tab:blue")
        main = mean_of(values)
        half = 0 if math.isnan(main.half) else main.half
        axes.errorbar([place + 0.15], [main.mean], [half], marker="_", capsize=3, color="black")
    axes.set_xticks(range(len(drawn)), [variant.name for variant, _ in drawn], rotation=20)
    axes.set_title(title(setting), fontsize=9)
    axes.set_ylabel(f"{_MAIN} against baseline, points")
    _save(axes, file)
    return f"{_MAIN} against the baseline of the same seed; means with 95 % intervals"


def _facts(setting: Setting) -> str:
    config, run = setting.config, setting.runs[0]
    crops = f"crops of {config['crop']}" if config["crop"] else "whole images"
    judged = f"tiles of {config['tile']}" if config["tile"] else "whole images"
    devices = sorted({run["device"] for run in setting.runs})
    counts, versions = run["counts"], run["versions"]
    clip = f", gradients clipped to {config['clip']:g}" if config["clip"] else ""
    return (
        f"Trained on {crops} from {counts['train_images']} images ({counts['train_boxes']} "
        f"objects), judged on {judged}: {counts['val_images']} ({counts['val_boxes']} objects). "
        f"{config['channels']} channels, {config['optimizer']}, learning rate {config['lr']:g}, "
        f"{config['warmup']} steps of warm-up{clip}, {config['precision']}; "
        f"on {', '.join(devices)}; torch {versions['torch']}, torchvision "
        f"{versions['torchvision']}."
    )


def _remarks(setting: Setting) -> list[str]:
    constants = [v for v in setting.variants if v.constant is not None and v.runs]
    found = []
    if len(constants) > 2:
        best = max(constants, key=lambda v: mean_of(v.values(_MAIN)).mean)
        found.append(
            f"bf-alpha, the best constant in the mean over seeds, is {best.alpha}. It was chosen "
            "on the images that it is judged on, which flatters it."
        )
    for variant in setting.variants:
        sources = [run["s_alpha"] for run in variant.runs.values() if run["s_alpha"]]
        for source in sources[:1]:
            texts = [
                f"{name} {', '.join(f'{ratio:.3f}' for ratio in entry['ratios'])}"
                for name, entry in source.items()
            ]
            found.append(f"S-alpha before the clamp, finest edge first: {'; '.join(texts)}.")
    return list(dict.fromkeys(found))


def _overview(found: Sequence[Setting]) -> str:
    lines = [
        f"| setting | seeds | baseline {_MAIN} | S-alpha against it | detectable |",
        "|---|---|---|---|---|",
    ]
    for setting in found:
        chosen = next((v for v in setting.variants if v.name == "S-alpha"), None)
        if chosen and setting.baseline:
            difference, detectable = _difference(setting, chosen)
            main = mean_of(setting.baseline.values(_MAIN))
            cells = [title(setting), str(main.count), _shown(main), difference, detectable]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(setting: Setting, variant: Variant) -> tuple[str, str]:
    if variant.is_baseline or setting.baseline is None:
        return "", ""
    main = mean_of(list(variant.against(setting.baseline, _MAIN).values()))
    return _shown(main, "+"), "" if math.isnan(main.detectable) else f"{main.detectable:.2f}"


def _shown(main: Mean, sign: str = "") -> str:
    if not main.count:
        return ""
    text = f"{main.mean:{sign}.2f}"
    return text if math.isnan(main.half) else f"{text} ± {main.half:.2f}"


def _axes() -> tuple[Any, Any]:
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "alphafpn"  # the same picture is the same file
    return pyplot.subplots(figsize=(6, 4), layout="constrained")


def _save(axes: Any, file: Path) -> None:
    from matplotlib import pyplot

    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(file, metadata={"Date": None})
    pyplot.close(axes.figure)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = [Path(__file__).parent / "results.jsonl"]
    parser.add_argument("results", nargs="*", type=Path, default=default)
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "experiments.md")
    systems = Path(__file__).parent / "systems.jsonl"
    parser.add_argument("--systems", nargs="*", type=Path, default=[systems])
    parser.add_argument("--systems-out", type=Path, default=PAGE)
    options = parser.parse_args()
    records = results.read(options.results)
    if not records:
        parser.error(f"no results in {', '.join(map(str, options.results))}")
    report(records, options.out)
    records = results.read(options.systems)
    compared = tables.tables34(records)
    results.fill(options.systems_out, "tables", compared)
    results.fill(options.systems_out, "sizes", tables.sizes(records))
    print("\n".join(compared))


if __name__ == "__main__":
    main()
