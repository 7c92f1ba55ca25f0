"""Tiny objects: the paper's detectors, evaluation, tiling and Scale Match (extra ``tiny``)."""
