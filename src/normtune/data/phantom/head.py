"""Head phantoms: axial sections in CT, T1 and T2, and a sagittal MR section."""

from __future__ import annotations

import numpy as np

from normtune.data.phantom.canvas import TISSUE, Canvas, Plane2D
from normtune.data.phantom.chest import sign
from normtune.data.phantom.scene import Finding, Scene

# Centres of the lobes: y in axial images (the face is at the top), (x, y) in sagittal ones.
_LOBE_Y = {"frontal": -0.42, "parietal": -0.02, "occipital": 0.42}
_LOBE_XY = {"frontal": (-0.40, -0.32), "parietal": (0.10, -0.50), "occipital": (0.46, -0.16)}


def draw_axial(canvas: Canvas, scene: Scene) -> None:
    """Draw an axial section through the lateral ventricles."""
    tissue = TISSUE[scene.look]
    wide, long = 0.74 * canvas.jitter(0.05), 0.90 * canvas.jitter(0.04)  # radii of this head
    # From outside to inside: skin, skull, fluid, grey matter with sulci, white matter.
    canvas.paint(canvas.ellipse(0, 0, wide, long), tissue["fat"])
    canvas.paint(canvas.ellipse(0, 0, wide - 0.045, long - 0.045), tissue["cortex"])
    brain = canvas.ellipse(0, 0, wide - 0.12, long - 0.12)
    canvas.paint(brain, tissue["csf"])
    sulci = canvas.texture(17, 0.03)
    depth = 1 - (canvas.x / (wide - 0.12)) ** 2 - (canvas.y / (long - 0.12)) ** 2
    canvas.paint(
        canvas.edge((depth - 0.04) * 0.4 + sulci, 0.03) * brain, tissue["gray matter"] + canvas.texture(20, 0.02)
    )
    canvas.paint(
        canvas.edge((depth - 0.30) * 0.4 + 1.3 * sulci, 0.05), tissue["white matter"] + canvas.texture(12, 0.015)
    )
    # Thalamus on both sides, then the fissure between the hemispheres.
    for s in (-1, 1):
        canvas.paint(canvas.ellipse(s * 0.19, 0.03, 0.085, 0.15, s * -20, soft=0.04), tissue["gray matter"])
    canvas.paint(canvas.band(canvas.x, 0.02, 0.02) * brain * canvas.edge(np.abs(canvas.y) - 0.30, 0.05), tissue["csf"])
    # Front and back horn of each lateral ventricle.
    swollen = scene.finding("hydrocephalus") is not None
    width, length = (0.15, 0.30) if swollen else (0.055, 0.21)
    for s in (-1, 1):
        offset = 0.16 if swollen else 0.085
        canvas.paint(canvas.ellipse(s * offset, -0.17, width, length * 0.75, s * 14), tissue["csf"])
        canvas.paint(canvas.ellipse(s * (offset + 0.05), 0.22, width, length * 0.8, s * -22), tissue["csf"])
    for finding in scene.findings:
        if finding.kind == "skull tumor":
            cx, cy = sign(finding.side) * (wide - 0.17), canvas.offset(0.3)
            canvas.paint(canvas.ellipse(cx, cy, 0.13, 0.22), tissue["tumor rim"])
        elif finding.kind != "hydrocephalus":
            centre = (sign(finding.side) * (0.33 + canvas.offset(0.03)), _LOBE_Y[finding.zone] + canvas.offset(0.03))
            _lesion(canvas, finding, scene.look, brain, *centre)


