"""Boxes and anchors -> fusion factors. Nothing here knows a pyramid or changes a model."""
