"""The table of trials, of Tune's own trials."""

from ray.tune.experiment import Trial

from samssl.cluster.live import TrialTable


def test_a_trial_counts_as_over_before_tune_marks_it_and_after_a_restart() -> None:
    trials = [Trial("train", config={"number": number}, stub=True) for number in range(3)]
    table = TrialTable("trials", 3, lambda config: str(config["number"]))
    trials[0].set_status(Trial.RUNNING)
    table.on_trial_start(0, trials, trials[0])
    assert table._count().startswith("0 of 3 done")
    table.on_trial_complete(1, trials, trials[0])  # Tune still says that it runs
    assert table._count().startswith("1 of 3 done")
    assert table._row(trials[0])[:2] == ("0", "done")
    trials[0].set_status(Trial.TERMINATED)
    trials[1].set_status(Trial.ERROR)
    table.on_trial_error(2, trials, trials[1])
    assert table._row(trials[1])[1] == "lost"
    assert table._row(trials[2])[1] == "waits"
    again = TrialTable("trials", 3, lambda config: str(config["number"]))
    again.on_trial_start(0, trials, trials[2])
    assert again._count().startswith("2 of 3 done")
