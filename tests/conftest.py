"""What tests share: a micro SAM whose position terms and biases are not zero, so that they count."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.pseudonyms import KEY_VARIABLE
from samssl.data.slices import SliceStore
from samssl.data.splits import SplitConfig
from samssl.models.sam import build_micro
from samssl.models.tinyvit import TinyViT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Ray first: they wait more than they compute, so that the quick ones fill the rest."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(autouse=True, scope="session")
def key_of_pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tests' own key, in place of that of whoever runs them.

    The same in every session: pseudonyms decide the order and the splits of cases, and so what is trained on.
    """
    path = tmp_path_factory.mktemp("key") / "pseudonyms.key"
    path.write_text("5a" * 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, str(path))
        yield path


@pytest.fixture
def micro_sam() -> Sam:
    torch.manual_seed(0)
    sam = build_micro().eval()
    randomise(sam)
    return sam


@pytest.fixture
def micro_mobile_sam() -> Sam:
    """`micro_sam` with a small TinyViT as its image encoder: patches of 16 instead of 4."""
    torch.manual_seed(0)
    sam = build_micro()
    sam.image_encoder = TinyViT(  # pyright: ignore[reportAttributeAccessIssue]
        embed_dims=(8, 16, 24, 32),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 3, 4),
        windows=(3, 3, 4, 3),
        out_channels=64,
        num_classes=5,
    )
    randomise(sam)
    return sam.eval()


def randomise(model: nn.Module) -> None:
    """Draw what `segment_anything` and timm leave at zero or one, statistics of batch norms included."""
    for name, parameter in model.named_parameters():
        if "pos" in name or name.endswith(("bias", "attention_biases")):
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # pyright: ignore[reportArgumentType]
            nn.init.normal_(module.running_mean, std=0.3)  # pyright: ignore[reportArgumentType]


def write_scans(root: Path, cases: int) -> Path:
    """A small Decathlon-style data set: noisy boxes in boxes."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    names = [f"scan_{number:03}.nii.gz" for number in range(cases)]
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for number, name in enumerate(names):
        generator = np.random.default_rng(number)
        mask = np.zeros((24, 20, 6), np.uint8)
        left, top = generator.integers(3, 9, 2)
        mask[left : left + 8, top : top + 7, 1:5] = 1
        mask[left + 2 : left + 6, top + 2 : top + 5, 2:4] = 2
        image = generator.normal(100 + 80.0 * mask, 10).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), root / "imagesTr" / name)
        nib.save(nib.Nifti1Image(mask, affine), root / "labelsTr" / name)
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture(scope="session")
def make_scans() -> Callable[..., Path]:
    return write_scans


def write_boxes(root: Path, name: str = "boxes", **split: Any) -> SliceStore:
    """The store `root`/store of as many scans of `write_scans` as the splits have patients together."""
    source = DataSource(root=write_scans(root / "scans", cases=int(sum(split.values()))))
    settings = PrepareConfig(
        name=name, out=root / "store", data=source, split=SplitConfig(**split), workers=1
    )
    prepare(settings)
    return SliceStore(root / "store")


@pytest.fixture(scope="session")
def prepare_boxes() -> Callable[..., SliceStore]:
    return write_boxes
