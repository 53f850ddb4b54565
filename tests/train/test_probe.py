from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from samssl.data.datasets import Rows, UnlabelledSlices, rows_of
from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.data.views import CropConfig, still
from samssl.methods.mae import MaeConfig
from samssl.models.backbones import encode_tokens
from samssl.models.sam import ModelConfig, normalise
from samssl.models.tinyvit import TinyViT
from samssl.train.context import LocalContext
from samssl.train.pretrain import PretrainConfig, PretrainDataConfig, PretrainFitConfig, pretrain
from samssl.train.probe import Probe, ProbeConfig, labelled_rows

SIZE = 32
WHOLE = still(CropConfig())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> SliceStore:
    return prepare_boxes(tmp_path_factory.mktemp("labelled"), "tiny", pool=1, train=3, val=2, test=2)


@pytest.fixture
def context() -> LocalContext:
    context = LocalContext()
    context.device = torch.device("cpu")
    return context


class Recorded:
    """Whole slices with `channels` channels, noting which cases are read."""

    def __init__(self, store: SliceStore, channels: int = 1) -> None:
        self.store, self.channels, self.read = store, channels, set[str]()

    def __call__(self, rows: Rows) -> UnlabelledSlices:
        self.read |= {self.store.rows.case_name(row) for row in rows.tolist()}
        slices, channels = UnlabelledSlices(self.store, rows, SIZE, WHOLE), self.channels

        class Expanded(UnlabelledSlices):
            def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
                item = slices[draw]
                return item | {"image": item["image"].expand(channels, -1, -1)}

        return Expanded(self.store, rows, SIZE, WHOLE)


def make_probe(
    store: SliceStore, encoder: Any, context: LocalContext, channels: int = 1, **config: int
) -> tuple[Probe, Recorded]:
    slices = Recorded(store, channels)
    held_out = slices(labelled_rows(store, "val", 4))
    optim = PretrainFitConfig(steps=100, validate_every=10, warmup_steps=1)
    return Probe(store, encoder, held_out, slices, ProbeConfig(**config), optim, context), slices


def numpy_random_state() -> str:
    return repr(np.random.get_state(legacy=False))  # noqa: NPY002


