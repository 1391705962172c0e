"""`Notices`: each notice is given once, also by a copy."""

import pickle

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
