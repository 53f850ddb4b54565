from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samssl.config import UserError
from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.methods.mae import MaeConfig
from samssl.models.sam import ModelConfig
from samssl.train.context import LocalContext
from samssl.train.pretrain import (
    PretrainConfig,
    PretrainDataConfig,
    PretrainFitConfig,
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


def test_one_patient_alone_is_refused(tmp_path: Path, make_scans: Callable[..., Path]) -> None:
    store = unlabelled_store(tmp_path, make_scans(tmp_path / "scans", cases=1))
    with pytest.raises(UserError, match="has one patient"):
        pretraining_rows(store, PretrainDataConfig(store=tmp_path / "store"))


def test_a_ratio_that_hides_nothing_of_a_window_is_refused(micro_sam) -> None:
    from samssl.methods.mae import MaskedAutoencoder

    with pytest.raises(UserError, match=r"mask_ratio 0\.01 hides none or all"):
        MaskedAutoencoder(micro_sam.image_encoder, MaeConfig(mask_ratio=0.01))
