"""Chest phantoms: a frontal radiograph, and axial and coronal CT sections."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from normtune.data.phantom.canvas import TISSUE, Canvas, Plane2D
from normtune.data.phantom.scene import Finding, Scene

# y of the centre of each lung zone in frontal and coronal images.
_ZONE_Y = {"upper": -0.42, "middle": -0.13, "lower": 0.14}


def sign(side: str) -> int:
    """-1 if the patient's side is at the left of the image, else 1."""
    return -1 if side == "right" else 1


def draw_radiograph(canvas: Canvas, scene: Scene) -> None:
    """Draw a frontal projection: dark lungs; bright heart, ribs, clavicles, spine and diaphragm."""
    ax = np.abs(canvas.x)  # distance from the midline
    wide, tall = canvas.jitter(0.06), canvas.jitter(0.06)  # size of this body
    # Trunk, shoulders and neck.
    trunk = canvas.edge(0.90 * wide - ax - 0.12 * np.maximum(-canvas.y - 0.5, 0), 0.06)
    shoulders = canvas.edge(canvas.y + 0.95 - 0.35 * ax**2, 0.05)
    canvas.paint(trunk * shoulders, 0.56 + canvas.texture(6, 0.02))
    canvas.paint(canvas.edge(0.17 - ax, 0.06) * canvas.edge(-0.6 - canvas.y, 0.2), 0.62)

    # The lungs are ellipses, cut off below by the diaphragm; `dome` is the height of its domes.
    dome = {side: 0.42 + canvas.offset(0.04) + (0.05 if side == "left" else 0.0) for side in ("left", "right")}
    lungs: dict[str, Plane2D] = {}
    for side, floor in dome.items():
        cx = sign(side) * 0.43 * wide
        diaphragm = floor + 0.9 * (canvas.x - 0.9 * cx) ** 2 - canvas.y
        lungs[side] = canvas.ellipse(cx, -0.08, 0.335 * wide, 0.68 * tall, soft=0.05) * canvas.edge(diaphragm, 0.03)
    both = np.maximum(lungs["left"], lungs["right"])
    canvas.paint(both, 0.17 + canvas.texture(18, 0.022) + canvas.texture(7, 0.018))
    # Below the diaphragm the abdomen is bright.
    canvas.paint(canvas.edge(canvas.y - 0.45, 0.3) * trunk * (1 - both) * 0.7, 0.66)
    # Vessels spread from the hila.
    for side in lungs:
        hilum = canvas.ellipse(sign(side) * 0.2, 0.0, 0.16, 0.24, soft=0.16)
        canvas.value += lungs[side] * hilum * (0.16 + canvas.texture(14, 0.06))
    _ribs(canvas, both, ax)
    # Mediastinum and spine.
    canvas.paint(canvas.ellipse(0, -0.2, 0.10, 1.3, soft=0.05) * 0.8, 0.66)
    vertebrae = canvas.edge(0.075 - ax, 0.03) * (0.5 + 0.5 * np.cos(canvas.y * 38))
    canvas.value += vertebrae * np.float32(0.06)

    large = scene.finding("cardiomegaly") is not None
    width = (0.43 if large else 0.235) * canvas.jitter(0.06)
    heart = canvas.ellipse(0.13 if large else 0.10, 0.24, width, 0.27 if large else 0.25, 18, soft=0.04)
    canvas.paint(heart * canvas.edge(0.6 - canvas.y, 0.1), 0.74)
    canvas.paint(canvas.ellipse(0.10, -0.24, 0.08, 0.09, soft=0.04) * 0.8, 0.70)  # aortic arch
    for finding in scene.findings:
        _radiograph_finding(canvas, finding, lungs, dome)
    _clavicles(canvas, scene.finding("fracture"))
    _device(canvas, scene.device)


def _ribs(canvas: Canvas, lungs: Plane2D, ax: Plane2D) -> None:
    """Draw the ribs: posterior ones slope down and outwards; anterior ones slope up and are fainter."""
    spacing = 0.155 * canvas.jitter(0.06)
    phase = canvas.offset(0.5)
    chest = np.maximum(lungs, canvas.edge(0.84 - ax, 0.08) * canvas.edge(ax - 0.6, 0.05) * 0.6)
    chest = chest * canvas.edge(canvas.y + 0.74, 0.1) * canvas.edge(0.55 - canvas.y, 0.1)
    for bend, width, strength in ((0.75 * (ax - 0.33) ** 2 - 0.05 * ax, 0.3, 0.15), (-0.35 * ax, 0.22, 0.06)):
        turns = (canvas.y - bend) / spacing + phase
        distance = np.abs(turns - np.round(turns))
        canvas.value += chest * canvas.edge((width - distance) * spacing, 0.035) * np.float32(strength)


