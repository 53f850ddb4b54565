"""What a model sees of a slice: which channels, and which values of them become black and white.

The CPU side reads and clips: values stay in their own units, counted from the lowest value that matters
(the floor), so that padding with zeros is black whatever the units are. Scaling to [0, 1] happens where
the batch is, on the accelerator, by `unit_images`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from samssl.config import PositiveFloat, PositiveInt, UserError, config
from samssl.data.intensity import CaseIntensity, Rule, Window, range_by_rule, window_hu
from samssl.data.resize import fit_square
from samssl.data.slices import Slices, SliceStore


@config
class InputConfig:
    """Channels and intensities; a model is fine-tuned and used on the input that it was pretrained on."""

    channels: Literal["grey", "neighbours", "windows"] = "grey"
    """`grey`: the slice, three times. `neighbours`: the slices z - step, z and z + step. `windows`: the slice
    in the three CT `windows`; other modalities have their one range in all three."""
    step: PositiveInt = 1
    """Slices between a slice and its `neighbours`; at the ends of a volume the last slice stands in."""
    window: Window | None = None
    """CT: soft_tissue, lung, bone, brain, liver, mediastinum or [low, high] in HU; null: that of prepare."""
    windows: tuple[Window, Window, Window] = ("soft_tissue", "lung", "bone")
    """The three CT windows of the channels `windows`."""
    mr: Rule = "percentiles"
    """MR: `percentiles` (0.5 and 99.5, above the background), `zscore`, or `full` from lowest to highest."""
    xr: Rule = "percentiles"
    """Radiographs, likewise."""
    us: Rule = "percentiles"
    """Ultrasound, likewise; `full` keeps the greys that the device showed."""
    pt: Rule = "percentiles"
    """PET, likewise."""
    zscore_clip: PositiveFloat = 3.0
    """Standard deviations around the mean that `zscore` spreads over [0, 1]; values beyond are clipped."""

    @property
    def num_channels(self) -> int:
        """Channels of the images that `unit_images` gives."""
        return 1 if self.channels == "grey" else 3

    def __post_init__(self) -> None:
        for window in (self.window, *self.windows):
            if window is not None and window_hu(window)[0] >= window_hu(window)[1]:
                raise ValueError(f"window {list(window)}: the low end must lie below the high end")


def value_ranges(inputs: InputConfig, values: CaseIntensity) -> Float[np.ndarray, "R 2"]:
    """The values that become 0 and 1, in the units of the scan; one row, or one a channel (windows).

    Raises:
        UserError: the store does not know what the rule needs.
    """
    if values.modality == "CT":
        if inputs.channels == "windows":
            return np.array([window_hu(window) for window in inputs.windows])
        return np.array([window_hu(inputs.window) if inputs.window else (values.low, values.high)])
    rules: dict[str, Rule] = {"MR": inputs.mr, "XR": inputs.xr, "US": inputs.us, "PT": inputs.pt}
    rule = rules[values.modality]
    one = range_by_rule(values, rule, inputs.zscore_clip)
    return np.array([one] * (3 if inputs.channels == "windows" else 1))


def slices_seen(inputs: InputConfig, store: Slices, row: int) -> list[int]:
    """The z indices that are read for a row: the slice, or it and its neighbours, clamped to the volume."""
    z, last = int(store.rows.z[row]), store.rows.num_slices(row) - 1
    if inputs.channels != "neighbours":
        return [z]
    return [max(0, z - inputs.step), z, min(last, z + inputs.step)]


def above_floor(
    planes: Shaped[np.ndarray, "C H W"], ranges: Float[np.ndarray, "R 2"]
) -> Float[Tensor, "C H W"]:
    """Values counted from the lowest end of the ranges and clipped to all of them together.

    Clipping comes before resizing, so that metal and padding values do not smear over what is beside them.
    """
    floor, ceiling = np.float32(ranges.min()), np.float32(ranges.max())
    values = planes.astype(np.float32)
    values -= floor
    return torch.from_numpy(values.clip(0, ceiling - floor, out=values))


def range_above_floor(ranges: Float[np.ndarray, "R 2"]) -> Float[Tensor, "R 2"]:
    """`ranges`, counted as `above_floor` counts."""
    return torch.from_numpy((ranges - ranges.min()).astype(np.float32))


def input_slice(
    store: Slices,
    row: int,
    inputs: InputConfig,
    read: Callable[[str, int], np.ndarray] | None = None,
) -> tuple[Float[Tensor, "C H W"], Float[Tensor, "R 2"]]:
    """One slice in native resolution as `unit_images` takes it: values above the floor, and their ranges.

    `read(case, z)` gives a plane, by default from the store.
    """
    read = read or store.image_slice
    ranges = value_ranges(inputs, store.rows.intensity(row))
    case = store.rows.case_name(row)
    planes = np.stack([read(case, z) for z in slices_seen(inputs, store, row)])
    return above_floor(planes, ranges), range_above_floor(ranges)


def square_images(
    store: Slices, rows: Sequence[int], size: int, inputs: InputConfig, device: torch.device
) -> Float[Tensor, "B C size size"]:
    """Slices of one case on the model's square input, intensities in [0, 1], on `device`."""
    pairs = [input_slice(store, row, inputs) for row in rows]
    images, ranges = (torch.stack(column).to(device) for column in zip(*pairs, strict=True))
    return scaled(fit_square(images, size), ranges)


def unit_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with `image` scaled to [0, 1] and clipped, [B, 1 or 3, S, S], on whatever device it is.

    Takes `image` [B, C, S, S] above the floor, `range` [B, R, 2] and, where views are shaded, `shade`
    [B, 3] (`samssl.data.views`). C and R are 1 or 3. A batch without `range` is in [0, 1] already.
    """
    if "range" not in batch:
        return batch
    images = scaled(batch["image"], batch["range"])
    if "shade" in batch:
        images = shaded(images, batch["shade"])
    rest = {name: value for name, value in batch.items() if name not in ("image", "range", "shade")}
    return {"image": images, **rest}


def scaled(
    images: Float[Tensor, "B C H W"], ranges: Float[Tensor, "B R 2"]
) -> Float[Tensor, "B channels H W"]:
    """Values to [0, 1] by each range; one image in three ranges becomes three channels."""
    low, high = ranges[..., None, None].unbind(2)
    return ((images - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def shaded(images: Float[Tensor, "B C H W"], shade: Float[Tensor, "B 3"]) -> Float[Tensor, "B C H W"]:
    """Gamma, then contrast about the mean, then brightness, each given by its factor or exponent."""
    brightness, contrast, gamma = shade[:, :, None, None, None].unbind(1)
    images = images**gamma
    centre = images.mean(dim=(1, 2, 3), keepdim=True)
    return (brightness * (centre + contrast * (images - centre))).clamp(0, 1)


def check_input(inputs: InputConfig, *stores: SliceStore) -> None:
    """Refuse settings that have no effect on these stores.

    Raises:
        UserError: CT windows are asked for where nothing is CT.
    """
    modalities = {modality for store in stores for modality in store.rows.modalities()}
    if "CT" not in modalities and (inputs.channels == "windows" or inputs.window):
        raise UserError(
            f"data.input asks for CT windows, but {stores[0].root} holds {', '.join(sorted(modalities))}. "
            "Take channels grey or neighbours, and no window."
        )
