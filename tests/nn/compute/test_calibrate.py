"""Calibration of the device: the function, and the command in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tnmoe as tn
from tnmoe import nn
from tnmoe.contraction import rates as rates_module

COMMAND = [str(Path(sys.executable).parent / "tnmoe"), "calibrate"]


def test_a_calibration_measures_what_is_there_and_plans_with_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TNMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(rates_module, "_RATES", {})
    rates = nn.calibrate("cpu", store=False)
    assert rates_module.get_rates("cpu") == rates
    assert list(tmp_path.iterdir()) == []
    # Machines differ by less than a factor of a thousand from these.
    assert 1e8 < rates.flops < 1e15
    assert 1e7 < rates.bandwidth < 1e14
    assert 0 < rates.launch < 1e-2
    assert rates.half_depth >= 0


def test_a_device_that_is_not_there_is_named():
    for device in ("nowhere", "meta", 3.5, *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(tn.InputError, match=str(device)):
            nn.calibrate(device)


def test_the_command_stores_what_it_measured(tmp_path):
    environment = {**os.environ, "TNMOE_CACHE": str(tmp_path / "new" / "folder")}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    file = tmp_path / "new" / "folder" / "rates-cpu.json"
    assert f"stored in {file}" in done.stdout
    stored = json.loads(file.read_text())
    assert f"{stored['flops'] / 1e9:.4g} Gflop/s" in done.stdout


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_written_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "TNMOE_CACHE": str(tmp_path / "file")}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "file") in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