def _clavicles(canvas: Canvas, fracture: Finding | None) -> None:
    """Draw the clavicles; the one with the fracture has a gap and a step."""
    for side in ("left", "right"):
        s = sign(side)
        along = canvas.x * s  # distance from the midline, along the bone
        height = canvas.y + 0.66 + 0.20 * (along - 0.12) - 0.10 * np.sin((along - 0.1) * 5.2)
        span = canvas.edge(along - 0.10, 0.03) * canvas.edge(0.80 - along, 0.03)
        if fracture is not None and fracture.side == side:
            break_at = 0.42 + canvas.offset(0.04)
            step = canvas.edge(along - break_at, 0.01)
            height = height + step * 0.17 - 0.03
            span = span * (1 - canvas.band(along - break_at, 0.07))
        canvas.paint(span * canvas.band(height, 0.065, 0.03) * 0.85, 0.86)


def _device(canvas: Canvas, device: str) -> None:
    """Draw a pacemaker (box and lead) or a catheter."""
    if device == "pacemaker":
        box = canvas.edge(0.11 - np.abs(canvas.x - 0.60), 0.02) * canvas.edge(0.085 - np.abs(canvas.y + 0.40), 0.02)
        canvas.paint(box, 1.0)
        lead = canvas.band(canvas.y + 0.36 - 1.5 * (0.5 - canvas.x) * np.maximum(canvas.x, 0.1) - 0.2 * canvas.x, 0.02)
        canvas.paint(lead * canvas.edge(0.52 - canvas.x, 0.02) * canvas.edge(canvas.x - 0.12, 0.02), 0.98)
        canvas.paint(canvas.band(canvas.x - 0.14, 0.025) * canvas.edge(0.16 - np.abs(canvas.y - 0.08), 0.02), 0.98)
    elif device == "catheter":
        path = canvas.x + 0.16 + 0.22 * np.minimum(canvas.y + 0.35, 0) ** 2
        canvas.paint(canvas.band(path, 0.035) * canvas.edge(0.10 - canvas.y, 0.02), 0.98)


def _radiograph_finding(canvas: Canvas, finding: Finding, lungs: dict[str, Plane2D], dome: dict[str, float]) -> None:
    """Draw a finding of a lung. The findings of heart and clavicle are drawn with the anatomy."""
    if finding.organ != "lung":
        return
    if finding.kind == "lung edema":
        _lung_edema(canvas, lungs, value=0.60)
        return
    s, lung = sign(finding.side), lungs[finding.side]
    if finding.kind == "effusion":
        # Fluid up to `level`, with a surface that rises to the side.
        level = dome[finding.side] - (0.20 if finding.size == "small" else 0.58)
        meniscus = canvas.y - level + 0.30 * (s * canvas.x - 0.35)
        canvas.paint(np.minimum(1, lung * 1.5) * canvas.edge(meniscus, 0.04), 0.70)
    elif finding.kind == "pneumothorax":
        # The lung has collapsed to a part of its size (`remaining`), with black air around it.
        shrink = 0.80 if finding.size == "small" else 0.52
        remaining = canvas.ellipse(s * 0.36 * shrink, 0.1, 0.33 * shrink, 0.66 * shrink, soft=0.02)
        canvas.paint(lung * (1 - remaining), 0.03)
        canvas.value += lung * remaining * np.float32(0.14 if finding.size == "large" else 0.07)
        rim = 4 * remaining * (1 - remaining)
        canvas.paint(lung * rim * 0.8, 0.62)
    else:
        _lung_opacities(canvas, finding, lung, value=0.72)


def _lung_opacities(canvas: Canvas, finding: Finding, lung: Plane2D, value: float) -> None:
    """Draw nodules, a mass or a patch of pneumonia in a lung of a frontal or coronal image."""
    s = sign(finding.side)
    if finding.kind == "nodule":
        zones = [finding.zone] if finding.zone else list(canvas.rng.permutation(list(_ZONE_Y)))[: finding.count]
        for zone in zones:
            radius = 0.075 * canvas.jitter(0.15)
            cx, cy = s * (0.46 + canvas.offset(0.09)), _ZONE_Y[zone] + canvas.offset(0.05)
            canvas.paint(canvas.ellipse(cx, cy, radius, radius * canvas.jitter(0.1), soft=0.03), value + 0.08)
        return
    cx, cy = s * (0.45 + canvas.offset(0.04)), _ZONE_Y[finding.zone] + canvas.offset(0.04)
    if finding.kind == "lung cyst":
        _lung_cyst(canvas, cx, cy, value + 0.1)
    elif finding.kind == "mass":
        radius = 0.18 * canvas.jitter(0.1)
        canvas.paint(canvas.ellipse(cx, cy, radius, radius * canvas.jitter(0.15), soft=0.04), value + 0.04)
    else:
        assert finding.kind == "pneumonia", finding.kind
        patch = canvas.ellipse(cx, cy, 0.26, 0.21, canvas.offset(40), soft=0.16) * lung
        canvas.paint(np.clip(patch * (0.78 + canvas.texture(16, 0.28)), 0, 1), value - 0.10)


