"""Runs the notebook from top to bottom and stores its outputs.

    python -m experiments.notebook

Its models come with the package, and it trains a small one. With the environment variable
SVAE_JAX_STEPS below 600 everything is short, which is for tests.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401, builds the font cache: else a kernel would say so
import nbclient
import nbformat

from experiments import options

PATH = Path(__file__).parent / "explore.ipynb"
_WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(directory: Path, timeout: int | None = None) -> Any:
    """Runs the notebook in a kernel of its own, whose environment is that of this process.

    Args:
        directory: where it runs.
        timeout: seconds that a cell may take; None is no limit.

    Returns:
        The notebook with its outputs, without those of a widget, which needs a kernel, and without
        what depends on this machine.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds it and its error.
    """
    notebook: Any = nbformat.read(PATH, as_version=4)
    metadata = notebook.metadata.copy()
    nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
        record_timing=False,
    ).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if _WIDGET not in out.get("data", {})]
    return notebook


def main(argv: Sequence[str]) -> None:
    """Runs the notebook, and writes it with its outputs."""
    options.parse(argv, __doc__)
    nbformat.write(execute(PATH.parent), PATH)


if __name__ == "__main__":
    options.run_command(main)
