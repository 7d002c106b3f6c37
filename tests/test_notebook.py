"""The notebook has no outputs, and its cells run from top to bottom, with a shorter training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ENVIRONMENT


ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "notebooks" / "diffusers_dod.ipynb").read_text())
# What a notebook has and a script has not: a place for a figure, that is drawn anew.
DISPLAY = """
class display:
    def __init__(self, figure, display_id):
        self.update(figure)

    def update(self, figure):
        figure.savefig("figure.png")


"""


def test_the_notebook_has_no_outputs():
    assert NOTEBOOK["nbformat"] == 4 and len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_links_of_the_notebook_lead_to_files():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and all((ROOT / "notebooks" / link).exists() for link in links)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    source = DISPLAY + re.sub(r"^( *)%.*", r"\1pass", "\n".join(cells), flags=re.MULTILINE)
    environment = os.environ | ENVIRONMENT | {"MPLBACKEND": "agg", "NOTEBOOK_STEPS": "2"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    (tmp_path / "notebook.py").write_text(source + '\nsamples[0].save("sample.png")\n')
    command = [sys.executable, "notebook.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all((tmp_path / name).exists() for name in ("my-run/model_index.json", "figure.png", "sample.png"))
