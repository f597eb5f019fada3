"""Abdomen phantoms: axial and coronal sections in CT, T1 and T2."""

from __future__ import annotations

import numpy as np

from normtune.data.phantom.canvas import TISSUE, Canvas, Plane2D
from normtune.data.phantom.chest import sign
from normtune.data.phantom.scene import Finding, Scene


def draw_axial(canvas: Canvas, scene: Scene) -> None:
    """Draw an axial section. The liver is at the left of the image, spleen and stomach are at the right."""
    tissue = TISSUE[scene.look]
    wide, deep = canvas.jitter(0.05), canvas.jitter(0.06)  # size of this body
    # Body from outside to inside: fat under the skin, muscle, the cavity.
    canvas.paint(canvas.ellipse(0, 0, 0.94 * wide, 0.74 * deep), tissue["fat"] + canvas.texture(12, 0.02))
    canvas.paint(canvas.ellipse(0, 0, 0.84 * wide, 0.64 * deep), tissue["muscle"])
    cavity = canvas.ellipse(0, -0.01, 0.79 * wide, 0.59 * deep)
    canvas.paint(cavity, tissue["fat"] + canvas.texture(14, 0.03))
    if scene.finding("ascites"):
        canvas.paint(cavity, tissue["fluid"])
        canvas.paint(canvas.ellipse(0.08, 0.04, 0.56, 0.40, soft=0.1), tissue["fat"])
    for cx, cy in ((0.02, -0.34), (0.22, -0.06), (0.30, 0.10)):  # bowel
        loop = canvas.ellipse(cx + canvas.offset(0.04), cy + canvas.offset(0.04), 0.10, 0.08)
        canvas.paint(loop, tissue["soft"] + canvas.texture(16, 0.05))
    _spine(canvas, scene.look)
    # Aorta and vena cava.
    canvas.paint(canvas.ellipse(0.06, 0.17, 0.07, 0.07), tissue["vessel"])
    canvas.paint(canvas.ellipse(-0.12, 0.15, 0.065, 0.055), tissue["vessel"])
    kidneys = {"right": (-0.38, 0.34), "left": (0.38, 0.33)}
    for side, (cx, cy) in kidneys.items():
        if side != scene.missing_kidney:
            tilt = sign(side) * 30
            canvas.paint(canvas.ellipse(cx, cy, 0.17, 0.125, tilt), tissue["kidney"])
            canvas.paint(canvas.ellipse(cx - sign(side) * 0.06, cy - 0.01, 0.075, 0.045, tilt), tissue["fat"])
    # The stomach, with air at the top, as in a patient in supine position.
    stomach = canvas.ellipse(0.34, -0.27, 0.27, 0.17, -20)
    canvas.paint(stomach, tissue["stomach"])
    canvas.paint(stomach * canvas.edge(-0.30 - canvas.y, 0.02), tissue["air"])
    swollen = scene.finding("splenomegaly") is not None
    spleen = canvas.ellipse(0.62, 0.10, 0.17 if swollen else 0.10, 0.42 if swollen else 0.17, 12) * cavity
    canvas.paint(spleen, tissue["spleen"] + canvas.texture(20, 0.015))
    # The liver: two lobes, then its vessels.
    liver = canvas.ellipse(-0.44, -0.10, 0.34 * canvas.jitter(0.05), 0.36 * canvas.jitter(0.05), -12)
    liver = np.maximum(liver, canvas.ellipse(-0.12, -0.28, 0.30, 0.17, 8)) * cavity
    canvas.paint(liver, tissue["liver"] + canvas.texture(20, 0.02))
    for _ in range(4):
        cx, cy = -0.40 + canvas.offset(0.18), -0.12 + canvas.offset(0.2)
        canvas.paint(canvas.ellipse(cx, cy, 0.05, 0.018, canvas.offset(90)) * 0.6, tissue["vessel"])
    for finding in scene.findings:
        _lesion(canvas, finding, scene.look, (-0.46, -0.10), kidneys)