def draw_sagittal(canvas: Canvas, scene: Scene) -> None:
    """Draw a sagittal section at the midline. The face is at the left of the image."""
    tissue = TISSUE[scene.look]
    tilt = canvas.offset(4)
    neck = canvas.edge(0.24 - np.abs(canvas.x - 0.16 - 0.12 * canvas.y), 0.02) * canvas.edge(canvas.y - 0.2, 0.05)
    canvas.paint(neck, tissue["muscle"] + canvas.texture(10, 0.04))
    # Face and nose, with an air cavity and the tongue.
    face = np.maximum(canvas.ellipse(-0.46, 0.42, 0.26, 0.42, 10), canvas.ellipse(-0.72, 0.36, 0.11, 0.09, 35))
    canvas.paint(face, tissue["fat"] * 0.8 + canvas.texture(9, 0.1))
    canvas.paint(canvas.ellipse(-0.44, 0.40, 0.12, 0.07), tissue["air"])
    canvas.paint(canvas.ellipse(-0.42, 0.62, 0.16, 0.08, -15), tissue["muscle"])
    # Skin, skull, fluid, grey and white matter.
    canvas.paint(canvas.ellipse(0.02, -0.20, 0.82, 0.68, tilt), tissue["fat"])
    canvas.paint(canvas.ellipse(0.02, -0.20, 0.775, 0.635, tilt), tissue["cortex"])
    brain = canvas.ellipse(0.02, -0.21, 0.72, 0.57, tilt)
    brain = brain * canvas.edge(0.27 + 0.10 * canvas.x - canvas.y, 0.03)
    canvas.paint(brain, tissue["csf"])
    sulci = canvas.texture(16, 0.045)
    depth = 1 - ((canvas.x - 0.02) / 0.70) ** 2 - ((canvas.y + 0.20) / 0.55) ** 2
    canvas.paint(
        canvas.edge((depth - 0.05) * 0.4 + sulci, 0.04) * brain, tissue["gray matter"] + canvas.texture(20, 0.02)
    )
    canvas.paint(canvas.edge((depth - 0.35) * 0.4 + sulci, 0.06) * brain, tissue["white matter"])
    # Corpus callosum, a bright or dark arch, with the ventricle below it.
    arch = 1 - ((canvas.x - 0.02) / 0.36) ** 2 - ((canvas.y + 0.02) / 0.24) ** 2
    upper = canvas.edge(0.02 - canvas.y, 0.03)
    canvas.paint(canvas.band(arch * 0.12, 0.06) * upper, tissue["white matter"] + (0.2 if scene.look == "t1" else -0.2))
    canvas.paint(canvas.edge((arch - 0.35) * 0.12, 0.02) * upper, tissue["csf"])
    # Thalamus, brain stem and cerebellum.
    canvas.paint(canvas.ellipse(0.02, 0.08, 0.15, 0.10), tissue["gray matter"])
    canvas.paint(canvas.ellipse(0.14, 0.36, 0.075, 0.30, -12), tissue["white matter"])
    canvas.paint(canvas.ellipse(0.08, 0.28, 0.10, 0.11), tissue["white matter"])
    cerebellum = canvas.ellipse(0.40, 0.28, 0.23, 0.18, -20)
    leaves = 0.10 * np.cos(np.arctan2(canvas.y - 0.28, canvas.x - 0.20) * 26).astype(np.float32)
    canvas.paint(cerebellum, tissue["gray matter"] + leaves)
    for finding in scene.findings:
        if finding.kind == "skull tumor":
            canvas.paint(canvas.ellipse(canvas.offset(0.2), -0.70, 0.24, 0.13), tissue["tumor rim"])
            continue
        cx, cy = _LOBE_XY[finding.zone]
        _lesion(canvas, finding, scene.look, brain, cx + canvas.offset(0.03), cy + canvas.offset(0.03))


def _lesion(canvas: Canvas, finding: Finding, look: str, brain: Plane2D, cx: float, cy: float) -> None:
    """Draw a finding of the brain, centred at (cx, cy) and cut off at the brain's outline."""
    tissue = TISSUE[look]
    if finding.kind == "hemorrhage":
        blob = canvas.ellipse(cx, cy, 0.15 * canvas.jitter(0.15), 0.12 * canvas.jitter(0.15), canvas.offset(60), 0.03)
        halo = canvas.ellipse(cx, cy, 0.19, 0.16, soft=0.06)
        canvas.paint(halo * brain * 0.7, tissue["edema"])
        canvas.paint(blob * brain, tissue["hemorrhage"])
    elif finding.kind == "edema":
        ragged = canvas.ellipse(cx, cy, 0.24, 0.21, canvas.offset(60), soft=0.12)
        canvas.paint(np.clip(ragged * (0.9 + canvas.texture(12, 0.2)), 0, 1) * brain, tissue["edema"])
    elif finding.kind == "brain cyst":
        canvas.paint(
            canvas.ellipse(cx, cy, 0.20 * canvas.jitter(0.1), 0.17 * canvas.jitter(0.1)) * brain, tissue["csf"]
        )
    elif finding.kind == "tumor":
        radius = 0.165 * canvas.jitter(0.1)
        canvas.paint(canvas.ellipse(cx, cy, radius + 0.05, radius + 0.04, soft=0.08) * brain * 0.8, tissue["edema"])
        canvas.paint(canvas.ellipse(cx, cy, radius, radius * canvas.jitter(0.1)) * brain, tissue["tumor rim"])
        canvas.paint(canvas.ellipse(cx, cy, radius * 0.6, radius * 0.56) * brain, tissue["tumor core"])
    else:
        assert finding.kind == "infarct", finding.kind
        # A wedge with sharp sides that widens towards the skull.
        out, along = sign(finding.side) * canvas.x, canvas.y - np.float32(cy)
        opening = np.float32(0.62) * (out - np.float32(0.14)) - np.abs(along)
        canvas.paint(canvas.edge(opening, 0.02) * canvas.edge(out - 0.17, 0.02) * brain, tissue["infarct"])
