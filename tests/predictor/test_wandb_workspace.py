import json
import re
import sys

import pytest

from predictor.wandb_workspace import CURVES, LAYERS, PICTURES, TABLES, main, workspace

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")


def test_the_view_has_a_panel_for_every_key():
    made = json.loads(workspace("owner", "project")._to_model().model_dump_json())
    sections = made["spec"]["section"]["panel_bank_config"]["sections"]
    assert sections[0]["name"] == "Is it learning?"
    text = json.dumps(sections)
    for keys in (*CURVES.values(), *LAYERS.values(), *PICTURES.values(), TABLES):
        assert [key for key in keys if json.dumps(key) not in text] == []
    for section in sections:
        corners = [(panel["layout"]["x"], panel["layout"]["y"]) for panel in section["panels"]]
        assert len(set(corners)) == len(corners), "panels lie over one another"


def test_without_an_account_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["wandb_workspace", "owner"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert re.search(r"the view cannot be saved in owner/switchcast .*wandb login", capsys.readouterr().err)
