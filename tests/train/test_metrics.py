"""What a run tells of itself."""

from small_run import curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard_shows_what_the_json_lines_say(straight):
    board = EventAccumulator(str(straight / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert [step for step, _ in shown] == [line[0] for line in curve(straight)]
    assert all(abs(value - line[1]) < 1e-5 for (_, value), line in zip(shown, curve(straight)))
