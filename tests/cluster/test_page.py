"""The page about clusters names files, stages and panels that are there."""

import json
import re
from pathlib import Path

import pytest

from mmrag import config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = re.findall(r"jobs\.(\w+) --config (\S+\.yaml)((?: [\w.]+=\S+)*)", PAGE)
STAGES = re.findall(r"cluster/stages\.sh (\S+)\s.*?--config (\S+\.yaml)", PAGE)


def test_every_file_that_it_names_is_there():
    named = re.findall(r"(?:cluster|jobs/configs|tests|docs)/[\w./-]*\w", PAGE)
    assert len(named) > 20
    assert [path for path in set(named) if not (ROOT / path).exists()] == []


def test_every_link_leads_somewhere():
    for target, _, heading in (one.partition("#") for one in re.findall(r"\]\(([^)]+)\)", PAGE)):
        file = (ROOT / "docs" / target).resolve() if target else ROOT / "docs" / "cluster.md"
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in {
                re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in titles
            }


@pytest.mark.parametrize(("stage", "file", "overrides"), COMMANDS)
def test_a_stage_that_it_tells_how_to_run_would_start(stage, file, overrides, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "jobs" / f"{stage}.py").is_file()
    config.read(file, overrides.split())


@pytest.mark.parametrize(("stages", "file"), STAGES)
def test_stages_that_it_tells_how_to_run_are_there(stages, file):
    assert (ROOT / file).is_file()
    assert all((ROOT / "jobs" / f"{one}.py").is_file() for one in stages.split(","))


def test_it_tells_what_the_dashboards_panels_say():
    board = json.loads((ROOT / "cluster" / "kuberay" / "monitoring" / "grafana.json").read_text())
    titles = {one["title"] for one in board["panels"]}
    start = PAGE.index("| Grafana |")
    rows = PAGE[start : PAGE.index("| Ray's dashboard")].splitlines()
    told = [title for row in rows for title in row.split(" | ")[1].split("; ")]
    assert len(told) > 8 and set(told) <= titles
