"""Learning rates: the values of each schedule, which a resumed run goes on with."""

import math
from pathlib import Path

import pytest

from launch.rates import OptimizerConfig
from launch.tables import dump
from tests.support.pretrain import TINY, records_of, refusal, run_until, tiny


def rates(steps: int, **settings: object) -> list[float]:
    optimizer = OptimizerConfig(lr=1.0, warmup=2, **settings)
    return [optimizer.lr_at(step, steps) for step in range(steps)]


def test_the_decay_of_wsd_is_one_minus_the_root_of_its_progress() -> None:
    """The last 5 of 20 steps, the first of which still has the full rate; by hand."""
    left = [1 - math.sqrt(step / 4) for step in range(5)]
    assert rates(20, schedule="wsd", decay=0.25, final_lr=0.0) == pytest.approx([0.5, 1.0, *[1.0] * 13, *left])
    assert rates(20, schedule="wsd", decay=0.25, final_lr=0.5)[-2:] == pytest.approx([0.5 + 0.5 * left[-2], 0.5])
    assert left[1] == 0.5 and left[-1] == 0.0


def test_the_other_schedules() -> None:
    assert rates(10, schedule="wsd", decay=0.5, shape="linear", final_lr=0.0)[4:] == [1, 1, 0.75, 0.5, 0.25, 0]
    assert rates(6, schedule="constant") == [0.5, 1, 1, 1, 1, 1]
    cosine = rates(7, schedule="cosine", final_lr=0.2)
    assert (
        cosine
        == rates(7, final_lr=0.2)
        == pytest.approx([0.5, 1, 1, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.4 + 0.2 - 0.4 * 0.5**0.5, 0.2])
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_short_runs_have_rates(schedule: str, steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(steps, schedule=schedule))


def test_a_resumed_run_goes_on_with_its_rates_and_more_steps_move_the_decay(text: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-2, warmup=2, schedule="wsd", decay=0.5)
    config, run = tiny(text, optimizer=optimizer), tmp_path / "run"
    run_until(0, 1, config, run, False, 3)
    run_until(0, 1, config, run, True, -1)
    assert [record["lr"] for record in records_of(run)] == [optimizer.lr_at(step, 6) for step in range(6)]
    assert [optimizer.lr_at(step, 6) for step in (2, 3)] == [1e-2, 1e-2] and optimizer.lr_at(3, 12) == 1e-2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ('schedule = "wds"', "unknown optimizer.schedule 'wds' (did you mean 'wsd'?)"),
        ('schedule = "wsd"\nshape = "cubic"', "unknown optimizer.shape 'cubic'; known: sqrt, linear"),
        ('schedule = "wsd"\ndecay = 0', "optimizer.decay is 0.0; it must be a finite number, above 0"),
        ("decay = 0.5", "optimizer.decay is 0.5, which optimizer.schedule 'cosine' does not know"),
        ('schedule = "constant"\nfinal_lr = 0.5', "optimizer.final_lr is 0.5, which optimizer.schedule 'constant'"),
        ('schedule = "ring"', "unknown optimizer.schedule 'ring'; known: cosine, wsd, constant"),
    ],
)
def test_schedules_that_are_refused(changed: str, said: str, tmp_path: Path) -> None:
    head, table, _ = dump(TINY).partition("[optimizer]")
    path = tmp_path / "changed.toml"
    path.write_text(f"{head}{table}\nlr = 0.01\nwarmup = 2\n{changed}\n")
    assert said in refusal("--config", path)
