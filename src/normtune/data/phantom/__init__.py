"""Drawn radiology-like images with known answers: the embedded default data and the tests' ground truth."""

from __future__ import annotations

from normtune.phantom.acquisition import Acquisition, acquisition, render
from normtune.phantom.dataset import dataset
from normtune.phantom.questions import Question, questions
from normtune.phantom.reports import report
from normtune.phantom.scene import Finding, Hospital, Scene, sample_scene

__all__ = [
    "Acquisition",
    "Finding",
    "Hospital",
    "Question",
    "Scene",
    "acquisition",
    "dataset",
    "questions",
    "render",
    "report",
    "sample_scene",
]
