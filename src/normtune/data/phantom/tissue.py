"""Grey values of tissues, 0 (black) to 1 (white). Their order is that of textbooks; they are not measured."""

from __future__ import annotations

_LOOKS = ("ct", "t1", "t2")
# Tissue -> its grey value in CT, T1 and T2.
_VALUES: dict[str, tuple[float, float, float]] = {
    "air": (0.0, 0.02, 0.02),
    "lung": (0.10, 0.05, 0.05),
    "fat": (0.22, 0.90, 0.66),
    "muscle": (0.47, 0.42, 0.22),
    "soft": (0.42, 0.38, 0.34),
    "liver": (0.60, 0.58, 0.34),
    "spleen": (0.55, 0.40, 0.56),
    "kidney": (0.72, 0.48, 0.86),
    "stomach": (0.40, 0.30, 0.55),
    "heart": (0.62, 0.40, 0.30),
    "vessel": (0.76, 0.14, 0.08),
    "cortex": (1.0, 0.06, 0.06),
    "marrow": (0.86, 0.70, 0.48),
    "disc": (0.50, 0.35, 0.30),
    "fluid": (0.30, 0.12, 0.98),
    "pleural fluid": (0.40, 0.12, 0.98),
    "csf": (0.14, 0.10, 0.98),
    "gray matter": (0.50, 0.40, 0.58),
    "white matter": (0.42, 0.58, 0.40),
    "hemorrhage": (0.92, 0.95, 0.12),
    "edema": (0.24, 0.26, 0.84),
    "infarct": (0.26, 0.28, 0.80),
    "tumor rim": (0.74, 0.88, 0.80),
    "tumor core": (0.34, 0.24, 0.62),
    "mass": (0.36, 0.30, 0.70),
    "lung lesion": (0.58, 0.5, 0.5),
    "stone": (1.0, 0.05, 0.05),
}
# Look -> tissue -> grey value.
TISSUE: dict[str, dict[str, float]] = {
    look: {name: values[i] for name, values in _VALUES.items()} for i, look in enumerate(_LOOKS)
}
