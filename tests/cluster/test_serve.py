"""`samssl serve` as it is started: its mask, its page in a browser, what it opens, and its end by Ctrl-C."""

import gzip
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
from browser_support import CHROMIUM, chromium
from cluster_support import free_port
from PIL import Image
from training_support import write_tuned_micro

from samssl.cli import main
from samssl.cluster.serve import run_serve
from samssl.config import UserError
from samssl.data.slices import SliceStore
from samssl.predicting import PredictConfig, run_predict
from samssl.serving.settings import ServeConfig

ROOT = Path(__file__).parents[2]
CODE = "from samssl.cli import main; main()"
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
COLOURS = {1: (230, 159, 0), 2: (86, 180, 233)}
"""Of the classes on the page."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> Path:
    root = tmp_path_factory.mktemp("served")
    store = prepare_boxes(root, train=2, val=1, test=1)
    write_tuned_micro(root, store, steps=30)
    return root


@pytest.fixture(scope="module")
def scan(root: Path) -> Path:
    return root / "scans" / "imagesTr" / "scan_000.nii.gz"


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    temporary: Path
    log: Path


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    port, log = free_port(), root / "log.txt"
    (root / "tmp").mkdir()
    command = [sys.executable, "-c", CODE, "serve", str(root / "bundle"), f"port={port}", "max_megabytes=1"]
    folders = {"TMPDIR": str(root / "tmp"), "RAY_TMPDIR": tempfile.gettempdir()}  # Ray's has to be short
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **folders}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=file, stderr=file, text=True, start_new_session=True
        )
    try:
        for _ in range(1200):
            if "answers" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert "answers" in log.read_text(), log.read_text()
        yield Served(process, f"http://127.0.0.1:{port}", root / "tmp", log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.ray
def test_a_mask_is_that_of_predict_and_nothing_is_open_to_others(
    served: Served, root: Path, scan: Path, tmp_path: Path
) -> None:
    answer = requests.post(f"{served.url}/predict", data=scan.read_bytes(), timeout=120)
    assert answer.status_code == 200, answer.text
    main(["predict", str(root / "bundle"), str(scan), "--out", str(tmp_path)])
    expected = (tmp_path / "scan_000_mask.nii.gz").read_bytes()
    assert gzip.decompress(answer.content) == gzip.decompress(expected)
    refused = requests.post(f"{served.url}/predict", data=b"jane_doe", timeout=120)
    assert (refused.status_code, list(refused.json())) == (415, ["error"])
    broken = requests.post(f"{served.url}/predict", data=scan.read_bytes()[:-30], timeout=120)
    assert (broken.status_code, broken.json()["error"].split()[:2]) == (422, ["The", "file"])
    command = psutil.Process(served.process.pid)
    opened = [
        (process.name(), connection.laddr.ip)
        for process in (command, *command.children(recursive=True))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(opened) > 3
    assert not [entry for entry in opened if entry[1] not in LOOPBACK]


def seen_classes(picture: np.ndarray) -> dict[int, int]:
    """How many pixels have each class's colour."""
    far = {number: np.abs(picture.astype(int) - colour).max(axis=-1) for number, colour in COLOURS.items()}
    return {number: int((distance < 12).sum()) for number, distance in far.items()}


@pytest.mark.ray
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_the_page_shows_the_mask_slice_by_slice(
    served: Served, root: Path, scan: Path, tmp_path: Path
) -> None:
    image: Any = nib.load(scan)
    plane = np.asarray(image.dataobj)[:, :, 2].clip(0, 255).astype(np.uint8)
    Image.fromarray(plane).save(tmp_path / "plane.png")
    bundle = root / "bundle"
    run_predict(PredictConfig(bundle=bundle, scans=(scan, tmp_path / "plane.png"), out=tmp_path / "out"))
    mask: Any = nib.load(tmp_path / "out" / "scan_000_mask.nii.gz")
    voxels = np.asarray(mask.dataobj)
    with chromium(tmp_path) as page:
        page.open(f"{served.url}/")
        page.evaluate("document.getElementById('opacity').value = 1")
        page.choose("#file", scan)
        page.wait("document.body.dataset.state === 'shown'")
        pixels = {1: 0, 2: 0}
        for number in range(1, voxels.shape[2] + 1):
            page.evaluate(f"goTo({number})")
            assert page.evaluate("document.getElementById('where').textContent") == f"Slice {number} of 6"
            seen = seen_classes(page.screenshot("#volume"))
            expected = {label: int((voxels[:, :, number - 1] == label).sum()) for label in COLOURS}
            assert {label for label, count in seen.items() if count > 50} == {
                label for label, count in expected.items() if count
            }
            pixels = {label: pixels[label] + seen[label] for label in COLOURS}
        shares = [pixels[label] / (voxels == label).sum() for label in COLOURS]
        assert shares[0] == pytest.approx(shares[1], rel=0.1)  # each voxel is equally many pixels
        page.evaluate("document.querySelector('[data-plane=coronal]').click()")
        assert page.evaluate("document.getElementById('where').textContent").endswith("of 20")
        page.evaluate("document.body.dataset.state = 'busy'")
        page.choose("#file", tmp_path / "plane.png")
        page.wait("document.body.dataset.state === 'shown'")
        drawn = page.evaluate(
            "(canvas => [canvas.height, canvas.width, "
            "...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data])"
            "(document.getElementById('image'))"
        )
        picture = np.array(drawn[2:], np.uint8).reshape(drawn[0], drawn[1], 4)[..., :3]
        flat = np.asarray(Image.open(tmp_path / "out" / "plane_mask.png"))
        colours = np.array([(0, 0, 0), *COLOURS.values()])[flat]
        np.testing.assert_array_equal(picture, np.where(flat[..., None] > 0, colours, plane[..., None]))
        (tmp_path / "large.nii").write_bytes(bytes(1_000_001))
        page.choose("#file", tmp_path / "large.nii")
        page.wait("document.body.dataset.state === 'refused'")
        assert "larger than the 1 MB" in page.evaluate("document.getElementById('status').textContent")
        assert page.complaints == []
        allowed = (served.url, "data:", f"blob:{served.url}")
        assert not [url for url in page.requested if not url.startswith(allowed)]


@pytest.mark.ray
def test_ctrl_c_ends_it_with_status_0_and_leaves_nothing(served: Served, scan: Path) -> None:
    children = psutil.Process(served.process.pid).children(recursive=True)
    os.killpg(served.process.pid, signal.SIGINT)  # as a terminal does, to every process
    assert served.process.wait(timeout=60) == 0, served.log.read_text()
    gone, left = psutil.wait_procs(children, timeout=30)
    assert gone
    assert left == []
    assert not list(served.temporary.glob("samssl_serve_*"))
    told = served.log.read_text()
    assert "Traceback" not in told
    assert not [word for word in ("jane_doe", scan.name, "POST") if word in told]


def test_what_cannot_be_served_is_told_before_ray_is_started(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not a model bundle"):
        run_serve(ServeConfig(bundle=tmp_path))
    with pytest.raises(UserError, match="Nothing can listen"):
        run_serve(ServeConfig(bundle=root / "bundle", host="192.0.2.77"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(UserError, match="joins no cluster"):
        run_serve(ServeConfig(bundle=root / "bundle"))


def test_another_address_is_warned_of(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="Nothing can listen"):
        run_serve(ServeConfig(bundle=root / "bundle", host="192.0.2.77"))
    assert "there is no authentication" in capsys.readouterr().out
