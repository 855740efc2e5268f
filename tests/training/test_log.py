"""The event log: what it takes, torn lines, full disks."""

import json
import math
import resource
import time

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.training.log import EventLog


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_values_become_plain_json(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    before = time.time()
    with EventLog(path) as log:
        log.write(
            "train",
            step=3,
            loss=torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
            ratio_mean=torch.tensor([1.0, math.nan]),
            weights=np.array([[1.0], [math.inf]]),
            ess=np.float64(-math.inf),
            count=np.int64(7),
            ok=np.bool_(True),
            nested={"a": (1, None), 2: [math.nan]},
            path=path.name,
            text='a "quoted"\nline, ü, \ud800',
        )
        log.write("end", message=tmp_path)
    first, second = lines(path)
    assert before - 1 <= first.pop("time") <= time.time() + 1
    assert first == {
        **{"event": "train", "step": 3, "loss": 0.5, "ratio_mean": [1.0, None], "weights": [[1.0], [None]]},
        **{"ess": None, "count": 7, "ok": True, "nested": {"a": [1, None], "2": [None]}},
        **{"path": "log.jsonl", "text": 'a "quoted"\nline, ü, \ud800'},
    }
    assert (second["event"], second["step"], second["message"]) == ("end", None, str(tmp_path))
    with pytest.raises(ValueError, match="closed"):
        log.write("late")


def test_log_refuses_what_has_no_json_form(tmp_path):
    with EventLog(tmp_path / "log.jsonl") as log, pytest.raises(TypeError, match=r"info\.net is a Linear"):
        log.write("train", info={"net": torch.nn.Linear(1, 1)})
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_log_appends_and_ends_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "start"}\n{"event": "tr')
    for event in ("resume", "train"):
        with EventLog(path) as log:
            log.write(event)
    got = path.read_text().splitlines()
    assert got[:2] == ['{"event": "start"}', '{"event": "tr']
    assert [json.loads(line)["event"] for line in got[2:]] == ["resume", "train"]


def test_log_on_a_full_disk_is_the_users_error_and_goes_on_later(tmp_path):
    path = tmp_path / "log.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventLog(path) as log:
        log.write("start")
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard)
        )  # room for a part of a line
        try:
            with pytest.raises(UserError, match=r"cannot write .*log\.jsonl"):
                log.write("train", loss=1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.write("end")
    first, torn, last = path.read_text().splitlines()
    assert (json.loads(first)["event"], len(torn), json.loads(last)["event"]) == ("start", 10, "end")
    with pytest.raises(UserError, match="cannot write"):
        EventLog(path / "under-a-file")


def test_one_write_a_line_keeps_two_writers_apart(tmp_path):
    path = tmp_path / "log.jsonl"
    with EventLog(path) as one, EventLog(path) as two:
        for step in range(50):
            one.write("one", step, text="x" * step)
            two.write("two", step, text="y" * step)
    assert [(e["event"], e["step"]) for e in lines(path)] == [
        (n, s) for s in range(50) for n in ("one", "two")
    ]
