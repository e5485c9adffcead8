"""When things are due."""

from legato.schedule import Schedule


def make(**changes):
    fields = {
        "train_steps": 30,
        "steps_per_epoch": 12,
        "validation_interval": "epoch",
        "checkpoint_interval": 5,
        "summary_interval": 8,
        **changes,
    }
    return Schedule(**fields)


def stops(schedule, step=0):
    found = []
    while step < schedule.train_steps:
        step = schedule.next_stop(step)
        found.append(step)
    return found


def validations(schedule):
    return [
        step
        for step in range(31)
        if schedule.validation_is_due(
            step,
            (step - 1) // schedule.steps_per_epoch,
            epoch_ends=schedule.epoch_ends(step),
        )
    ]


def test_it_stops_wherever_anything_is_due():
    assert stops(make()) == [5, 8, 10, 12, 15, 16, 20, 24, 25, 30]
    schedule = make()
    assert [s for s in range(31) if schedule.checkpoint_is_due(s)] == [
        5,
        10,
        15,
        20,
        25,
        30,
    ]
    assert validations(schedule) == [12, 24]
    assert [s for s in range(31) if schedule.epoch_ends(s)] == [12, 24]
    assert [s for s in range(31) if schedule.summary_is_due(s)] == [8, 16, 24]


def test_what_is_off_is_never_due():
    schedule = make(
        validation_interval=None, checkpoint_interval=None, summary_interval=0
    )
    assert stops(schedule) == [12, 24, 30]
    assert not validations(schedule)
    assert not any(
        schedule.checkpoint_is_due(s) or schedule.summary_is_due(s)
        for s in range(31)
    )


def test_it_does_not_depend_on_where_it_is_asked_from():
    schedule = make()
    for step in range(30):
        assert stops(schedule, step) == [s for s in stops(schedule) if s > step]


def test_some_epochs_are_not_validated():
    schedule = make(steps_per_epoch=5, validation_freq=2)
    assert validations(schedule) == [10, 20, 30]
    schedule = make(steps_per_epoch=5, validation_freq=frozenset({1, 4, 9}))
    assert validations(schedule) == [5, 20]
    schedule = make(steps_per_epoch=5, validation_interval=7, validation_freq=2)
    assert validations(schedule) == [7, 14, 21, 28]
