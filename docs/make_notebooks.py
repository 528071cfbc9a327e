"""Execute the notebooks of docs/notebooks, each in a new kernel, and save their outputs.

    python docs/make_notebooks.py [--check] [notebook ...]

With ``--check`` nothing is written: a notebook fails if a cell raises, if something is printed to stderr, such as a
warning, or if its outputs differ from the saved ones in more than numbers, which depend on the machine. Cells with the
tag "varies", which show texts of the Python that runs them, are not compared.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

FOLDER = Path(__file__).parent / "notebooks"
CELL_TIMEOUT_S = 300  # a cell runs for seconds; a busy machine may need minutes
LARGEST_PICTURE_BYTES = 60_000
OF_MACHINE = re.compile(r"[-−+]?\d+([.,]\d+)*(e[+-]?\d+)?|[█░─]+|\s+")  # numbers, bars, spaces
OPTIONAL = re.compile(r"Failed to load CPU gemm_4bit_forward from kernels-community.*\n")  # bitsandbytes, if installed
COLOR = re.compile(r"\x1b\[[\d;]*m")


def execute(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook with the outputs of a new kernel.

    Raises:
        CellExecutionError: A cell raised; the message has its traceback.
    """
    executed = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as folder:
        kernel = AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=f"{folder}/kernel", connection_file=f"{folder}/kernel.json"
        )
        client = NotebookClient(executed, km=kernel, timeout=CELL_TIMEOUT_S, record_timing=False, coalesce_streams=True)
        private = dict.fromkeys(("IPYTHONDIR", "MPLCONFIGDIR"), folder)
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no widgets are drawn
        client.execute(cleanup_kc=True, cwd=folder, env={**os.environ, **private, **offline})
    for cell in code_cells(executed):
        cell.outputs = [output for output in cell.outputs if not OPTIONAL.fullmatch(output.get("text", ""))]
    return executed


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: NotebookNode) -> list[str]:
    """Return the lines that a cell shows, and ``"picture"`` for each picture.

    Numbers and bars depend on the machine and on the texts that its Python has; so does the number of rows of a table.
    """
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            text = output.text
        elif "image/png" in output.data:
            text = "picture"
        else:
            text = output.data["text/plain"]
        found += [OF_MACHINE.sub("", line) for line in text.strip().splitlines()]
    return [line for line, before in zip(found, [None, *found], strict=False) if line != before]


def problems(executed: NotebookNode) -> list[str]:
    """Return what is wrong with outputs: text on stderr, large pictures."""
    found = []
    for number, cell in enumerate(code_cells(executed), start=1):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"code cell {number} printed to stderr: {output.text.strip()}")
            size = len(base64.b64decode(output.get("data", {}).get("image/png", "")))
            if size > LARGEST_PICTURE_BYTES:
                found.append(f"code cell {number} has a picture of {size} bytes; at most {LARGEST_PICTURE_BYTES}")
    return found


def differences(saved: NotebookNode, executed: NotebookNode) -> list[str]:
    """Return the cells whose outputs differ from the saved ones in more than numbers."""
    found = []
    for number, (old, new) in enumerate(zip(code_cells(saved), code_cells(executed), strict=True), start=1):
        if "varies" not in new.metadata.get("tags", ()) and shown(old) != shown(new):
            found.append(f"code cell {number} shows {shown(new)}, and {shown(old)} is saved")
    return found


def make(path: Path, *, check: bool) -> list[str]:
    """Execute one notebook, and save it unless ``check``; return what is wrong with it."""
    saved = nbformat.read(path, as_version=4)
    try:
        executed = execute(saved)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [COLOR.sub("", str(error)).strip()]
    found = problems(executed)
    if check:
        return found + differences(saved, executed)
    executed.metadata = {"kernelspec": executed.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(executed, path)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line; exit with 1 if a notebook fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the saved outputs, and write nothing")
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    options = parser.parse_args(words)
    failed = False
    for path in options.notebooks:
        found = make(path, check=options.check)
        print("\n".join([f"{path.name}: {'failed' if found else 'ok'}", *found]), flush=True)
        failed |= bool(found)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
