"""What a run starts from: published names, runs of ours, official MAE checkpoints."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official_vit import OfficialViT
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from samssl.config import build_config, load_config, parse_overrides
from samssl.models.checkpoints import CheckpointError, save_tensors, save_weights, weights_digest
from samssl.models.decoder import AutomaticSam
from samssl.models.initial import FOLDER_VARIABLE, NORMALISATION_KEY, fit_to
from samssl.models.official_mae import resize_kernel
from samssl.models.sam import ModelConfig, build_sam, check_checkpoint, normalise, resolve


def micro(checkpoint: object = None, **settings: object) -> ModelConfig:
    tree = {"variant": "micro", "image_size": 64, "checkpoint": checkpoint, **settings}
    return build_config(ModelConfig, tree, source="a test")


def save_official(path: Path, model: OfficialViT) -> Path:
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def mae_file(tmp_path: Path) -> tuple[Path, OfficialViT]:
    torch.manual_seed(0)
    model = OfficialViT()
    return save_official(tmp_path / "mae.pth", model), model


@pytest.mark.parametrize(
    ("name", "variant", "file"),
    [
        ("sam", "vit_b", "sam_vit_b_01ec64.pth"),
        ("sam", "vit_h", "sam_vit_h_4b8939.pth"),
        ("medsam", "vit_b", "medsam_vit_b.pth"),
        ("mae", "vit_l", "mae_pretrain_vit_large.pth"),
    ],
)
def test_a_name_is_the_published_file_of_the_variant(
    name: str, variant: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    model = load_config(ModelConfig, None, parse_overrides([f"variant={variant}", f"checkpoint={name}"]))
    with pytest.raises(CheckpointError, match=f"checkpoints/{file}.*github.com"):
        resolve(model)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / file).touch()
    assert resolve(model).checkpoint == tmp_path / "checkpoints" / file
    assert resolve(model).normalisation == ("unit" if name == "medsam" else "sam")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match=f"elsewhere/{file}"):
        resolve(model)


def test_a_size_that_was_never_published_is_refused() -> None:
    with pytest.raises(CheckpointError, match="`medsam` was published for vit_b, not for micro"):
        check_checkpoint(micro("medsam"))


def test_random_is_no_checkpoint() -> None:
    digests = [weights_digest(build_sam(micro(name)).state_dict()) for name in (None, "random")]
    assert digests[0] == digests[1]
    report = check_checkpoint(micro("random", init_seed=7))
    assert "init_seed 7" in report.text()
    assert not report.loaded
    assert set(report.new) == set(build_sam(micro()).state_dict())


def test_an_official_mae_checkpoint_becomes_the_trunk(mae_file: tuple[Path, OfficialViT]) -> None:
    path, official = mae_file
    sam, fresh = build_sam(micro(str(path))), build_sam(micro())
    encoder = sam.image_encoder
    tokens = torch.randn(2, 16, 16, 128)
    for block, theirs in zip(encoder.blocks, official.blocks, strict=True):
        for part in ("norm1", "norm2", "mlp"):
            own, other = block.get_submodule(part), theirs.get_submodule(part)
            assert torch.equal(own(tokens), other(tokens))
        attention = block.get_submodule("attn")
        attention.__dict__["use_rel_pos"] = False
        flat = attention(tokens).flatten(1, 2)
        assert torch.allclose(flat, theirs.get_submodule("attn")(tokens.flatten(1, 2)), atol=1e-5)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(encoder.patch_embed.proj(images), official.patch_embed.proj(images))
    for part in (encoder.neck, sam.prompt_encoder, sam.mask_decoder):  # new: as drawn from the same seed
        assert weights_digest(part.state_dict()) == weights_digest(
            dict(fresh.get_submodule(_path(sam, part)).state_dict())
        )
    rel_pos = "image_encoder.blocks.1.attn.rel_pos_h"
    assert torch.equal(sam.state_dict()[rel_pos], fresh.state_dict()[rel_pos])
    assert sam.state_dict()[rel_pos].abs().max() > 0


def _path(sam: Sam, part: torch.nn.Module) -> str:
    return next(name for name, module in sam.named_modules() if module is part)


def test_positions_are_interpolated_without_the_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    official = OfficialViT()
    with torch.no_grad():  # a plane over the grid stays one, and the class token's value never shows
        rows = torch.arange(14.0).repeat_interleave(14) / 14
        official.pos_embed.copy_(torch.cat([torch.tensor([1e6]), rows])[None, :, None].expand(1, -1, 128))
    positions = build_sam(micro(str(save_official(tmp_path / "mae.pth", official)))).image_encoder.pos_embed
    assert positions is not None
    middle = positions[0, 4:12, :, 0]
    expected = ((torch.arange(16.0) + 0.5) / 16 * 14 - 0.5)[4:12, None] / 14
    assert torch.allclose(
        middle, expected.expand(-1, 16), atol=5e-3
    )  # cubic convolution bends lines a little
    assert positions.max() < 2


def test_every_tensor_is_accounted_for(mae_file: tuple[Path, OfficialViT]) -> None:
    path, official = mae_file
    report = check_checkpoint(micro(str(path)))
    own = set(build_sam(micro()).state_dict())
    groups = [set(group) for group in (report.loaded, report.interpolated, report.new)]
    assert set.union(*groups) == own
    assert sum(len(group) for group in groups) == len(own)
    assert report.interpolated == ("image_encoder.pos_embed",)
    assert set(report.ignored) == {"cls_token", "norm.weight", "norm.bias"}
    assert len(report.loaded) + len(report.ignored) + 1 == len(official.state_dict())
    text = report.text()
    assert "official MAE" in text
    assert "image_encoder.blocks.*.attn.rel_pos_h (4)" in text
    assert "image_encoder.neck (6)" in text
    assert "image_encoder.neck.0.weight" in report.full_text()


def test_a_full_mae_checkpoint_loads_and_its_decoder_is_ignored(
    mae_file: tuple[Path, OfficialViT], tmp_path: Path
) -> None:
    weights = mae_file[1].state_dict() | {
        "mask_token": torch.zeros(1, 1, 64),
        "decoder_blocks.0.mlp.fc1.weight": torch.zeros(256, 64),
    }
    torch.save({"model": weights, "epoch": 3}, tmp_path / "full.pth")
    report = check_checkpoint(micro(str(tmp_path / "full.pth")))
    assert {"mask_token", "decoder_blocks.0.mlp.fc1.weight"} < set(report.ignored)


def test_mae_checkpoints_of_other_sizes_are_refused(tmp_path: Path) -> None:
    deep = save_official(tmp_path / "deep.pth", OfficialViT(depth=5))
    with pytest.raises(CheckpointError, match=r"unexpected .*image_encoder\.blocks\.4\."):
        build_sam(micro(str(deep)))
    short = OfficialViT().state_dict()
    del short["blocks.2.attn.qkv.bias"]
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"missing \(1\): image_encoder\.blocks\.2\.attn\.qkv\.bias"):
        build_sam(micro(str(tmp_path / "short.pth")))
    wide = save_official(tmp_path / "wide.pth", OfficialViT(width=768, depth=1, heads=12))
    with pytest.raises(CheckpointError, match="as wide as vit_b"):
        check_checkpoint(micro(str(wide)))


@pytest.mark.parametrize(("variant", "width", "depth", "patch", "grid"), [("vit_b", 768, 12, 16, 14)])
def test_official_shapes_fit_the_published_sizes(
    variant: str, width: int, depth: int, patch: int, grid: int
) -> None:
    with torch.device("meta"):
        sam = sam_model_registry[variant]()
        shapes = OfficialViT(width, depth, 12, patch, grid).state_dict()
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in shapes.items()}
    fitted, report = fit_to(sam, weights, Path("mae_pretrain_vit_base.pth"))
    assert fitted["image_encoder.pos_embed"].shape == (1, 64, 64, 768)
    assert len(report.loaded) == 12 * 12 + 2
    assert len([name for name in report.new if "rel_pos" in name]) == 24


def test_a_kernel_of_another_patch_embeds_enlarged_patches_as_before() -> None:
    """ViT-H/14: 14 px patches under SAM's 16 px."""
    kernel = torch.randn(8, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    patches = torch.rand(5, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    enlarged = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    before, after = F.conv2d(patches, kernel), F.conv2d(enlarged, resize_kernel(kernel, 16))
    assert torch.allclose(before, after, atol=1e-3)
    assert torch.equal(resize_kernel(kernel, 14).round(decimals=4), kernel.round(decimals=4))


def test_a_14_px_mae_checkpoint_says_that_its_kernel_was_resampled(tmp_path: Path) -> None:
    path = save_official(tmp_path / "mae.pth", OfficialViT(patch=3, grid=16))
    report = check_checkpoint(micro(str(path)))
    assert report.interpolated == ("image_encoder.pos_embed", "image_encoder.patch_embed.proj.weight")
    assert build_sam(micro(str(path))).image_encoder.patch_embed.proj.weight.shape == (128, 3, 4, 4)


def run_folder(folder: Path, sam: Sam, normalisation: str) -> Path:
    folder.mkdir()
    save_weights(sam, folder / "encoder.pth")
    (folder / "config.yaml").write_text(f"model: {{variant: micro, normalisation: {normalisation}}}\n")
    return folder


def test_a_run_hands_on_its_weights_and_its_normalisation(micro_sam: Sam, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", micro_sam, "unit")
    for checkpoint in (run, run / "encoder.pth"):
        sam = build_sam(micro(str(checkpoint)))
        assert weights_digest(sam.state_dict()) == weights_digest(micro_sam.state_dict())
        assert resolve(micro(str(checkpoint))).normalisation == "unit"
        assert "(run of samssl)" in check_checkpoint(micro(str(checkpoint))).text()
    save_tensors(micro_sam.state_dict(), tmp_path / "sam.safetensors", {NORMALISATION_KEY: "unit"})
    assert resolve(micro(str(tmp_path / "sam.safetensors"))).normalisation == "unit"
    assert resolve(micro(str(run), normalisation="sam")).normalisation == "sam"
    with pytest.raises(CheckpointError, match="no finished pretrain run"):
        resolve(micro(str(tmp_path)))


def test_an_own_run_is_matched_strictly(micro_sam: Sam, tmp_path: Path) -> None:
    weights = dict(micro_sam.state_dict())
    del weights["image_encoder.neck.0.weight"]
    run = run_folder(tmp_path / "run", micro_sam, "sam")
    torch.save(weights, run / "encoder.pth")
    with pytest.raises(CheckpointError, match=r"missing \(1\): image_encoder\.neck\.0\.weight"):
        build_sam(micro(str(run)))


def test_unit_leaves_intensities_and_sam_shifts_them(micro_sam: Sam) -> None:
    images = torch.rand(2, 1, 64, 64)
    unit = build_sam(micro(normalisation="unit"))
    assert torch.equal(normalise(images, unit.image_encoder), images.expand(-1, 3, -1, -1))
    for sam in (build_sam(micro()), micro_sam):
        expected = sam.preprocess(images.expand(-1, 3, -1, -1) * 255)
        assert torch.allclose(normalise(images, sam.image_encoder), expected, atol=1e-5)


@torch.no_grad()
def test_a_segmenter_sees_its_images_as_its_weights_expect() -> None:
    """The same weights under the other normalisation give other logits; matched by hand, the same."""
    images = torch.rand(1, 1, 64, 64)

    def logits(normalisation: str, given: Tensor) -> Tensor:
        sam = build_sam(micro(normalisation=normalisation))
        torch.manual_seed(0)
        return AutomaticSam(sam, 2).eval()(given)

    unit, shifted = logits("unit", images), logits("sam", images)
    assert not torch.allclose(unit, shifted, atol=1e-3)
    by_hand = normalise(images, build_sam(micro()).image_encoder)
    assert torch.allclose(logits("unit", by_hand), shifted, atol=1e-5)
