"""The command that checks the installation: versions, devices, optional packages, and a run of nano."""

from __future__ import annotations

import os
import time
from typing import Any

import typer

from normtune.commands.app import Device, Json, app, emit
from normtune.runtime.environment import package_version, versions
from normtune.runtime.transformers_import import import_transformers

# extra of pyproject.toml -> (its packages, what it enables)
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "serve": (("fastapi", "uvicorn", "python-multipart", "prometheus-client"), "normtune serve"),
    "notebook": (("pandas",), "results as data frames: .to_pandas()"),
    "quantize": (("torchao", "bitsandbytes"), "a base in 8 or 4 bits: --quantize"),
    "dicom": (("pylibjpeg-libjpeg",), "DICOM files with lossless JPEG"),
    "xlsx": (("openpyxl",), "data in .xlsx workbooks"),
    "volumes": (("nibabel",), "NIfTI volumes"),
    "clinical": (("radgraph",), "RadGraph F1 of reports: --radgraph"),
    "sentencepiece": (("sentencepiece", "protobuf"), "models without tokenizer.json: tokenizer.model"),
    "liger": (("liger-kernel",), "a fused loss kernel on CUDA"),
    "privacy": (("opacus",), "differential privacy: --dp-epsilon"),
    "federate": (("nvflare",), "federations over a network: normtune federate --kit"),
    "secure": (("tenseal",), "encrypted updates: normtune federate --secure"),
    "ray": (("ray",), "studies on a Ray cluster: --on ray"),
    "slurm": (("submitit",), "studies on a Slurm cluster: --on slurm"),
}
_TRAINED_OF_NANO = 7936  # gains and biases of its LayerNorms


@app.command()
def doctor(device: Device = None, json: Json = False) -> None:
    """Check the installation.

    Lists versions, devices and optional packages, then trains nano for one step and asks it a question. Exits
    with status 1 if that fails.
    """
    report: dict[str, Any] = {"versions": versions(), "extras": _extras()}
    try:
        import_transformers()
        report["devices"] = _devices()
        report["self_test"] = _self_test(device)
    except Exception as error:  # whatever is wrong with the installation belongs into the report
        report["self_test"] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    emit(json, report, doctor_text(report))
    if not report["self_test"]["passed"]:
        raise typer.Exit(1)


def _extras() -> dict[str, dict[str, Any]]:
    """For each extra: what it enables, the versions of its packages, and whether all are installed."""
    extras = {}
    for name, (packages, enables) in EXTRAS.items():
        installed = {package: package_version(package) for package in packages}
        extras[name] = {
            "enables": enables,
            "packages": installed,
            "installed": "not installed" not in installed.values(),
        }
    return extras


def _devices() -> list[dict[str, Any]]:
    """The CPU and every GPU: name, free and total bytes, and whether bf16 is fast."""
    import torch

    from normtune.runtime.environment import hardware
    from normtune.runtime.memory import available_bytes

    machine = hardware()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    devices = [
        {
            "device": "cpu",
            "name": machine["processor"],
            "cores": machine["cores"],
            "threads": machine["threads"],
            "free_bytes": available_bytes(torch.device("cpu")),
            "total_bytes": total,
            "bf16_slowdown": _bf16_slowdown(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, bf16 = torch.cuda.get_device_name(index), torch.cuda.is_bf16_supported(including_emulation=False)
        memory = {"free_bytes": free, "total_bytes": total}
        devices.append({"device": f"cuda:{index}", "name": name, **memory, "bf16": bf16})
    if torch.backends.mps.is_available():
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        devices.append({"device": "mps", "name": "Apple GPU, not tested with Normtune", "free_bytes": free})
    return devices


def _bf16_slowdown() -> float:
    """Time of a bf16 matrix product on the CPU divided by that in fp32; above 1, fp32 is faster."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        matrix @ matrix  # the first product of a dtype sets up its kernel
        times = []
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return round(seconds[torch.bfloat16] / seconds[torch.float32], 2)


def _self_test(device: str | None) -> dict[str, Any]:
    """Load nano, adapt it, train one step on phantoms, and answer a question about each of their images."""
    import torch

    from normtune.data.groups import group_by_image
    from normtune.data.registry import open_dataset
    from normtune.inference.predict import answer_all
    from normtune.methods.adapt import adapt
    from normtune.models.image_cache import ImageCache
    from normtune.models.loading import load
    from normtune.training.collator import Collator

    start = time.perf_counter()
    data = open_dataset("phantom-b:2")
    family = load("nano", device=device)
    tuned = adapt(family.model, "ln")
    _expect("trained parameters", tuned.trainable, _TRAINED_OF_NANO)
    batch = Collator(family, ImageCache(family, data))(group_by_image(data.train))
    batch = {name: value.to(family.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    optimizer = torch.optim.AdamW(tuned.trained.values(), lr=1e-3)
    losses = []
    for _ in range(2):  # the second loss shows that the first step learned
        total, tokens = family.loss(batch)
        losses.append(total.item() / tokens.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    _expect("lower loss after one step", losses[1] < losses[0], True)
    first_questions = [group[0] for group in group_by_image(data.train)]
    answers = [answer.text for answer in answer_all(family, data, first_questions)]
    _expect("answers", len([text for text in answers if text]), len(first_questions))
    return {
        "passed": True,
        "device": str(family.device),
        "seconds": round(time.perf_counter() - start, 1),
        "losses": losses,
        "answers": answers,
    }


def _expect(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise RuntimeError(f"{what}: {actual} instead of {expected}")


def doctor_text(report: dict[str, Any]) -> str:
    """The report as text: one line for each version, device and extra, and the result of the self-test."""
    lines = ["  ".join(f"{name} {version}" for name, version in report["versions"].items()), ""]
    for device in report.get("devices", []):
        lines.append(f"{device['device']}: {device['name']}{_device_details(device)}")
    lines += ["", "optional packages:"]
    for name, extra in report["extras"].items():
        state = "installed" if extra["installed"] else f"pip install 'normtune[{name}]'"
        lines.append(f"  {name:<14}{extra['enables']:<54}{state}")
    test = report["self_test"]
    if test["passed"]:
        first, second = test["losses"]
        result = (
            f"self-test passed in {test['seconds']} s on {test['device']}: nano adapted, one training step "
            f"(loss {first:.3f} -> {second:.3f}), {len(test['answers'])} answers"
        )
    else:
        result = (
            f"self-test FAILED: {test['error']}\nInstall the versions that Normtune is tested with "
            "(pip install -c constraints.txt -e . in its repository). If it still fails, report the output of "
            "normtune doctor --json."
        )
    return "\n".join([*lines, "", result])


def _device_details(device: dict[str, Any]) -> str:
    details = []
    if "cores" in device:
        details.append(f"{device['cores']} cores, {device['threads']} threads")
    if device["free_bytes"] is not None:
        total = f" of {device['total_bytes'] / 2**30:.1f}" if device.get("total_bytes") else ""
        details.append(f"{device['free_bytes'] / 2**30:.1f}{total} GiB free")
    if device.get("bf16_slowdown", 0) > 1:
        details.append(f"bf16 is {device['bf16_slowdown']:.1f} times slower than fp32: use --dtype float32")
    elif device.get("bf16", True):
        details.append("bf16 is supported")
    return "".join(f"; {detail}" for detail in details)