def _lung_cyst(canvas: Canvas, cx: float, cy: float, value: float) -> None:
    """Draw a cavity: a thin bright wall around air."""
    radius = 0.18 * canvas.jitter(0.1)
    canvas.paint(canvas.ellipse(cx, cy, radius, radius * canvas.jitter(0.1)), value)
    canvas.paint(canvas.ellipse(cx, cy, radius - 0.05, radius - 0.05), 0.0)


def _lung_edema(canvas: Canvas, lungs: Mapping[str, Plane2D], value: float) -> None:
    """Draw haze that spreads from the midline over both lungs, in the shape of a butterfly."""
    for side, lung in lungs.items():
        haze = canvas.ellipse(sign(side) * 0.26, -0.05, 0.27, 0.36, soft=0.2) * lung
        canvas.paint(np.clip(haze * (0.95 + canvas.texture(14, 0.15)), 0, 1), value)


def draw_coronal(canvas: Canvas, scene: Scene) -> None:
    """Draw a coronal CT section: sharper than the radiograph, with the liver, without ribs over the lungs."""
    tissue = TISSUE["ct"]
    ax = np.abs(canvas.x)  # distance from the midline
    wide = canvas.jitter(0.05)  # width of this body
    body = canvas.edge(0.88 * wide - ax - 0.5 * np.maximum(-canvas.y - 0.62, 0), 0.02)
    body = body * canvas.edge(0.93 - np.abs(canvas.y), 0.02)
    canvas.paint(body, tissue["fat"])
    canvas.paint(body * canvas.edge(0.80 * wide - ax, 0.03), tissue["muscle"] + canvas.texture(14, 0.02))
    # Ribs, cut across: spots along both chest walls.
    ring = canvas.band(ax - 0.73 * wide, 0.06)
    canvas.paint(ring * canvas.edge(np.cos(canvas.y * 34) * 0.03, 0.02) * body * (canvas.y < 0.6), tissue["marrow"])
    dome = {"left": 0.45, "right": 0.38}
    lungs = {}
    for side, top in dome.items():
        cx = sign(side) * 0.41 * wide
        floor = top + 0.9 * (canvas.x - cx) ** 2 - canvas.y
        lungs[side] = canvas.ellipse(cx, -0.06, 0.32 * wide, 0.70, soft=0.02) * canvas.edge(floor, 0.02)
    liver = canvas.ellipse(-0.32, 0.66, 0.46, 0.34, soft=0.02) * body
    canvas.paint(liver, tissue["liver"] + canvas.texture(20, 0.015))
    canvas.paint(canvas.ellipse(0.48, 0.66, 0.2, 0.22, soft=0.02), tissue["stomach"])
    canvas.paint(canvas.ellipse(0.5, 0.58, 0.12, 0.08, soft=0.02), tissue["air"])
    both = np.maximum(lungs["left"], lungs["right"])
    canvas.paint(both, tissue["lung"] + np.maximum(canvas.texture(30, 0.07), 0))
    canvas.paint(canvas.ellipse(0.08, 0.18, 0.25 * canvas.jitter(0.08), 0.26, 15), tissue["heart"])
    canvas.paint(canvas.ellipse(0.08, -0.22, 0.08, 0.16), tissue["vessel"])
    canvas.paint(canvas.ellipse(-0.02, -0.62, 0.045, 0.28), tissue["air"])
    for finding in scene.findings:
        if finding.kind == "lung edema":
            _lung_edema(canvas, lungs, value=tissue["lung lesion"])
            continue
        lung = lungs[finding.side]
        if finding.kind == "effusion":
            level = dome[finding.side] - (0.20 if finding.size == "small" else 0.58)
            canvas.paint(lung * canvas.edge(canvas.y - level, 0.02), tissue["pleural fluid"])
        else:
            _lung_opacities(canvas, finding, lung, value=tissue["lung lesion"])


