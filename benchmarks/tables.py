"""Writes docs/experiment-tables.md and the experiments' pictures: `python -m benchmarks.tables`.

Everything comes from the records in `benchmarks/results`; no training runs.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.adapting import report as adapting
from benchmarks.earlier import factors, fine_tuning, systems, tinyperson
from benchmarks.markdown import fill, fold, table, write
from benchmarks.records import FOLDER, kept

ROOT = Path(__file__).resolve().parents[1]

PAGE = """\
---
hide: [toc]
---

# Experiment tables

These are the tables behind [Experiments](experiments.md). `python -m benchmarks.tables` makes this
page from the records in `benchmarks/results`, one line per run. The code that did these runs is at
commit `94e086b` of the repository.

All differences are paired: the runs of one seed share first weights, images and order. Intervals
are 95 % t-intervals over seeds. *Detectable* is the smallest true difference that as many seeds
with this spread would find in four of five experiments. AP and MR (miss rate, less is better) are
those of `evaluate_tiny`, in percent.

<!-- adapting: begin -->
<!-- adapting: end -->

## Fixed factors

Small RetinaNets (32 channels) on four kinds of data. *Drawn* scenes hold figures of
several sizes, in the ratios of objects that their names give. *Near* figures can be recognised by
themselves; *far* ones only by a landmark 64 px or more away. *Blood cells* (BCCD) are divided by
the number in the name. *People* are crops of TinyPerson. A *regime* is what the backbone starts
from, the optimizer, its highest rate and the steps. *First function* and *rates* are the two
parts of [what a factor is](how-it-works.md#what-a-factor-is). The *forward share* of an edge is the
RMS of the map from above over the RMS of the sum; its *drift* is how it changes while factors of 1
are trained.

{factors}

## TinyPerson, whole images

{tinyperson}

## Fine-tuning

A small detector is trained with factors of 1 on drawn scenes (500 steps), then fine-tuned on other
scenes (200 steps), with four seeds: it stays at 1, jumps to S-alpha (0.419, 0.423, 0.2), ramps to
it within 100 steps, or has its weights rescaled so that patching keeps its outputs. Figures are
AP50_tiny.

{fine_tuning}

## The paper's detectors

Drawn scenes of 96 px, ten-layer backbones trained from scratch for 250 steps, two seeds: these runs
show that every detector works with any factor. **They rank neither detectors nor factors.** The
authors' figures are for TinyPerson, with ResNet-50 and 12 epochs. *Scale Match*: weights
pre-trained by us on other scenes, enlarged twice. Figures are AP50_tiny.

{detectors}

### Object size and number of images

Adaptive RetinaNet on scenes of 128 px, at three sizes. A *range*: the best minus the worst factor.

{sizes}

## Factors that counting gives

{counted}
"""

_TINYPERSON = """\
The published factors of TinyPerson, counted again from its boxes: images cut into 640x512 tiles
(overlap 50 px; boxes kept if 0.49 of their area is inside and both sides exceed 1 px), the anchors
of the paper's code. Some image sizes are guessed and most flags of regions to ignore are missing,
so the last digit is not expected to agree. `python -m benchmarks.paper.published` counts.
"""
_CITYPERSONS = """\
CityPersons' boxes by level. Tiny CityPersons is CityPersons divided by four: with anchors divided
as well (second and fourth row) the shares nearly stay, and what is left comes from the grid, which
is four times as coarse for the small images. With the same anchors they move by two levels.
"""


def page() -> str:
    """The page in Markdown."""
    counted = {
        "TinyPerson: the published factors": (_TINYPERSON, "tinyperson"),
        "CityPersons and Tiny CityPersons": (_CITYPERSONS, "citypersons"),
    }
    return PAGE.format(
        factors=factors.section(kept("factors")),
        tinyperson=tinyperson.section(kept("tinyperson")),
        fine_tuning=fine_tuning.section(kept("fine-tuning")),
        detectors=systems.detectors(kept("systems")),
        sizes=systems.sizes(kept("systems")),
        counted="\n\n".join(
            fold(title, text, _from_file(name)) for title, (text, name) in counted.items()
        ),
    )


def _from_file(name: str) -> str:
    text = (FOLDER / f"factors-{name}.tsv").read_text()
    header, *rows = [line.split("\t") for line in text.splitlines()]
    return table(header, rows)


def main(root: Path = ROOT) -> None:
    """Writes all pages and pictures below a folder that holds `README.md` and `docs`."""
    docs, newer = root / "docs", kept("adapting")
    factors.draw(kept("factors"), docs / "images")
    write(docs / "experiment-tables.md", page())
    adapting.write(newer, docs)
    fill(root / "README.md", "adapting", [adapting.in_short(newer)])


if __name__ == "__main__":
    main()
