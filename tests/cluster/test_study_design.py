"""What a study consists of."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from samssl.cluster.study_design import (
    StudyConfig,
    alone,
    arms_of,
    expansive_of,
    finetune_of,
    pretrain_of,
    settings_of,
)
from samssl.config import ConfigError, UserError, load_config

Make = Callable[..., StudyConfig]
TWO_SETS = {
    "datasets": {
        "heart": {"prepare": {"data": {"root": "/scans/heart"}}},
        "lung": {"prepare": {"data": {"root": "/scans/lung"}}, "finetune": {"data.augment.flip": 0.5}},
    }
}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def study(**changes: Any) -> StudyConfig:
        tree = {
            "name": "s",
            "out": str(tmp_path / "s"),
            "model": {"variant": "micro", "image_size": 32},
        } | changes
        tree = {"pretrain": {}, "finetune": {"data": {"shots": 5}}} | tree
        if "datasets" not in tree:
            tree["prepare"] = {"data": {"root": "/scans"}}
        return load_config(StudyConfig, None, deepcopy(tree))

    return study


def test_one_set_lies_directly_below_the_study(make: Make) -> None:
    config = make()
    (setting,) = settings_of(config)
    assert (setting.folder, setting.home) == (config.out, config.out)
    tuned = finetune_of(config, setting, "ssl", 0)
    assert tuned.out == config.out / "arms/ssl/seed0/finetune"
    assert tuned.model.checkpoint == config.out / "pretrain/seed0"
    assert finetune_of(config, setting, "no_ssl", 0).model.checkpoint is None


def test_sets_folds_and_shots_are_crossed(make: Make) -> None:
    config = make(**TWO_SETS, folds=2, shots=[1, 5])
    settings = settings_of(config)
    assert len(settings) == len({setting.folder for setting in settings}) == 8
    assert len({setting.home for setting in settings}) == 4
    assert [setting.prepare.split.fold for setting in settings[:4]] == [0, 0, 1, 1]
    assert settings[1].folder == config.out / "heart/fold0/5-shot"
    assert settings[1].prepare.out == config.out / "heart/fold0/store"


def test_arms_share_shots_seeds_and_all_but_what_they_set(make: Make) -> None:
    rank = {"init": "base", "set": {"strategy.lora.rank": 16}}
    config = make(arms={"rank16": rank, "plain": {}}, seeds=[0, 3])
    (setting,) = settings_of(config)
    one, other = (finetune_of(config, setting, name, 3) for name in ("rank16", "plain"))
    assert one.strategy.lora.rank == 16
    assert (one.data, one.optim, one.model) == (other.data, other.optim, other.model)
    assert (one.data.shot_seed, one.optim.seed, one.model.init_seed) == (3, 3, 3)


def test_crossed_arms_have_every_combination_and_names_for_folders(make: Make) -> None:
    names = ["micro/decoder/lora", "micro/encoder_decoder/vanilla"]
    config = make(arms={}, cross=[{"strategy.name": names, "init": ["base", "ssl"]}])
    assert list(arms_of(config)) == [
        "micro-decoder-lora-base",
        "micro-decoder-lora-ssl",
        "micro-encoder_decoder-vanilla-base",
        "micro-encoder_decoder-vanilla-ssl",
    ]
    tuned = finetune_of(config, settings_of(config)[0], "micro-decoder-lora-ssl", 0)
    assert (tuned.strategy.scope, tuned.strategy.method) == ("decoder", "lora")


def test_another_backbone_is_pretrained_in_a_folder_of_its_own(make: Make) -> None:
    arm = {"init": "ssl", "set": {"strategy.name": "vit_b/decoder/lora", "model.image_size": 64}}
    config = make(arms={"ssl": {"init": "ssl"}, "large": arm})
    (setting,) = settings_of(config)
    pretrain = pretrain_of(config, setting, arms_of(config)["large"], 0)
    assert pretrain.out == config.out / "pretrain-vit_b/seed0"
    assert (pretrain.model.variant, pretrain.model.image_size) == ("vit_b", 64)
    assert finetune_of(config, setting, "large", 0).model.checkpoint == pretrain.out


def test_expansive_training_never_sees_the_set_it_is_compared_on(make: Make) -> None:
    config = make(
        **TWO_SETS, arms={"expansive": {"init": "expansive"}}, expansive={"mode": "promptable", "data": {}}
    )
    heart, lung = settings_of(config)
    arm = arms_of(config)["expansive"]
    assert expansive_of(config, heart, arm, 0).data.store == lung.store
    assert expansive_of(config, lung, arm, 0).data.store == heart.store
    assert finetune_of(config, heart, "expansive", 0).model.checkpoint == heart.home / "expansive/seed0"


def test_one_setting_alone_is_a_study_of_its_own(make: Make) -> None:
    config = make(**TWO_SETS, shots=[1, 5])
    lung = settings_of(config)[2]
    single = alone(config, lung)
    (setting,) = settings_of(single)
    assert single.out == lung.folder == config.out / "lung/1-shot"
    assert single.finetune.data.augment.flip == 0.5
    assert (setting.shots, setting.prepare.data.root) == (1, Path("/scans/lung"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {"set": {"strategy.lora.rnak": 4}}}}, "the nearest is 'strategy.lora.rank'"),
        ({"arms": {"a": {"init": "expansive"}}}, "at least two"),
        ({"arms": {"a/b": {}}}, "names a folder"),
        ({"arms": {"a": {"set": {"strategy.name": "vit_b/lora"}}}}, "is no strategy"),
        ({**TWO_SETS, "prepare": {"data": {"root": "/x"}}}, "give `prepare`"),
    ],
)
def test_a_design_that_cannot_be_run_is_refused_before_it_starts(
    make: Make, changes: Any, message: str
) -> None:
    with pytest.raises((ConfigError, UserError), match=message):
        make(**changes)


def test_sets_of_a_recipe_are_filled_in(make: Make) -> None:
    config = make(datasets={"lung": {"prepare": {"data": {"root": "/scans", "recipe": "msd_lung"}}}})
    assert config.datasets["lung"].prepare.data.window_hu == (-1350, 150)