def draw_coronal(canvas: Canvas, scene: Scene) -> None:
    """Draw a coronal section: lung bases, below them liver and spleen, and the kidneys next to the spine."""
    tissue = TISSUE[scene.look]
    ax = np.abs(canvas.x)  # distance from the midline
    wide = canvas.jitter(0.05)  # width of this body
    body = canvas.edge(0.84 * wide + 0.05 * np.cos(canvas.y * 3 + 2.6) - ax, 0.02)
    body = body * canvas.edge(0.95 - np.abs(canvas.y), 0.02)
    canvas.paint(body, tissue["fat"] + canvas.texture(12, 0.02))
    canvas.paint(canvas.edge(0.76 * wide - ax, 0.02) * body, tissue["muscle"])
    cavity = canvas.edge(0.70 * wide - ax, 0.02) * body
    canvas.paint(cavity, tissue["fat"] + canvas.texture(14, 0.03))
    if scene.finding("ascites"):
        canvas.paint(cavity * canvas.edge(canvas.y + 0.5, 0.05), tissue["fluid"])
        canvas.paint(canvas.ellipse(0, 0.2, 0.46, 0.62, soft=0.08), tissue["fat"])
    for cy in (0.62, 0.80):  # bowel
        for cx in (-0.40, -0.16, 0.16, 0.40):
            loop = canvas.ellipse(cx + canvas.offset(0.05), cy + canvas.offset(0.04), 0.11, 0.08)
            canvas.paint(loop, tissue["soft"] + canvas.texture(16, 0.05))
    # Psoas muscles, then the spine with its discs.
    canvas.paint(canvas.ellipse(-0.19, 0.45, 0.09, 0.36, 8), tissue["muscle"])
    canvas.paint(canvas.ellipse(0.19, 0.45, 0.09, 0.36, -8), tissue["muscle"])
    spine = canvas.edge(0.105 - ax, 0.02) * body
    canvas.paint(spine, tissue["marrow"])
    canvas.paint(spine * canvas.edge((np.cos(canvas.y * 24) - 0.7) * 0.06, 0.02), tissue["disc"])
    # Lung above the diaphragm, the curve y = floor.
    floor = -0.42 + 0.55 * (ax - 0.38) ** 2
    canvas.paint(cavity * canvas.edge(floor - canvas.y, 0.02) * canvas.edge(ax - 0.11, 0.02), tissue["lung"])
    kidneys = {"right": (-0.36, 0.25), "left": (0.36, 0.20)}
    for side, (cx, cy) in kidneys.items():
        if side != scene.missing_kidney:
            tilt = sign(side) * -14
            canvas.paint(canvas.ellipse(cx, cy, 0.125, 0.21, tilt), tissue["kidney"])
            canvas.paint(canvas.ellipse(cx - sign(side) * 0.06, cy, 0.045, 0.09, tilt), tissue["fat"])
    swollen = scene.finding("splenomegaly") is not None
    spleen = canvas.ellipse(0.55, -0.02 if swollen else -0.16, 0.17 if swollen else 0.12, 0.36 if swollen else 0.17, -8)
    canvas.paint(spleen * cavity, tissue["spleen"] + canvas.texture(20, 0.015))
    canvas.paint(canvas.ellipse(0.27, -0.18, 0.13, 0.15), tissue["stomach"])
    liver = canvas.ellipse(-0.38, -0.16, 0.36, 0.30 * canvas.jitter(0.06), 14)
    liver = (
        np.maximum(liver, canvas.ellipse(-0.05, -0.24, 0.25, 0.14, 8)) * cavity * canvas.edge(canvas.y - floor, 0.02)
    )
    canvas.paint(liver, tissue["liver"] + canvas.texture(20, 0.02))
    for finding in scene.findings:
        _lesion(canvas, finding, scene.look, (-0.40, -0.14), kidneys)


def _spine(canvas: Canvas, look: str) -> None:
    """Draw an axial vertebra with the spinal canal."""
    tissue = TISSUE[look]
    canvas.paint(canvas.ellipse(0, 0.48, 0.22, 0.05, soft=0.03), tissue["cortex"])
    canvas.paint(canvas.ellipse(0, 0.33, 0.14, 0.115), tissue["cortex"])
    canvas.paint(canvas.ellipse(0, 0.33, 0.115, 0.09), tissue["marrow"])
    canvas.paint(canvas.ellipse(0, 0.465, 0.05, 0.04), tissue["csf"])


def _lesion(
    canvas: Canvas, finding: Finding, look: str, liver: tuple[float, float], kidneys: dict[str, tuple[float, float]]
) -> None:
    """Draw a finding of liver or kidney; `liver` and `kidneys` are the centres of the organs."""
    tissue = TISSUE[look]
    if finding.kind in ("splenomegaly", "ascites"):
        return  # drawn with the anatomy
    if finding.kind == "liver hemorrhage":  # a crescent along the outline of the liver
        outside = canvas.ellipse(liver[0] - 0.06, liver[1], 0.33, 0.36)
        canvas.paint(outside * (1 - canvas.ellipse(liver[0] + 0.08, liver[1], 0.33, 0.40)), tissue["hemorrhage"])
        return
    if finding.organ == "liver":
        cx, cy = liver[0] + canvas.offset(0.12), liver[1] + canvas.offset(0.12)
        if finding.kind == "mass":
            radius = 0.16 * canvas.jitter(0.1)
            shape: Plane2D = canvas.ellipse(cx, cy, radius, radius * canvas.jitter(0.15), soft=0.03)
            canvas.paint(shape, tissue["tumor rim"])
            core = canvas.ellipse(cx, cy, radius * 0.68, radius * 0.62, soft=0.04)
            canvas.paint(core, tissue["mass"] + canvas.texture(18, 0.07))
        else:
            radius = 0.11 * canvas.jitter(0.1)
            canvas.paint(canvas.ellipse(cx, cy, radius, radius), tissue["fluid"])
        return
    assert finding.organ == "kidney", finding
    cx, cy = kidneys[finding.side]
    if finding.kind == "cyst":
        radius = 0.105 * canvas.jitter(0.1)
        canvas.paint(canvas.ellipse(cx + sign(finding.side) * 0.10, cy + 0.05, radius, radius), tissue["fluid"])
    elif finding.kind == "kidney tumor":
        radius = 0.17 * canvas.jitter(0.1)
        x, y = cx + sign(finding.side) * 0.10, cy + 0.02
        canvas.paint(canvas.ellipse(x, y, radius, radius * canvas.jitter(0.1)), tissue["tumor rim"])
        canvas.paint(canvas.ellipse(x, y, radius * 0.62, radius * 0.58), tissue["tumor core"])
    else:
        assert finding.kind == "stone", finding
        canvas.paint(canvas.ellipse(cx - sign(finding.side) * 0.06, cy, 0.055, 0.05), tissue["stone"])
