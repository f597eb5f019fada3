"""Metrics of reports that need a model: their names, and how the metrics of RadEval run in a separate process.

A metric and its models are named as NAME=DIR, or NAME=DIR:PYTHON if RadEval is installed in another environment than
Normtune. DIR is the folder of the model, or a folder to which `hf download --cache-dir DIR` has saved the models.
Nothing is downloaded, and no text is written to a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normtune.errors import InputError, did_you_mean
from normtune.metrics import metric_worker
from normtune.metrics.sum_metrics import SumMetric, mean_metric

Texts = Mapping[str, tuple[str, str]]  # row id -> (prediction, reference)
_SCORERS = "StanfordAIMI/RRG_scorers"
# Metric of RadEval -> the models that it loads. RadGraph also loads the encoder that its archive names.
RADEVAL_MODELS: dict[str, tuple[str, ...]] = {
    "radgraph": (_SCORERS,),
    "ratescore": ("Angelakeke/RaTE-NER-Deberta", "FremyCompany/BioLORD-2023-C"),
    "radcliq": (_SCORERS, "distilroberta-base", "bert-base-uncased"),
    "green": ("StanfordAIMI/GREEN-radllama2-7b",),
    "crimson": ("rajpurkarlab/medgemma-4b-it-crimson",),
}
# Metric that Normtune computes itself -> the files that it needs.
_FILES = {"bertscore": ("config.json",), "chexbert": ("chexbert.pth", "vocab.txt")}
METRIC_MODELS = (*_FILES, *RADEVAL_MODELS)
_RADGRAPH = {"radgraph": "radgraph-xl.tar.gz", "radcliq": "radgraph.tar.gz"}  # the archive that a metric loads
# Name of a metric in RadEval -> in Normtune, if they differ
_NAMES = {f"radgraph_{level}": f"radgraph_f1_{level}" for level in ("simple", "partial", "complete")}
# Folders in which RadEval looks for models: the cache of the hub, and the folders of two metrics.
_CACHES = ("hub", "radgraph/0.1.18", "chexbert")
_SETTINGS = re.compile(r"HF_|HUGGINGFACE_|TRANSFORMERS_")  # variables of the hub and of transformers in the environment
_TIMEOUT, _TIMEOUT_ROW = 3600, 600  # seconds for loading, and for each pair: many times what a CPU needs


@dataclass(frozen=True)
class MetricModel:
    """One metric, the folder of its models, and the Python that runs it (None: this one)."""

    metric: str
    directory: Path
    python: str | None = None


def parse_metric_models(text: str | None, **directories: Path | None) -> dict[str, MetricModel]:
    """Parse "NAME=DIR,NAME=DIR:PYTHON" as name -> metric and models, and check that all that they need is there.

    Args:
        text: the metrics and their models; None: none.
        directories: the models of further metrics, from options of their own such as `--bertscore`.

    Raises:
        InputError: the text is not of that form, a metric is named twice, a folder has not the models of its metric,
            or its Python has not the package.
    """
    models = {name: MetricModel(name, folder) for name, folder in directories.items() if folder is not None}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, _, place = part.partition("=")
        if name not in METRIC_MODELS or not place:
            hint = did_you_mean(name, METRIC_MODELS) or "."
            raise _error(part, f"not NAME=DIR or NAME=DIR:PYTHON{hint} Known names: {', '.join(METRIC_MODELS)}")
        directory, _, python = (place, "", "") if Path(place).is_dir() else place.rpartition(":")
        if name in models:
            raise _error(name, "is named twice. Name each metric once")
        models[name] = MetricModel(name, Path(directory or python).absolute(), python if directory else None)
        _check(models[name])
    return models


def model_folder(models: Mapping[str, MetricModel], metric: str) -> Path | None:
    """Return the folder of a metric's model; None if the metric is not among `models`."""
    return models[metric].directory if metric in models else None


def _error(metric: str, problem: str) -> InputError:
    return InputError(f"--metric-model {metric}: {problem}.")


