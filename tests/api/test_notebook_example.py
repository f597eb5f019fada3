"""The notebook examples/your_own_data.ipynb runs: from a spreadsheet to a served answer."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.api.test_readme_example import ENVIRONMENT, ROOT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own packages
@pytest.mark.filterwarnings("ignore:Proactor event loop")
def test_the_notebook_of_own_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "examples" / "your_own_data.ipynb", as_version=4)
    for cell in notebook.cells:  # fewer images, so that the example takes seconds
        cell.source = cell.source.replace("phantom-b:48/0/16", "phantom-b:4/0/2").replace("epochs=4", "epochs=1")
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + str(output.get("data", "")) for output in outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("global_exact" in text for text in texts) and any("image/png" in text for text in texts)
    assert "-> " in texts[-1] and "reference" in texts[-1]
    assert all(not cell.get("outputs") for cell in nbformat.read(ROOT / "examples" / "your_own_data.ipynb", 4).cells)
