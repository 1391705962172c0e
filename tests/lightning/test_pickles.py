"""`convert_attributes`: a callback pickled by an earlier version trains."""

import pickle
from pathlib import Path

from tests.lightning.runs import fit


def test_a_callback_pickled_by_0_1_0_trains(tmp_path: Path) -> None:
    """The file is `PrecisionMonitor("bf16", every_n_steps=1)` of 0.1.0, which had `compile`."""
    pickled = (Path(__file__).parent / "data" / "callback-0.1.0.pickle").read_bytes()
    assert b"compile" in pickled
    old = pickle.loads(pickled)
    assert [format.name for format in old.formats] == ["bf16"]
    assert old.state_dict() == {}
    fit(tmp_path, old, steps=2)
    assert old.latest_step == 1
