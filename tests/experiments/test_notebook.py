"""The notebook runs, and what is stored of it is the page that readers see."""

import re

import nbformat
import pytest

from experiments import notebook


def _outputs(cells, kind):
    return [out for cell in cells for out in cell.get("outputs", []) if kind in out.get("data", {})]


@pytest.fixture
def stored():
    return nbformat.read(notebook.PATH, as_version=4)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")  # its models are of real size
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch, stored):
    monkeypatch.setenv("SVAE_JAX_STEPS", "2")
    executed = notebook.execute(tmp_path, timeout=300)
    for kind in ("image/png", "text/markdown"):
        made = _outputs(executed.cells, kind)
        assert len(made) == len(_outputs(stored.cells, kind)) > 0
    text = " ".join(out.data["text/markdown"] for out in _outputs(executed.cells, "text/markdown"))
    assert "nan" not in text
    assert "2 training steps" in executed.cells[-3].outputs[0].text
    streams = [o for c in executed.cells for o in c.get("outputs", []) if "name" in o]
    assert {stream.name for stream in streams} == {"stdout"}


def test_the_stored_page_is_whole_small_and_of_no_machine(stored):
    text = notebook.PATH.read_text()
    assert len(text) < 3e6
    assert not re.search(r'[" ](/(home|root|work|tmp|usr|Users)/|~/|[A-Z]:\\)', text)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert {out.name for out in outputs if out.output_type == "stream"} == {"stdout"}
    assert not any(out.output_type == "error" for out in outputs)
    assert "600 training steps" in stored.cells[-3].outputs[0].text  # the full setting
    assert all(cell.metadata == {} for cell in stored.cells)
    assert set(stored.metadata) == {"kernelspec", "language_info"}
