"""The example of README, as a script and in a Jupyter kernel."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "examples" / "quick_start.py").read_text(encoding="utf-8")
# fewer images, so that the example takes seconds
SMALL = EXAMPLE.replace("phantom-b:80/0/20", "phantom-b:4/0/2").replace("epochs=4", "epochs=1")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT / "src"),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


def test_readme_contains_the_example() -> None:
    assert f"```python\n{EXAMPLE}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 12
    assert "phantom-b:4" in SMALL and "epochs=1" in SMALL


def test_the_example_runs_as_a_script(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(SMALL, encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "baseline: frozen" in process.stdout and "global_exact" in process.stdout
    assert "training" in process.stderr and "answering" in process.stderr
    assert (tmp_path / "runs" / "quick" / "adapter.json").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own packages
@pytest.mark.filterwarnings("ignore:Proactor event loop")
def test_the_example_runs_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each statement is a cell; results are then the last values of cells, which the kernel displays."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    cells = [ast.unparse(statement) for statement in ast.parse(SMALL).body]
    cells += ["model", "data", "data.test", "data.summary()", "run", "tuned", "tuned.predictions"]
    cells += ["axes = tuned.plot()", "axes = run.plot()", "normtune.compare([frozen, tuned])"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.source: cell.outputs for cell in notebook.cells}
    for cell in ("data", "data.test", "data.summary()", "run", "tuned", "tuned.predictions"):
        assert "text/html" in outputs[cell][0].data, cell
    for cell in ("axes = tuned.plot()", "axes = run.plot()"):
        assert any("image/png" in output.get("data", {}) for output in outputs[cell]), cell
    bars = [bar for cell in cells[3:6] for bar in progress_bars(outputs[cell])]
    assert [bar.split("<progress")[0].strip() for bar in bars] == ["answering", "training", "answering"]
    assert all("max='" in bar and "value='0'" not in bar for bar in bars)
    texts = [output.text for cell in cells for output in outputs[cell] if output.get("name") == "stderr"]
    texts = [text for text in texts if "TqdmWarning" not in text]  # transformers' own bars need ipywidgets
    assert texts == []


def progress_bars(outputs: Any) -> list[str]:
    texts = [output.get("data", {}).get("text/html", "") for output in outputs]
    return [text for text in texts if "<progress" in text]
