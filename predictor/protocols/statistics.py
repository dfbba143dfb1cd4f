"""Triton's statistics extension: what each model has done since it appeared here.

Owns the view; the numbers are `predictor.statistics`.
"""

from __future__ import annotations

from predictor.dispatch import Served
from predictor.front import VERSION, Front
from predictor.protocols import metadata
from predictor.protocols.metadata import View


def statistics(front: Front, name: str = "", version: str = "") -> View:
    """`model_stats` of one model, or without a name of all; NotFound."""
    names = [name] if name else front.dispatcher.names
    return {"model_stats": [_model(one, metadata.find(front, one, version)) for one in names]}


def _model(name: str, served: Served) -> View:
    return {"name": name, "version": VERSION, **served.metrics.statistics.to_dict()}