def draw_axial(canvas: Canvas, scene: Scene) -> None:
    """Draw an axial CT section at the heart. The top is the front; the patient's right is at the left."""
    tissue = TISSUE["ct"]
    wide, deep = canvas.jitter(0.05), canvas.jitter(0.05)
    body = canvas.ellipse(0, 0, 0.93 * wide, 0.70 * deep)
    canvas.paint(body, tissue["fat"])
    wall = canvas.ellipse(0, 0, 0.84 * wide, 0.61 * deep)
    canvas.paint(wall, tissue["muscle"] + canvas.texture(16, 0.02))
    # Ribs: pieces of a ring in the chest wall.
    angle = np.arctan2(canvas.y, canvas.x)
    ribs = canvas.edge(np.cos(angle * 9 + canvas.offset(3.0)) * 0.05, 0.05)
    inner = canvas.ellipse(0, 0, 0.76 * wide, 0.545 * deep)
    canvas.paint(wall * (1 - inner) * ribs, tissue["cortex"])
    lungs: dict[str, Plane2D] = {
        side: canvas.ellipse(sign(side) * 0.42 * wide, -0.02, 0.32 * wide, 0.47 * deep, sign(side) * -6)
        for side in ("left", "right")
    }
    both = np.maximum(lungs["left"], lungs["right"])
    canvas.paint(both, tissue["lung"] + np.maximum(canvas.texture(26, 0.12), 0))
    # Mediastinum, heart, the great vessels in front and the aorta behind.
    canvas.paint(canvas.ellipse(0, -0.05, 0.16, 0.42), tissue["fat"] + 0.1)
    canvas.paint(canvas.ellipse(0.10, -0.16, 0.25 * canvas.jitter(0.1), 0.24, 30), tissue["heart"])
    canvas.paint(canvas.ellipse(0.02, -0.14, 0.09, 0.13, 30, soft=0.05), tissue["vessel"])
    canvas.paint(canvas.ellipse(0.13, 0.24, 0.075, 0.075), tissue["vessel"])
    _spine(canvas, 0.36)
    for finding in scene.findings:
        if finding.kind == "lung edema":
            _lung_edema(canvas, lungs, value=0.5)
            continue
        s, lung = sign(finding.side), lungs[finding.side]
        if finding.kind == "lung cyst":
            _lung_cyst(canvas, s * 0.46, canvas.offset(0.2), 0.75)
        elif finding.kind == "effusion":
            level = 0.24 if finding.size == "small" else 0.0
            canvas.paint(
                lung * canvas.edge(canvas.y - level + 0.2 * (s * canvas.x - 0.4), 0.02), tissue["pleural fluid"]
            )
        elif finding.kind == "pneumothorax":
            depth = 0.14 if finding.size == "small" else 0.36
            remaining = canvas.edge(canvas.y + 0.47 - depth - 0.8 * (canvas.x - s * 0.42) ** 2, 0.02)
            canvas.paint(lung * (1 - remaining), 0.0)
            canvas.value += lung * remaining * np.float32(0.16)
            canvas.paint(lung * 4 * remaining * (1 - remaining), 0.6)
        elif finding.kind == "nodule":
            for depth in canvas.rng.permutation([-0.25, -0.01, 0.22])[: finding.count]:
                centre = s * (0.46 + canvas.offset(0.07)), float(depth) + canvas.offset(0.03)
                canvas.paint(canvas.ellipse(*centre, 0.075, 0.075), 0.78)
        elif finding.kind == "mass":
            radius = 0.17 * canvas.jitter(0.1)
            canvas.paint(canvas.ellipse(s * 0.46, canvas.offset(0.2), radius, radius * canvas.jitter(0.1)), 0.62)
        else:
            patch = canvas.ellipse(s * 0.46, canvas.offset(0.2), 0.25, 0.22, canvas.offset(40), soft=0.14) * lung
            canvas.paint(np.clip(patch * (0.7 + canvas.texture(18, 0.3)), 0, 1), 0.55)


def _spine(canvas: Canvas, cy: float) -> None:
    """Draw an axial vertebra with the spinal canal; `cy` is the y of its centre."""
    tissue = TISSUE["ct"]
    canvas.paint(canvas.ellipse(0, cy + 0.13, 0.20, 0.05, soft=0.03), tissue["cortex"])
    canvas.paint(canvas.ellipse(0, cy, 0.12, 0.10), tissue["cortex"])
    canvas.paint(canvas.ellipse(0, cy, 0.085, 0.07), tissue["marrow"] - 0.1)
    canvas.paint(canvas.ellipse(0, cy + 0.125, 0.045, 0.035), tissue["soft"])