def test_two_looks_are_equal_and_leave_nothing_behind(
    store: SliceStore, micro_sam: Sam, context: LocalContext
) -> None:
    encoder = micro_sam.image_encoder.train()
    next(encoder.blocks.children()).eval()
    modes = [part.training for part in encoder.modules()]
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    generator, numpy_state = torch.get_rng_state(), numpy_random_state()
    first = make_probe(store, encoder, context)[0].measure(0)
    second = make_probe(store, encoder, context)[0].measure(0)
    assert first == second
    assert set(first) == {
        *("features/effective_rank", "features/std"),
        *("probe/dice", "probe/dice_shell", "probe/dice_core"),
    }
    assert torch.equal(torch.get_rng_state(), generator)
    assert numpy_random_state() == numpy_state
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_only_train_and_val_patients_are_read(
    store: SliceStore, micro_sam: Sam, context: LocalContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, mask_slice = set(), store.mask_slice
    monkeypatch.setattr(store, "mask_slice", lambda case, z: masks.add(case) or mask_slice(case, z))
    probe, slices = make_probe(store, micro_sam.image_encoder, context, train_slices=7, val_slices=5)
    probe.measure(0)
    assert masks == slices.read == {*store.cases("train"), *store.cases("val")}
    assert {store.rows.case_name(row) for row in probe.train_rows.tolist()} == set(store.cases("train"))
    assert {store.rows.case_name(row) for row in probe.val_rows.tolist()} == set(store.cases("val"))
    assert (len(probe.train_rows), len(probe.val_rows)) == (7, 5)


class Pixels(TinyViT):
    """Tokens [B, C, h, w] where TinyViT has its own, here two powers of each patch's mean."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # none of TinyViT's layers

    def encode(self, images: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(images[:, :1], 2)
        return torch.cat([means, means**2], dim=1)


class Blind(TinyViT):
    """An encoder that has collapsed: the same embeddings for every image."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # none of TinyViT's layers

    def encode(self, images: Tensor) -> Tensor:
        return torch.linspace(1, 2, 48 * 256).view(1, 48, 16, 16).expand(len(images), -1, -1, -1)


def test_good_features_score_high_and_collapsed_ones_are_seen(
    store: SliceStore, context: LocalContext
) -> None:
    """The classes differ in brightness."""
    good = make_probe(store, Pixels(), context)[0].measure(0)
    blind = make_probe(store, Blind(), context)[0].measure(0)
    assert good["probe/dice"] > 0.6
    assert good["probe/dice"] > blind["probe/dice"] + 0.3
    assert blind["features/std"] < 1e-6 < 0.1 < good["features/std"]
    assert blind["features/effective_rank"] < 1.5


def test_one_grey_channel_or_three_are_the_same(
    store: SliceStore, micro_sam: Sam, context: LocalContext
) -> None:
    one = make_probe(store, micro_sam.image_encoder, context)[0].measure(0)
    three = make_probe(store, micro_sam.image_encoder, context, channels=3)[0].measure(0)
    assert one == three


def test_tokens_through_the_neck_are_the_image_embeddings(micro_sam: Sam) -> None:
    encoder = micro_sam.image_encoder
    images = normalise(torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)), encoder)
    with torch.no_grad():
        embeddings = encoder.neck(encode_tokens(encoder, images).permute(0, 3, 1, 2))
        torch.testing.assert_close(embeddings, encoder(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("every", "looked"), [(0, []), (1, [0, 10, 20, 30, 40, 100]), (2, [0, 20, 40, 100]), (3, [0, 30, 100])]
)
def test_every_so_many_validations_and_at_the_end(
    every: int, looked: list[int], store: SliceStore, context: LocalContext
) -> None:
    probe, _ = make_probe(store, Pixels(), context, every=every, train_slices=1, val_slices=1)
    assert [step for step in (0, 10, 20, 30, 40, 100) if probe.measure(step)] == looked
    assert sorted(context.pictures) == [f"probe/step_{step:06d}.png" for step in looked]
    assert [step for step, metrics in context.metrics if "probe/seconds" in metrics] == looked


def test_without_labels_only_the_features_are_looked_at(
    tmp_path: Path, make_scans: Callable[..., Path], context: LocalContext, capsys: pytest.CaptureFixture[str]
) -> None:
    source = DataSource(
        root=make_scans(tmp_path / "scans", cases=2) / "imagesTr", layout="folders", modality="MR"
    )
    prepare(PrepareConfig(name="unlabelled", out=tmp_path / "store", data=source, workers=1))
    bare = SliceStore(tmp_path / "store")
    slices = UnlabelledSlices(bare, rows_of(bare, ["pool"]), SIZE, WHOLE)
    optim = PretrainFitConfig(steps=100, warmup_steps=1)
    probe = Probe(bare, Pixels(), slices, Recorded(bare), ProbeConfig(), optim, context)
    assert "no probe/dice, as no patient in the split train has labels" in capsys.readouterr().out
    assert set(probe.measure(0)) == {"features/effective_rank", "features/std"}
    assert not context.pictures


def pretrained(
    store: SliceStore, out: Path, context: LocalContext, probe: ProbeConfig, steps: int = 4
) -> dict:
    config = PretrainConfig(
        out=out,
        data=PretrainDataConfig(store=Path(store.root)),
        model=ModelConfig(variant="micro", image_size=SIZE),
        mae=MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2),
        optim=PretrainFitConfig(steps=4, batch_size=4, warmup_steps=1, validate_every=2, log_every=1),
        probe=probe,
    )
    return pretrain(config, context)


class Interrupted(LocalContext):
    """Stops the run once the state of its second validation is kept."""

    def save(self, state: dict, metrics: dict[str, float]) -> None:
        super().save(state, metrics)
        if state["progress"]["step"] == 2:
            raise KeyboardInterrupt


def test_a_run_with_a_probe_shows_it_and_resumes_to_the_same(
    store: SliceStore, tmp_path: Path, context: LocalContext
) -> None:
    small = ProbeConfig(train_slices=6, val_slices=6)
    undisturbed = pretrained(store, tmp_path, context, small)
    pictures = [name for name in context.pictures if name.startswith("probe/")]
    assert pictures == [f"probe/step_{step:06d}.png" for step in (0, 2, 4)]
    assert context.pictures[pictures[-1]].shape == (4 * 196, 3 * 196, 3)
    history = undisturbed["progress"]["history"]
    assert [step for step, name, _ in history if name == "probe/dice"] == [0, 2, 4]

    with pytest.raises(KeyboardInterrupt):
        pretrained(store, tmp_path, Interrupted(tmp_path), small)
    resumed = pretrained(store, tmp_path, LocalContext(tmp_path), small)
    assert resumed["progress"]["history"] == history
    assert_equal_weights(resumed, undisturbed)


def test_the_probe_changes_nothing_of_the_run(
    store: SliceStore, tmp_path: Path, context: LocalContext
) -> None:
    with_probe = pretrained(store, tmp_path, context, ProbeConfig(train_slices=6, val_slices=6))
    without = pretrained(store, tmp_path, context, ProbeConfig(every=0))
    assert_equal_weights(with_probe, without)
    assert with_probe["progress"]["best_score"] == without["progress"]["best_score"]


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
