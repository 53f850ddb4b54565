"""Training on kept embeddings is training on images, but for half precision and the time it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from samssl.config import ConfigError, UserError, load_config
from samssl.data.datasets import AugmentConfig, LabelledSlices
from samssl.data.embeddings import EmbeddingsConfig, KeptEmbeddings
from samssl.data.inputs import InputConfig
from samssl.data.slices import SliceStore
from samssl.models.sam import ModelConfig
from samssl.models.strategies import StrategyConfig, build_segmenter
from samssl.train.context import LocalContext, State
from samssl.train.finetune import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneFitConfig,
    SupervisedSegmenter,
    finetune,
)
from samssl.train.frozen import FrozenEncoder

STILL = AugmentConfig(degrees=0.0, translate=0.0, scale=0.0, intensity=0.0, noise=0.0)
SIZE = 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> SliceStore:
    return prepare_boxes(tmp_path_factory.mktemp("boxes"), train=2, val=1, test=1)


def cpu() -> LocalContext:
    context = LocalContext()
    context.device = torch.device("cpu")
    return context


def configuration(store: SliceStore, augment: AugmentConfig, embeddings: EmbeddingsConfig) -> FinetuneConfig:
    return FinetuneConfig(
        out=Path("unused"),
        data=FinetuneDataConfig(store=Path(store.root), augment=augment, embeddings=embeddings),
        model=ModelConfig(variant="micro", image_size=SIZE),
        strategy=StrategyConfig(scope="decoder"),
        optim=FinetuneFitConfig(
            steps=6, batch_size=4, warmup_steps=1, validate_every=3, lr=0.01, log_every=1
        ),
    )


def curves(state: State) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for _, name, value in state["progress"]["history"]:
        found.setdefault(name, []).append(value)
    return found


def frozen(store: SliceStore, folder: Path, **settings: float) -> FrozenEncoder:
    embeddings = EmbeddingsConfig(folder=folder, **settings)  # pyright: ignore[reportArgumentType]
    config = configuration(store, AugmentConfig(), embeddings)
    segmenter = build_segmenter(config.model, config.strategy, len(store.labels), seed=0)
    slices = LabelledSlices(store, store.rows.rows(["train"]), SIZE, AugmentConfig())
    return FrozenEncoder(segmenter, slices, embeddings, "micro", config.optim, cpu())


def batch_of(encoder: FrozenEncoder, draws: list[tuple[int, int]]) -> dict[str, Tensor]:
    items = [encoder.data[draw] for draw in draws]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def embedding_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_losses_and_dice_are_those_without_kept_embeddings(store: SliceStore, tmp_path: Path) -> None:
    with_images = finetune(configuration(store, STILL, EmbeddingsConfig()), cpu())
    with_kept = finetune(configuration(store, STILL, EmbeddingsConfig(folder=tmp_path)), cpu())
    wanted, found = curves(with_images), curves(with_kept)
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=5e-3)
    assert found["val/dice"] == pytest.approx(wanted["val/dice"], abs=0.02)


def test_logits_of_validation_slices_are_those_of_their_images(store: SliceStore, tmp_path: Path) -> None:
    encoder = frozen(store, tmp_path)
    encoder.fill()
    rows = store.rows.rows(["val"])
    images = torch.stack([encoder.val.slices.fitted_image(int(row)) for row in rows])
    with torch.no_grad():
        wanted = encoder.segmenter(images)
        found = encoder.low_res_logits(rows.tolist())
    assert torch.allclose(found, wanted, atol=5e-3 * float(wanted.abs().max()))


def test_once_filled_the_encoder_is_not_used_again(
    store: SliceStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = frozen(store, tmp_path, variants=2)
    encoder.fill()
    assert "12 slices x 2 views and 6 validation slices x 0.01 MB" in capsys.readouterr().out
    assert len(embedding_files(tmp_path)) == 12 * 2 + 6
    for parameter in encoder.segmenter.image_encoder.parameters():
        parameter.data.fill_(float("nan"))
    batch = encoder.complete(batch_of(encoder, [(0, 0), (3, 1), (7, 2)]))
    assert batch["embedding"].dtype == torch.half
    assert SupervisedSegmenter(encoder.segmenter)(batch)["loss"].isfinite()
    assert encoder.low_res_logits(store.rows.rows(["val"]).tolist()).isfinite().all()


def test_another_run_finds_what_the_first_has_kept(
    store: SliceStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen(store, tmp_path).fill()
    before = {path: path.stat().st_mtime_ns for path in embedding_files(tmp_path)}
    capsys.readouterr()
    frozen(store, tmp_path).fill()
    assert "; 0 are to be written" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in embedding_files(tmp_path)} == before


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_damaged_embedding_is_made_anew(store: SliceStore, tmp_path: Path, damage: str) -> None:
    encoder = frozen(store, tmp_path)
    encoder.fill()
    wanted = batch_of(encoder, [(0, 0), (1, 0)])
    for path in embedding_files(tmp_path):
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes({"flipped": content, "cut": content[:-7]}.get(damage, b""))
        if damage == "gone":
            path.unlink()
    batch = batch_of(encoder, [(0, 0), (1, 0)])
    assert batch["missing"].all()
    assert torch.equal(encoder.complete(batch)["embedding"], wanted["embedding"])
    assert not batch_of(encoder, [(0, 0), (1, 0)])["missing"].any()
    assert encoder.low_res_logits(store.rows.rows(["val"]).tolist()).isfinite().all()


def test_too_many_embeddings_are_refused_before_one_is_written(store: SliceStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"12 slices x 2 views.*Raise data\.embeddings\.limit_gib"):
        frozen(store, tmp_path / "kept", variants=2, limit_gib=1e-6).fill()
    assert not (tmp_path / "kept").exists()


def test_the_labels_of_a_view_belong_to_its_image(store: SliceStore, tmp_path: Path) -> None:
    """A slice whose image is its label map stays so under the moves, but for what is interpolated."""
    kept = frozen(store, tmp_path, variants=3).train
    row = next(int(row) for row in kept.slices.rows if kept.labels(int(row), 0).any())
    plain = kept.labels(row, 0)
    for view in (1, 2):
        image, labels = kept.slices.varied(row, kept._draw(row, view))
        assert torch.equal(kept.image(row, view), image)
        assert torch.equal(kept.labels(row, view), labels)
        assert not torch.equal(labels, plain)
    assert torch.equal(kept.image(row, 0), kept.slices.fitted_image(row))


def test_whatever_an_embedding_follows_from_is_in_its_key(store: SliceStore, tmp_path: Path) -> None:
    rows = store.rows.rows(["train"])
    made_by = {"weights": "a", "variant": "micro", "normalisation": "sam", "precision": "fp32"}

    def key(view: int = 1, row: int = int(rows[1]), **changes: object) -> str:
        settings = {"size": SIZE, "augment": AugmentConfig(), "inputs": InputConfig()} | changes
        slices = LabelledSlices(store, rows, settings["size"], settings["augment"], settings["inputs"])  # pyright: ignore[reportArgumentType]
        own = {name: str(changes.get(name, value)) for name, value in made_by.items()}
        return KeptEmbeddings(slices, tmp_path, own).key(row, view)

    other_augment = AugmentConfig(degrees=1.0)
    keys = [
        key(),
        *(key(**dict[str, Any]({name: "b"})) for name in made_by),
        key(size=64),
        key(augment=other_augment),
        key(inputs=InputConfig(mr="full")),
        key(inputs=InputConfig(channels="neighbours")),
        key(inputs=InputConfig(channels="windows")),
        key(view=0),
        key(view=2),
        key(row=int(rows[2])),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(view=0, augment=other_augment) == key(view=0)


def test_views_are_the_same_for_every_encoder(store: SliceStore, tmp_path: Path) -> None:
    first, second = frozen(store, tmp_path, variants=2).train, frozen(store, tmp_path, variants=2).train
    second.made_by = {**second.made_by, "weights": "other"}
    row = int(first.slices.rows[2])
    assert first.key(row, 1) != second.key(row, 1)
    assert torch.equal(first.image(row, 1), second.image(row, 1))


def test_embeddings_are_refused_where_the_encoder_trains(tmp_path: Path) -> None:
    fields = {"out": "x", "data.store": "y", "data.embeddings.folder": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"set strategy\.scope=decoder"):
        load_config(FinetuneConfig, None, fields)
    with pytest.raises(ConfigError, match=r"set resources\.strategy=ddp"):
        load_config(
            FinetuneConfig, None, fields | {"strategy.scope": "decoder", "resources.strategy": "fsdp"}
        )


def test_an_embedding_that_half_precision_cannot_hold_is_refused(store: SliceStore, tmp_path: Path) -> None:
    encoder = frozen(store, tmp_path)
    encoder.segmenter.image_encoder.neck[-1].weight.data.fill_(1e6)
    with pytest.raises(UserError, match=r"no number in half precision.*folder=null"):
        encoder.fill()


def test_two_workers_fill_it_together(store: SliceStore, tmp_path: Path) -> None:
    """Also where one comes later and finds what the other has made."""
    written: set[Path] = set()
    for rank in (0, 1):
        encoder = frozen(store, tmp_path)
        encoder.context.rank, encoder.context.world_size = rank, 2  # pyright: ignore[reportAttributeAccessIssue]
        encoder.fill()
        before, written = written, {*embedding_files(tmp_path)}
        assert len(written - before) == 6 + 3
