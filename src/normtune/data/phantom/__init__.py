"""Drawn images that resemble radiology, with known answers: the built-in data, and ground truth for tests."""

from __future__ import annotations

from normtune.data.phantom.acquisition import Acquisition, render, sample_acquisition
from normtune.data.phantom.dataset import phantom_dataset
from normtune.data.phantom.questions import Question, ask_questions
from normtune.data.phantom.reports import write_report
from normtune.data.phantom.scene import PROFILES, Finding, Hospital, HospitalName, Profile, Scene, sample_scene

__all__ = [
    "PROFILES",
    "Acquisition",
    "Finding",
    "Hospital",
    "HospitalName",
    "Profile",
    "Question",
    "Scene",
    "ask_questions",
    "phantom_dataset",
    "render",
    "sample_acquisition",
    "sample_scene",
    "write_report",
]