def _check(model: MetricModel) -> None:
    if not model.directory.is_dir():
        raise _error(model.metric, f"{model.directory} is no folder. Give the local folder of its models")
    for name in _FILES.get(model.metric, ()):
        if not (model.directory / name).is_file():
            raise _error(model.metric, f"{model.directory} has no {name}. Give the local folder of its model")
    if model.metric in _FILES:
        if model.python:
            raise _error(model.metric, "Normtune computes it itself. Remove the Python after the folder")
        return
    snapshots = find_models(model)
    _require(model, snapshots, *RADEVAL_MODELS[model.metric])
    if model.metric in _RADGRAPH:
        _require(model, snapshots, _radgraph_encoder(model, snapshots[_SCORERS] / _RADGRAPH[model.metric]))
    python = _python(model)
    try:
        _run(model, [], "", Path(tempfile.gettempdir()), 120)
    except InputError as error:
        raise _error(
            model.metric,
            f"{python} has no package {metric_worker.PACKAGE}. Run: {python} -m pip install {metric_worker.PACKAGE}, "
            f"or name another Python that has it: {model.metric}={model.directory}:PYTHON",
        ) from error


def _require(model: MetricModel, snapshots: Mapping[str, Path], *repositories: str) -> None:
    if missing := [repository for repository in repositories if repository not in snapshots]:
        raise _error(
            model.metric,
            f"{model.directory} has no {missing[0]}. With a network connection, run: "
            f"hf download --cache-dir {model.directory} {missing[0]}",
        )


def _radgraph_encoder(model: MetricModel, archive: Path) -> str:
    """Read which encoder RadGraph needs from its archive."""
    try:
        with tarfile.open(archive) as files:
            config = next(files.extractfile(member) for member in files if Path(member.name).name == "config.json")
            assert config is not None, "a file of the archive"
            return str(json.load(config)["model"]["embedder"]["token_embedders"]["bert"]["model_name"])
    except (OSError, tarfile.TarError, StopIteration, KeyError, ValueError) as error:
        raise _error(model.metric, f"{archive} is missing or damaged. Download {_SCORERS} again") from error


def _python(model: MetricModel) -> str:
    """Find the Python of the metric: a path, or the name of a program."""
    if model.python is None:
        return sys.executable
    python = shutil.which(os.path.abspath(model.python)) or shutil.which(model.python)
    if python is None:
        raise _error(model.metric, f"there is no program {model.python}. Give the path of a Python")
    return python


def find_models(model: MetricModel) -> dict[str, Path]:
    """Find the models in the folder: repository -> its files."""
    snapshots = {}
    for cache in (model.directory, model.directory / "hub"):
        for folder in sorted(cache.glob("models--*")):
            main = folder / "refs/main"
            commits = [main.read_text().strip()] if main.is_file() else sorted(os.listdir(folder / "snapshots"))
            if commits and (files := folder / "snapshots" / commits[-1]).is_dir():
                snapshots[folder.name.removeprefix("models--").replace("--", "/")] = files
    if (model.directory / "config.json").is_file() and len(RADEVAL_MODELS[model.metric]) == 1:
        snapshots[RADEVAL_MODELS[model.metric][0]] = model.directory
    return snapshots


