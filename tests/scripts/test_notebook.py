"""The notebook runs from the first cell to the last, and is committed as a reader wants to find it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, *kinds):
    return [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type in kinds]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook, "stream") if output.name == "stdout")


def round_trip_error(notebook):
    return float(re.search(r"round-trip error: (\S+)", printed(notebook))[1])


def clone(folder):
    """A folder that looks like a clone to the notebook, which writes into its runs/."""
    (folder / "examples" / "data").mkdir(parents=True)
    (folder / "examples" / "data" / "digits").symlink_to(ROOT / "examples" / "data" / "digits")
    return folder


def shortened(notebook, num_steps):
    """The notebook with so few training steps."""
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source, changed = re.subn(r"num_steps = \d+", f"num_steps = {num_steps}", parameters.source)
    assert changed == 1
    return notebook


@pytest.mark.slow
def test_every_cell_runs_without_a_warning(notebook, tmp_path, monkeypatch):
    for name in ("HF_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = {"metadata": {"path": str(clone(tmp_path / "clone") / "examples")}}
    NotebookClient(shortened(notebook, num_steps=40), timeout=600, resources=place).execute()
    assert [output.text for output in outputs(notebook, "stream") if output.name != "stdout"] == []
    assert len(outputs(notebook, "execute_result")) == 7
    assert round_trip_error(notebook) < 1e-4
    assert (tmp_path / "clone" / "runs" / "notebook" / "digits" / "model_index.json").exists()


def test_it_is_committed_with_the_outputs_of_one_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(outputs(notebook, "execute_result")) == 7
    assert outputs(notebook, "error") == []
    assert {output.name for output in outputs(notebook, "stream")} == {"stdout"}
    assert round_trip_error(notebook) < 1e-4


def test_the_committed_file_is_small_and_tells_nothing_of_the_machine_it_ran_on(notebook):
    text = NOTEBOOK.read_text()
    assert len(text) < 600_000
    assert not re.search(r"/(home|root|tmp|work|Users|usr|opt)/|0x[0-9a-f]{8}", text)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    allowed = {"tags"}
    assert all(set(cell.metadata) <= allowed for cell in notebook.cells)
