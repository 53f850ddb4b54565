"""A bundle says what input its model was fine-tuned on, and is used on the same."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_support import write_tuned

from samssl.bundle import BundleError, load_segmenter, read_bundle
from samssl.data.classes import run_classes
from samssl.data.inputs import InputConfig
from samssl.data.slices import SliceStore
from samssl.evaluate import EvaluateConfig, evaluate
from samssl.models.sam import ModelConfig
from samssl.predict import Predictor
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig

NEIGHBOURS = InputConfig(channels="neighbours", mr="zscore")


@pytest.fixture
def tuned(tmp_path: Path, prepare_boxes: Callable[..., SliceStore]) -> tuple[Path, SliceStore]:
    """A bundle fine-tuned a little on 2.5D input, and its store."""
    store = prepare_boxes(tmp_path, train=2, val=1, test=1)
    config = FinetuneConfig(
        out=tmp_path / "run",
        data=FinetuneDataConfig(store=tmp_path / "store", shots=1, input=NEIGHBOURS),
        model=ModelConfig(variant="micro", image_size=32),
        optim=FinetuneFitConfig(steps=30, batch_size=2, warmup_steps=1, validate_every=30, lr=0.01),
    )
    write_tuned(tmp_path / "bundle", config, store)
    return tmp_path / "bundle", store


def test_a_bundle_is_evaluated_on_the_input_it_was_tuned_on(tuned, tmp_path: Path) -> None:
    path, store = tuned
    assert read_bundle(path).input == NEIGHBOURS
    evaluate(EvaluateConfig(out=tmp_path / "scores", bundle=path, store=tmp_path / "store"))
    (case,) = store.cases("test")
    segmenter = load_segmenter(path)
    own, other = (
        Predictor(segmenter, store, 32, torch.device("cpu"), inputs).segment_case(case)
        for inputs in (NEIGHBOURS, InputConfig(mr="full"))
    )
    import zarr

    kept = np.asarray(zarr.open_array(tmp_path / "scores" / "predictions.zarr" / case, mode="r")[:])
    np.testing.assert_array_equal(kept, own)
    assert (own != other).any()


def test_bundles_of_earlier_formats_are_read(tuned) -> None:
    """Format 1 saw grey slices; in 1 and 2 every label was a class."""
    path, store = tuned
    tree = json.loads((path / "bundle.json").read_text())
    del tree["classes"], tree["overlapping"]
    (path / "bundle.json").write_text(json.dumps({**tree, "format": 2}))
    assert read_bundle(path).input == NEIGHBOURS
    assert read_bundle(path).run_classes == run_classes(store.labels)
    load_segmenter(path)
    del tree["input"]
    (path / "bundle.json").write_text(json.dumps({**tree, "format": 1, "normalisation": "per case"}))
    assert read_bundle(path).input == InputConfig()
    (path / "bundle.json").write_text(json.dumps({**tree, "format": 4}))
    with pytest.raises(BundleError, match=r"it reads \(1, 2, 3\)"):
        read_bundle(path)
