"""Drawn radiology-like images with known answers: the embedded default data and the tests' ground truth."""

from __future__ import annotations

from normtune.data.phantom.acquisition import Acquisition, acquisition, render
from normtune.data.phantom.dataset import dataset
from normtune.data.phantom.questions import Question, questions
from normtune.data.phantom.reports import report
from normtune.data.phantom.scene import Finding, Hospital, Scene, sample_scene

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
