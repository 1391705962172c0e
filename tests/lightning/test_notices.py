"""`Notices`: each message once, also by a copy."""

import pickle

import pytest

from altgrad_lightning.notices import Notices


def test_a_message_is_said_once() -> None:
    notices = Notices()
    with pytest.warns(UserWarning, match=r"^PrecisionMonitor observes no step$"):
        notices.say("observes no step")
    notices.say("observes no step")  # a warning would be an error here
    pickle.loads(pickle.dumps(notices)).say("observes no step")
    with pytest.warns(UserWarning, match="observes nothing"):
        notices.say("observes nothing")
