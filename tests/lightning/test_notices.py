"""`Notices`: in a training each notice is given once, and again in the next training."""

import pickle
import warnings

import pytest

from altgrad_lightning.notices import Notices


def test_a_notice_is_given_once() -> None:
    notices = Notices()
    with pytest.warns(UserWarning, match=r"^PrecisionMonitor observes no step$"):
        notices.warn("observes no step")
    notices.warn("observes no step")  # a warning would be an error here
    pickle.loads(pickle.dumps(notices)).warn("observes no step")
    with pytest.warns(UserWarning, match="observes nothing"):
        notices.warn("observes nothing")


def test_the_notices_of_another_training_are_shown_though_their_text_is_equal() -> None:
    """By default, Python shows equal warnings of a line once in a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            Notices().warn("observes no step")
    assert len(caught) == 2
