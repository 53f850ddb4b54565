from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samssl.config import ConfigError, UserError, build_config
from samssl.data.inputs import InputConfig
from samssl.data.mixture import BalanceConfig
from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.data.views import CropConfig
from samssl.masking import MaskingConfig
from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.models.sam import ModelConfig
from samssl.train.context import LocalContext
from samssl.train.pretrain import (
    PretrainConfig,
    PretrainDataConfig,
    PretrainFitConfig,
    mixed_order,
    pooled_slices,
    pretrain,
    pretrained_sam,
    pretraining_rows,
)


def unlabelled_store(root: Path, scans: Path) -> SliceStore:
    source = DataSource(root=scans / "imagesTr", layout="folders", modality="MR")
    prepare(PrepareConfig(name="unlabelled", out=root / "store", data=source, workers=1))
    return SliceStore(root / "store")


def test_unlabelled_scans_alone_are_enough(tmp_path: Path, make_scans: Callable[..., Path]) -> None:
    store = unlabelled_store(tmp_path, make_scans(tmp_path / "scans", cases=4))
    data = PretrainDataConfig(store=tmp_path / "store")
    rows, held_out = pretraining_rows(store, data)
    learnt, checked = ({store.rows.case_name(row) for row in part} for part in (rows, held_out))
    assert (len(learnt), len(checked)) == (3, 1)
    assert not learnt & checked

    config = PretrainConfig(
        out=tmp_path / "run",
        data=data,
        model=ModelConfig(variant="micro", image_size=32),
        mae=MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2),
        optim=PretrainFitConfig(steps=2, batch_size=4, warmup_steps=1, validate_every=2, log_every=1),
    )
    context = LocalContext()
    context.device = torch.device("cpu")
    state = pretrain(config, context)
    before, after = pretrained_sam(config, {"weights": {}}), pretrained_sam(config, state)
    changed = {
        name
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed
    assert all(name.startswith("image_encoder.") and ".neck." not in name for name in changed)
    assert sorted(context.pictures) == ["reconstructions/step_000000.png", "reconstructions/step_000002.png"]


def test_mobile_sam_is_pretrained_with_simmim_and_its_statistics_are_exported(
    tmp_path: Path, make_scans: Callable[..., Path]
) -> None:
    unlabelled_store(tmp_path, make_scans(tmp_path / "scans", cases=3))
    settings = {"out": tmp_path / "run", "data": {"store": tmp_path / "store"}}
    settings["model"] = {"variant": "vit_t", "image_size": 32}
    settings["optim"] = {"steps": 1, "batch_size": 2, "warmup_steps": 1, "log_every": 1}
    with pytest.raises(ConfigError, match="set method=simmim"):
        build_config(PretrainConfig, settings, source="test")
    config = build_config(PretrainConfig, {**settings, "method": "simmim"}, source="test")
    context = LocalContext()
    context.device = torch.device("cpu")
    after = pretrained_sam(config, pretrain(config, context)).state_dict()
    before = pretrained_sam(config, {"weights": {}}).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "image_encoder.layers.3.blocks.1.local_conv.bn.running_mean" in changed
    assert "image_encoder.layers.3.blocks.1.attn.qkv.weight" in changed
    assert not any("neck" in name or "head" in name or "decoder" in name for name in changed)


def test_one_patient_alone_is_refused(tmp_path: Path, make_scans: Callable[..., Path]) -> None:
    store = unlabelled_store(tmp_path, make_scans(tmp_path / "scans", cases=1))
    with pytest.raises(UserError, match="has one patient"):
        pretraining_rows(store, PretrainDataConfig(store=tmp_path / "store"))


def test_a_ratio_that_hides_nothing_of_a_window_is_refused(micro_sam) -> None:
    with pytest.raises(UserError, match=r"ratio 0\.01 hides none or all"):
        MaskedAutoencoder(
            micro_sam.image_encoder, MaeConfig(), image_size=64, masking=MaskingConfig(ratio=0.01)
        )


def test_two_stores_of_two_modalities_are_pretrained_on_together(
    tmp_path: Path, make_scans: Callable[..., Path]
) -> None:
    scans = make_scans(tmp_path / "scans", cases=6)
    unlabelled_store(tmp_path, scans)
    few = DataSource(root=scans / "imagesTs", layout="folders", modality="CT", window_hu=(0.0, 300.0))
    few.root.mkdir()
    for number in (0, 1):
        (scans / f"imagesTr/scan_{number:03}.nii.gz").rename(few.root / f"scan_{number:03}.nii.gz")
    prepare(PrepareConfig(name="few", out=tmp_path / "few", data=few, workers=1))
    data = PretrainDataConfig(
        store=tmp_path / "store",
        more_stores=(tmp_path / "few",),
        input=InputConfig(channels="neighbours", window=(50.0, 250.0), mr="zscore"),
        balance=BalanceConfig(temperature=100.0),
        crop=CropConfig(kind="native", intensity=0.1, gamma=0.1, degrees=5.0),
    )
    config = PretrainConfig(
        out=tmp_path / "run",
        data=data,
        model=ModelConfig(variant="micro", image_size=32),
        mae=MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2),
        optim=PretrainFitConfig(steps=2, batch_size=4, warmup_steps=1, validate_every=2, log_every=1),
    )
    context = LocalContext()
    context.device = torch.device("cpu")
    losses = [
        value for _, name, value in pretrain(config, context)["progress"]["history"] if name == "train/loss"
    ]
    assert len(losses) == 2
    stores = [SliceStore(root) for root in (tmp_path / "store", tmp_path / "few")]
    slices, _ = pooled_slices(stores, data, 32)
    order = mixed_order(slices, data.balance)
    assert order is not None
    assert len(slices.parts[1]) < len(slices.parts[0]) / 3
    assert abs(order.quotas[0] - order.quotas[1]) <= 1
    assert mixed_order(slices, BalanceConfig(by="split")) is None
