"""Letters that wait: in order, each once, whatever is killed in between."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from samssl.cluster import server
from samssl.cluster.outbox import MAX_METRICS, METRICS, Letter, Outbox

URI = "http://server.invalid"


class Line:
    """A server that can be cut off; what arrives is written down."""

    def __init__(self) -> None:
        self.there = True
        self.arrived: list[Letter] = []
        self.texts: list[str] = []

    def __call__(self, uri: str, letter: Letter) -> None:
        if not self.there:
            raise requests.ConnectionError("cut off")
        if letter.kind == "bad":
            raise ValueError("no such thing")
        self.arrived.append(letter)
        if letter.file:
            self.texts.append(letter.file.read_text())


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr(server, "PAUSE_S", 0.0)
    monkeypatch.setattr(server, "_probe", lambda uri: None)
    server.has_answered(URI)
    return Line()


def outbox(tmp_path: Path, line: Line) -> Outbox:
    return Outbox(tmp_path / "outbox", URI, line)


def metric(step: int) -> Letter:
    return Letter("run", METRICS, {METRICS: [["loss", 0.5, 1000 + step, step]]})


def steps(letters: list[Letter]) -> list[int]:
    return [entry[3] for letter in letters if letter.kind == METRICS for entry in letter.content[METRICS]]


def test_nothing_is_written_while_the_server_is_there(tmp_path: Path, line: Line) -> None:
    outbox(tmp_path, line).post(metric(1))
    assert line.arrived == [metric(1)]
    assert list(tmp_path.iterdir()) == []


def test_what_waits_arrives_first_in_order_and_once(
    tmp_path: Path, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    box = outbox(tmp_path, line)
    line.there = False
    for step in range(12):
        box.post(metric(step))
    box.post(Letter("run", "tags", {"a": "b"}))
    box.post(metric(12))
    line.there = True
    box.post(metric(13))
    assert steps(line.arrived) == list(range(14))
    assert [letter.kind for letter in line.arrived] == [METRICS, "tags", METRICS]  # in a row they go together
    assert box.waiting() == []
    box.close()
    assert not box.folder.exists()
    said = capsys.readouterr().out
    assert said.count("cannot be reached") == 1
    assert "delivered 15 entries" in said


def test_metrics_are_joined_up_to_what_one_call_takes(tmp_path: Path, line: Line) -> None:
    box = outbox(tmp_path, line)
    line.there = False
    for first in (0, 600, 1200):
        rows = [["loss", 0.5, 1, step] for step in range(first, first + 600)]
        box.post(Letter("run", METRICS, {METRICS: rows}))
    line.there = True
    assert box.deliver()
    assert all(len(letter.content[METRICS]) <= MAX_METRICS for letter in line.arrived)
    assert steps(line.arrived) == list(range(1800))


def test_a_file_is_kept_as_it_was(tmp_path: Path, line: Line) -> None:
    file = tmp_path / "picture.txt"
    file.write_text("as it was")
    line.there = False
    outbox(tmp_path, line).post(Letter("run", "artifact", {"folder": "pictures"}, file))
    file.write_text("changed since")
    line.there = True
    assert outbox(tmp_path, line).deliver()  # another process would find it just so
    assert line.texts == ["as it was"]
    assert line.arrived[0].file is not None
    assert line.arrived[0].file.name == "picture.txt"
    assert [path.name for path in (tmp_path / "outbox").iterdir()] == [".lock"]


def test_what_the_server_refuses_does_not_hold_up_the_rest(
    tmp_path: Path, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    box = outbox(tmp_path, line)
    line.there = False
    for letter in (metric(0), Letter("run", "bad", {}), metric(1)):
        box.post(letter)
    line.there = True
    assert box.deliver()
    assert steps(line.arrived) == [0, 1]
    assert [path.name for path in (box.folder / "refused").iterdir()] == ["00000002.json"]
    assert "no such thing" in capsys.readouterr().out
    box.close()
    assert (box.folder / "refused").exists()


def test_an_error_that_time_does_not_mend_is_raised(tmp_path: Path, line: Line) -> None:
    with pytest.raises(ValueError, match="no such thing"):
        outbox(tmp_path, line).post(Letter("run", "bad", {}))


def test_a_killed_process_leaves_its_letters(tmp_path: Path, line: Line) -> None:
    program = """
import os, sys, requests
from pathlib import Path
from samssl.cluster import server
from samssl.cluster.outbox import Letter, Outbox
def send(uri, letter):
    raise requests.ConnectionError("cut off")
box = Outbox(Path(sys.argv[1]), "http://127.0.0.1:9", send)
for step in range(3):
    box.post(Letter("run", "metrics", {"metrics": [["loss", 0.5, 1, step]]}))
os.kill(os.getpid(), 9)
"""
    box = outbox(tmp_path, line)
    done = subprocess.run([sys.executable, "-c", program, str(box.folder)], env=os.environ)
    assert done.returncode == -9
    assert box.deliver()
    assert steps(line.arrived) == [0, 1, 2]