def _describe(files: Path) -> dict[str, Any]:
    """Identify a model by the contents of its JSON files and the sizes of all files; its licence by its README."""
    digest, size = hashlib.sha256(), 0
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        bytes = path.stat().st_size
        size += bytes
        digest.update(f"{path.relative_to(files)} {bytes}\n".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    readme = files / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    licence = re.search(r"^license: *(.+)$", text, re.MULTILINE)
    return {"sha256": digest.hexdigest(), "bytes": size, "licence": licence[1] if licence else None}


def score_with_models(texts: Texts, models: Mapping[str, MetricModel]) -> tuple[dict[str, SumMetric], dict[str, Any]]:
    """Compute the metrics of RadEval, each in a process of its own.

    Args:
        texts: row id -> (prediction, reference), unchanged texts.
        models: from `parse_metric_models`; those that Normtune computes itself are left out.

    Returns:
        The metrics, means over the rows that have a score. For each of `models`: `package`, `version`, `models`
        (`sha256` of the JSON files and the sizes of all files, `bytes`, `licence`), `seconds` and `unscored`, the
        number of rows without a score, such as unreadable judgements.

    Raises:
        InputError: a metric fails, or has no score for any row.
    """
    metrics: dict[str, SumMetric] = {}
    records = {}
    for model in models.values():
        if model.metric not in RADEVAL_MODELS:
            continue
        started, lines = time.perf_counter(), ""
        for prediction, reference in texts.values():
            lines += json.dumps({"reference": reference, "prediction": prediction}) + "\n"
        snapshots = find_models(model)
        with tempfile.TemporaryDirectory(prefix="normtune-metric-") as directory:
            cache = Path(directory)
            for repository, files in snapshots.items():
                _link_model(repository, files, cache)
            (version,) = _run(model, [], "", cache, 120).values()
            scores = _run(model, [model.metric], lines, cache, _TIMEOUT + _TIMEOUT_ROW * len(texts))["scores"]
        unscored = 0
        for name, rows in scores.items():
            if len(rows) != len(texts):
                raise _error(model.metric, f"{len(rows)} scores for {len(texts)} rows. Remove rows with almost no text")
            valid = {id: score for id, score in zip(texts, rows, strict=True) if score is not None}
            if not valid:
                raise _error(model.metric, "it has no score for any row. Check that the folder has its own model")
            unscored = max(unscored, len(texts) - len(valid))
            metrics[_NAMES.get(name, name)] = mean_metric(valid)
        records[model.metric] = {
            "package": metric_worker.PACKAGE,
            "version": version,
            "models": {repository: _describe(files) for repository, files in snapshots.items()},
            "seconds": time.perf_counter() - started,
            "unscored": unscored,
        }
    return metrics, records


def metric_models_text(result: Mapping[str, Any]) -> list[str]:
    """Name the package and the licences of the models, and say how many rows have no score; a line for each metric."""
    lines = []
    for metric, record in result.get("metric_models", {}).items():
        licences = (f"{name} ({model['licence'] or 'licence not stated'})" for name, model in record["models"].items())
        missing = f"; {record['unscored']} rows have no score" if record["unscored"] else ""
        lines.append(f"{metric}: {record['package']} {record['version']}, {', '.join(licences)}{missing}")
    return lines


def _link_model(repository: str, files: Path, cache: Path) -> None:
    """Put a model where the hub's client looks for it without a network: links only."""
    for place in _CACHES:
        folder = cache / place / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("local")
        (folder / "snapshots").mkdir()
        (folder / "snapshots/local").symlink_to(files.resolve(), target_is_directory=True)


def _run(model: MetricModel, arguments: list[str], lines: str, cache: Path, timeout: float) -> dict[str, Any]:
    """Run the worker with `lines` as its input, and return its answer.

    Raises:
        InputError: it does not start, fails or takes too long; the message is the last line of its errors.
    """
    environment = {name: value for name, value in os.environ.items() if not _SETTINGS.match(name)}
    if model.python is not None:  # the packages of this Python do not belong into the other one
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(cache), "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    python = _python(model)
    command = [python, "-c", Path(metric_worker.__file__).read_text(encoding="utf-8"), *arguments]
    try:
        done = subprocess.run(
            command, input=lines.encode(), capture_output=True, timeout=timeout, env=environment, cwd=cache
        )
    except OSError as error:
        raise _error(model.metric, f"cannot start {python} ({error.strerror}). Give the path of a Python") from error
    except subprocess.TimeoutExpired as error:
        raise _error(model.metric, f"it was stopped after {timeout:.0f} s. Score fewer rows, or use a GPU") from error
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise _error(model.metric, f"{metric_worker.PACKAGE} failed (exit status {done.returncode}): {last}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
