"""The application without Ray: masks, limits, refusals, and that nothing of a scan is left or told."""

import asyncio
import gzip
import hashlib
import io
import json
import logging
import re
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from training_support import write_tuned

from samssl.data.slices import SliceStore
from samssl.inference import LoadedBundle
from samssl.models.sam import ModelConfig
from samssl.predicting import PredictConfig, run_predict
from samssl.serving.app import FOLDER, PAGES, make_app
from samssl.serving.segmenting import Segmenter
from samssl.serving.settings import ServeConfig
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig

PLANTED = "jane_doe_1970"
Client = httpx2.AsyncClient
Work = Callable[[Client], Awaitable[Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> Path:
    """A folder with scans, a bundle of two classes, and one of two regions that overlap."""
    root = tmp_path_factory.mktemp("serve")
    store = prepare_boxes(root, train=2, val=1, test=1)
    regions = {"whole": ("shell", "core"), "core": ("core",)}
    data = FinetuneDataConfig(store=root / "store")
    overlapping = replace(data, classes=regions, overlapping=True)
    for name, chosen, steps in (("bundle", data, 20), ("regions", overlapping, 1)):
        config = FinetuneConfig(
            out=root / "run",
            data=chosen,
            model=ModelConfig(variant="micro", image_size=32),
            optim=FinetuneFitConfig(steps=steps, batch_size=2, warmup_steps=0, validate_every=steps, lr=0.01),
        )
        write_tuned(root / name, config, store)
    return root


@pytest.fixture
def scan(root: Path) -> Path:
    return root / "scans" / "imagesTr" / "scan_000.nii.gz"


@pytest.fixture(scope="module")
def bundle(root: Path) -> LoadedBundle:
    return LoadedBundle([root / "bundle"])


def app_of(bundle: LoadedBundle, config: ServeConfig, folder: Path) -> Any:
    return make_app(Segmenter(bundle, folder).segment, bundle.classes, config, folder)


@pytest.fixture
def use(bundle: LoadedBundle, root: Path, tmp_path: Path) -> Callable[..., Any]:
    """Calls what it is given with a client of the application; then no upload may be left."""

    def run(work: Work, host: str = "127.0.0.1", **settings: Any) -> Any:
        folder = tmp_path / "uploads"
        folder.mkdir(exist_ok=True)
        app = app_of(bundle, ServeConfig(bundle=root / "bundle", **settings), folder)

        async def main() -> Any:
            transport = httpx2.ASGITransport(app)
            async with Client(transport=transport, base_url=f"http://{host}:8000") as client:
                result = await work(client)
            for _ in range(100):
                if not any(folder.iterdir()):
                    return result
                await asyncio.sleep(0.05)
            raise AssertionError("an upload was left behind")

        return asyncio.run(main())

    return run


def post(content: Any, **options: Any) -> Work:
    return lambda client: client.post("/predict", content=content, **options)


def png_of(scan: Path) -> bytes:
    image: Any = nib.load(scan)
    plane = np.asarray(image.dataobj)[:, :, 2].clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(plane).save(file, "PNG")
    return file.getvalue()


def nifti(shape: tuple[int, ...], claimed: tuple[int, ...] = ()) -> bytes:
    """A volume of noise; its header claims the shape `claimed`."""
    image = nib.Nifti1Image(np.random.default_rng(0).normal(100, 20, shape).astype(np.float32), np.eye(4))
    content = bytearray(image.to_bytes())
    if claimed:
        header = image.header.copy()
        header.set_data_shape(claimed)
        content[: len(header.binaryblock)] = header.binaryblock
    return bytes(content)


@pytest.mark.parametrize("way", ["body", "form", "uncompressed"])
def test_a_volume_gets_the_mask_that_predict_writes(
    use: Callable[..., Any], root: Path, scan: Path, tmp_path: Path, way: str
) -> None:
    run_predict(PredictConfig(bundle=root / "bundle", scans=(scan,), out=tmp_path / "out"))
    expected = gzip.decompress((tmp_path / "out" / "scan_000_mask.nii.gz").read_bytes())
    content = scan.read_bytes()
    if way == "form":
        files = {"scan": (f"{PLANTED}.nii.gz", content)}
        answer = use(lambda client: client.post("/predict", files=files))
    else:
        answer = use(post(gzip.decompress(content) if way == "uncompressed" else content))
    assert answer.status_code == 200, answer.text
    assert gzip.decompress(answer.content) == expected
    assert PLANTED not in str(answer.headers)
    about = json.loads(answer.headers["Samssl-Prediction"])
    assert about["volumes_ml"].keys() == {"shell", "core"}
    assert about["volumes_ml"]["shell"] > 0
    assert about["warnings"] == []


def test_an_image_gets_an_image(use: Callable[..., Any], root: Path, scan: Path, tmp_path: Path) -> None:
    content = png_of(scan)
    (tmp_path / "one.png").write_bytes(content)
    run_predict(PredictConfig(bundle=root / "bundle", scans=(tmp_path / "one.png",), out=tmp_path / "out"))
    answer = use(post(content))
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == (tmp_path / "out" / "one_mask.png").read_bytes()


def test_overlapping_classes_come_as_a_mask_each(root: Path, scan: Path, tmp_path: Path) -> None:
    regions = LoadedBundle([root / "regions"])
    app = app_of(regions, ServeConfig(bundle=root / "regions"), tmp_path)

    async def work() -> Any:
        async with Client(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post("/predict", content=scan.read_bytes())

    answer = asyncio.run(work())
    config = PredictConfig(bundle=root / "regions", scans=(scan,), out=tmp_path / "out")
    run_predict(config)
    files = json.loads(answer.headers["Samssl-Prediction"])["files"]
    assert files == {"1": "whole.nii.gz", "2": "core.nii.gz"}
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        for name in files.values():
            written = (tmp_path / "out" / f"scan_000_{name}").read_bytes()
            assert gzip.decompress(archive.read(name)) == gzip.decompress(written)


def test_a_request_chooses_the_volume_and_the_modality(use: Callable[..., Any], scan: Path) -> None:
    image: Any = nib.load(scan)
    voxels = np.asarray(image.dataobj)
    four = nib.Nifti1Image(np.stack([voxels[::-1], voxels], axis=-1), image.affine).to_bytes()
    refused = use(post(four))
    assert refused.status_code == 422
    assert "Choose one volume with ?volume=, 0 to 1." in refused.json()["error"]
    alone, chosen = use(post(scan.read_bytes())), use(post(four, params={"volume": 1, "modality": "MR"}))
    masks: list[Any] = [nib.Nifti1Image.from_bytes(gzip.decompress(a.content)) for a in (alone, chosen)]
    assert np.array_equal(masks[0].dataobj, masks[1].dataobj)
    assert use(post(four, params={"volume": "first"})).status_code == 400
    assert use(post(four, params={"bundle": "/etc"})).status_code == 400


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "brings no scan"),
        (b"a text about a patient", 415, "neither NIfTI nor PNG"),
        (b"\x89PNG\r\n\x1a\n", 422, "The file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), 422, "The file"),
        (b"\x1f\x8b" + bytes(126) + b"DICM", 415, "DICOM"),
        (gzip.compress(nifti((8, 8, 4)))[:-40], 422, "The file is damaged"),
        (gzip.compress(b"no scan", mtime=0), 422, "The file is not a NIfTI file"),
        (nifti((8, 8, 4), claimed=(8, 8, 40)), 422, "promises"),
        (gzip.compress(nifti((8, 8, 4), claimed=(3000, 3000, 3000))), 413, "27000.0 million voxels"),
        (nib.Nifti1Image(np.ones((8, 8, 4)), np.eye(4)).to_bytes(), 422, "nothing to see"),
    ],
)
def test_what_cannot_be_segmented_is_refused_in_words(
    use: Callable[..., Any], tmp_path: Path, content: bytes, status: int, words: str
) -> None:
    answer = use(post(content))
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    sentence = answer.json()["error"]
    assert words in sentence
    assert str(tmp_path) not in sentence


@pytest.mark.parametrize("kind", ["no file", "two files", "broken"])
def test_a_form_without_one_file_is_refused(use: Callable[..., Any], scan: Path, kind: str) -> None:
    file = (PLANTED, scan.read_bytes())
    if kind == "broken":
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = use(post(b"--y", headers=headers))
    else:
        files = [("a", file), ("b", file)] if kind == "two files" else [("a", (None, b"text"))]
        answer = use(lambda client: client.post("/predict", files=files))
    assert answer.status_code == 400
    assert "form" in answer.json()["error"]


@pytest.mark.parametrize("form", [False, True])
def test_an_upload_is_counted_while_it_arrives(use: Callable[..., Any], form: bool) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        if form:
            yield b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
        while sent < 100:
            sent += 1
            yield bytes(100_000)

    headers = {"Content-Type": "multipart/form-data; boundary=x"} if form else {}
    answer = use(post(endless(), headers=headers), max_megabytes=1.0)
    assert answer.status_code == 413
    assert "larger than the 1 MB" in answer.json()["error"]
    assert sent == (10 if form else 11)


def test_an_upload_that_says_that_it_is_too_large_is_not_read(use: Callable[..., Any]) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was asked for")
        yield b""

    answer = use(post(never(), headers={"Content-Length": "1000001"}), max_megabytes=1.0)
    assert answer.status_code == 413


def test_a_slow_upload_is_given_up(use: Callable[..., Any]) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"\x1f\x8b"
        await asyncio.sleep(60)

    answer = use(post(slow()), timeout_s=0.3)
    assert answer.status_code == 408
    assert "upload took longer than the 0.3 s" in answer.json()["error"]


def test_a_long_segmentation_is_ended_and_gives_its_place_back(use: Callable[..., Any], scan: Path) -> None:
    async def work(client: Client) -> Any:
        began = time.monotonic()
        late = await client.post("/predict", content=nifti((24, 20, 4000)))
        while (answer := await client.post("/predict", content=scan.read_bytes())).status_code == 503:
            await asyncio.sleep(0.05)
        return late, answer, time.monotonic() - began

    late, answer, seconds = use(work, timeout_s=1.0, max_requests=1)
    assert late.status_code == 503
    assert "took longer" in late.json()["error"]
    assert late.headers["retry-after"]
    assert answer.status_code == 200
    assert seconds < 10


def test_no_more_scans_are_taken_up_than_at_once(use: Callable[..., Any], scan: Path) -> None:
    content = scan.read_bytes()

    async def work(client: Client) -> Any:
        begun, go = asyncio.Event(), asyncio.Event()

        async def held() -> AsyncIterator[bytes]:
            yield content[:10]
            begun.set()
            await go.wait()
            yield content[10:]

        first = asyncio.create_task(client.post("/predict", content=held()))
        await begun.wait()
        second = await client.post("/predict", content=content)
        others = [(await client.get(path)).status_code for path in ("/health", "/labels", "/")]
        go.set()
        return await first, second, others

    first, second, others = use(work, max_requests=1)
    assert (first.status_code, second.status_code, others) == (200, 503, [200] * 3)
    assert "as many scans as it takes" in second.json()["error"]


def test_an_upload_that_breaks_off_leaves_nothing(bundle: LoadedBundle, root: Path, tmp_path: Path) -> None:
    app = app_of(bundle, ServeConfig(bundle=root / "bundle", max_requests=1), tmp_path)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    sent: list[Any] = []

    async def ask() -> None:
        messages = iter(
            [{"type": "http.request", "body": b"\x1f\x8b", "more_body": True}, {"type": "http.disconnect"}]
        )

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)

    for _ in range(2):  # the place is free again
        asyncio.run(ask())
    assert [message["status"] for message in sent if "status" in message] == [400, 400]
    assert not list(tmp_path.iterdir())


