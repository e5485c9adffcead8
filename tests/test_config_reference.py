"""What a config may hold, as it is told on the command line and in the docs."""

from pathlib import Path

import pytest

from legato.config import Config, Experiment
from legato.config.reference import describe, fields

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

pytestmark = pytest.mark.any_backend


def test_each_field_has_a_sentence():
    found = {field.path: field for field in fields(Experiment)}
    assert len(found) > 75
    for field in found.values():
        assert field.meaning.endswith("."), field
        assert len(field.meaning.split()) >= 4, field
    assert found["trainer.train_steps"].kind == "whole number or null"
    assert found["optimizer.type"].default is None
    assert found["trainer.keep_last"].meaning.endswith("null keeps all.")
    assert "data.SPLIT.batch_size" in found and "callbacks.N.type" in found


def test_the_page_has_them_as_they_are():
    """To renew it: what `legato train --help-config` prints."""
    text = describe(Experiment)
    assert f"```\n{text}```" in PAGE.read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 80


def test_a_field_without_a_sentence_is_found():
    class Bad(Config):
        """A config.

        Attributes:
            one: has a sentence.
        """

        one: int = 1
        two: int = 2

    with pytest.raises(KeyError, match="two"):
        describe(Bad)
