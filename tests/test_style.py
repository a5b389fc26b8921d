"""The shared style of pictures: names, label places, and nothing changed for other users of matplotlib."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from data.style import OURS, drawing, end_labels, heading, human, line, name_phases, panels, phase_runs, save, spread

ROOT = Path(__file__).parents[1]


def test_importing_the_style_or_a_report_loads_no_matplotlib():
    script = "import sys, data.style, runtime.infer.report, runtime.simulate.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_labels_keep_their_distance_and_order():
    assert spread([0.0, 0.0, 5.0], 2.0) == [-1.0, 1.0, 5.0]
    places = spread([0.2, 0.21, 0.22, 0.9, 0.91], 0.07)
    assert all(upper - lower >= 0.07 - 1e-9 for lower, upper in pairwise(places))
    assert spread([], 0.1) == []


def test_runs_of_phases():
    assert phase_runs(["a", "a", "b", "a"]) == [("a", 0, 2), ("b", 2, 3), ("a", 3, 4)]


@pytest.mark.parametrize(
    ("name", "shown"), [("every_1", "topic change every batch"), ("eplb", "EPLB"), ("my_text", "my text")]
)
def test_names_for_people(name, shown):
    assert human(name) == shown


def test_a_picture_is_saved_whole_and_leaves_global_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with drawing():
        figure, axes = panels(4, 3)
        axes[0, 0].plot([0.5, 0.9], **line("learned"))
        name_phases(axes[0, 0], ["steady", "unseen"], 3)
        end_labels(axes[0, 0], [(0.9, "ours", OURS)])
        heading(figure, "Title", "note")
    save(figure, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["picture.png"]
    assert dict(matplotlib.rcParams) == before