def test_nothing_of_a_scan_is_logged_or_told(
    use: Callable[..., Any],
    bundle: LoadedBundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    content = gzip.compress(PLANTED.encode() * 20)
    files = {PLANTED: (f"{PLANTED}.nii.gz", content)}
    refused = use(lambda client: client.post("/predict", files=files))

    def fail(*given: Any, **named: Any) -> Any:
        raise RuntimeError(f"cannot do {PLANTED}")

    monkeypatch.setattr(bundle, "predict", fail)
    failed = use(post(nifti((8, 8, 4)), headers={"X-Name": PLANTED}))
    printed = capfd.readouterr()
    assert (refused.status_code, failed.status_code) == (422, 500)
    assert "RuntimeError" in failed.json()["error"]
    own = [record.getMessage() for record in caplog.records if record.name.startswith("samssl")]
    assert len(own) == 1
    assert own[0].startswith("predict: RuntimeError in")
    assert PLANTED not in refused.text + failed.text + caplog.text + printed.out + printed.err


def test_what_other_sites_send_is_refused(use: Callable[..., Any]) -> None:
    def labels(**headers: str) -> Work:
        return lambda client: client.get("/labels", headers=headers)

    assert use(labels()).json()["labels"] == {"1": "shell", "2": "core"}
    assert use(labels(Origin="http://localhost:8000"), host="localhost").status_code == 200
    for answer in (use(labels(), host="evil.example"), use(labels(Origin="http://evil.example"))):
        assert answer.status_code == 403
        assert "error" in answer.json()
        assert "Content-Security-Policy" in answer.headers
    config = ServeConfig(bundle=Path("b"), host="0.0.0.0")
    assert not config.local
    assert ServeConfig(bundle=Path("b"), host="::1").local


def test_paths_that_there_are_not_are_told_what_there_is(use: Callable[..., Any]) -> None:
    answers = [use(lambda client: client.get(f"/{PLANTED}")), use(lambda client: client.get("/predict"))]
    assert [answer.status_code for answer in answers] == [404, 405]
    assert all("POST /predict" in answer.json()["error"] for answer in answers)


def test_the_page_asks_nobody_else(use: Callable[..., Any]) -> None:
    for path, name in PAGES.items():
        answer = use(lambda client, path=path: client.get(path))
        assert answer.content == (FOLDER / name).read_bytes()
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert not re.search(r"unsafe|https?:|\*", policy)
    for name in ("page.html", "page.css", "page.js"):
        text = (FOLDER / name).read_text()
        assert "//" not in re.sub(r"^\s*//.*|; // .*", "", text, flags=re.MULTILINE)
        assert not re.search(r"\son\w+=|style=|<style|javascript:", text)


def test_the_viewer_is_the_file_whose_licence_lies_beside_it() -> None:
    told = re.search(r"SHA-256: ([0-9a-f]{64})", (FOLDER / "niivue.licence.txt").read_text())
    assert told
    assert hashlib.sha256((FOLDER / "niivue.js").read_bytes()).hexdigest() == told[1]
