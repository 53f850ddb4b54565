import pandas as pd
import pytest

from samssl.metrics import pooled_dice
from samssl.train.alarms import is_looked_at, loss_alarms, prompt_alarms, sound, validation_alarms
from samssl.train.context import LocalContext
from samssl.train.optim import FitConfig
from samssl.train.progress import Progress

CONFIG = FitConfig(steps=100, warmup_steps=10, validate_every=10)


def table(*rows: tuple[str, float, int, int]) -> pd.DataFrame:
    """Rows of label, dice, reference and predicted voxels; each a case of its own."""
    frame = pd.DataFrame(rows, columns=["label", "dice", "reference_voxels", "predicted_voxels"])
    return frame.assign(case=[str(number) for number in range(len(frame))])


def after(losses: list[float], step: int = 50) -> Progress:
    history = [(number, "train/loss", loss) for number, loss in enumerate(losses)]
    return Progress(step=step, history=history)


def test_empty_predictions() -> None:
    alarms = validation_alarms(table(("liver", 0.0, 9, 0), ("tumour", float("nan"), 0, 0)), None)
    assert alarms.keys() == {"predictions_empty"}
    assert "is empty" in alarms["predictions_empty"]


def test_a_class_that_is_never_predicted_is_named_unless_the_reference_lacks_it() -> None:
    found = table(
        ("liver", 0.5, 9, 9), ("tumour", 0.0, 4, 0), ("tumour", 0.0, 2, 0), ("cyst", float("nan"), 0, 0)
    )
    assert "predicted as tumour." in validation_alarms(found, None)["never_predicted"]
    assert not validation_alarms(table(("liver", 0.5, 9, 9), ("liver", 0.0, 9, 0)), None)
    many = table(("liver", 0.5, 9, 9), *((f"organ {n}", 0.0, 1, 0) for n in range(10)))
    assert "organ 7 and 2 more" in validation_alarms(many, None)["never_predicted"]


def answers(*rows: tuple[int, float, int]) -> pd.DataFrame:
    """Clicks, Dice and predicted voxels of one case, after a box that fits."""
    scored = table(*(("liver", dice, 9, voxels) for _, dice, voxels in rows), ("liver", 1.0, 9, 9))
    prompts = ["clicks"] * len(rows) + ["box"]
    return scored.assign(case="a", prompt=prompts, clicks=[*(clicks for clicks, *_ in rows), 0])


def test_answers_to_prompts_that_are_empty_or_get_worse_by_clicks() -> None:
    assert prompt_alarms(answers((1, 0.0, 0), (2, 0.0, 0))).keys() == {"predictions_empty"}
    assert prompt_alarms(answers((1, 0.5, 4), (2, 0.4, 3))).keys() == {"clicks_do_not_help"}
    assert not prompt_alarms(answers((1, 0.5, 4), (2, 0.6, 5)))


def test_validation_far_below_training() -> None:
    validation, training = table(("liver", 0.5, 10, 10)), table(("liver", 0.9, 10, 10))
    assert (
        "0.900 on training slices but 0.500"
        in (validation_alarms(validation, training)["validation_below_training"])
    )
    assert not validation_alarms(validation, table(("liver", 0.7, 10, 10)))
    assert not validation_alarms(training, validation)


def test_pooled_dice_does_not_depend_on_how_voxels_are_shared_out_over_cases() -> None:
    one = table(("liver", 2 * 6 / 20, 10, 10), ("tumour", 0.0, 5, 0), ("cyst", float("nan"), 0, 3))
    two = table(
        ("liver", 2 * 5 / 12, 6, 6),
        ("liver", 2 * 1 / 6, 4, 2),
        ("liver", float("nan"), 0, 2),
        ("tumour", 0.0, 5, 0),
        ("cyst", float("nan"), 0, 3),
    )
    assert [pooled_dice(one), pooled_dice(two)] == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("losses", [[1.0] * 20, [1.0, 1.2] * 10, [1.0 - 0.0005 * n for n in range(20)]])
def test_a_flat_or_rising_loss(losses: list[float]) -> None:
    assert "does not fall" in loss_alarms(after(losses), CONFIG)["loss_flat"]


def test_a_falling_loss_a_short_history_and_the_warm_up_are_no_alarm() -> None:
    assert not loss_alarms(after([1.0 - 0.02 * n for n in range(20)]), CONFIG)
    assert not loss_alarms(after([1.0] * 7), CONFIG)
    assert not loss_alarms(after([1.0] * 20, step=10), CONFIG)


def test_each_alarm_is_told_once_by_rank_0_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    progress, context = Progress(step=3), LocalContext()
    sound(progress, {"a": "first."}, context)
    sound(progress, {"a": "again.", "b": "second."}, context)
    other = LocalContext()
    other.rank = 1
    sound(Progress(), {"a": "unheard."}, other)
    assert capsys.readouterr().out == "ALARM at step 3: first.\nALARM at step 3: second.\n"
    assert progress.history == [(3, "alarm/a", 1.0), (3, "alarm/b", 1.0)]
    assert context.metrics == [(3, {"alarm/a": 1.0}), (3, {"alarm/b": 1.0})]


def test_training_slices_are_looked_at_ever_more_rarely_and_at_the_end() -> None:
    assert [step for step in range(10, 101, 10) if is_looked_at(step, CONFIG)] == [10, 20, 40, 80, 100]
