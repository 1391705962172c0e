"""The model of `altgrad demo` and its text."""

import pytest
import torch
from torch.nn.functional import one_hot

from altgrad_lightning.demo_model import CharacterTransformer, Windows, standard_library_text


def test_the_model_is_small_and_has_seven_layernorms() -> None:
    model = CharacterTransformer()
    assert 500_000 <= sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert sum(isinstance(m, torch.nn.LayerNorm) for m in model.modules()) == 7


def test_the_model_does_not_see_later_characters() -> None:
    torch.manual_seed(0)
    model = CharacterTransformer().eval()
    text = torch.randint(128, (1, 128))
    changed = text.clone()
    changed[0, 100:] = 0

    def hidden(batch: torch.Tensor) -> torch.Tensor:
        return model.blocks(model.characters(batch) + model.positions.weight)

    assert torch.allclose(hidden(text)[0, :100], hidden(changed)[0, :100], atol=1e-5)
    assert not torch.allclose(hidden(text)[0, 100:], hidden(changed)[0, 100:], atol=1e-5)


def test_the_text_is_source_in_ascii_and_always_the_same() -> None:
    text = standard_library_text(100_000)
    assert len(text) == 100_000
    assert text.isascii()
    assert b"import " in text
    assert text == standard_library_text(100_000)


def test_windows_begin_anywhere_and_are_one_longer_than_the_context() -> None:
    text = bytes(range(128)) + b"ab"  # two windows of 129 fit
    torch.manual_seed(0)
    windows = Windows(text, 50)
    assert len(windows) == 50
    assert {bytes(windows[k].tolist()) for k in range(50)} == {text[:-1], text[1:]}
    assert windows[0].dtype == torch.int64


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
def test_the_loss_compares_logits_with_the_next_character(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = CharacterTransformer(depth=1), torch.randint(128, (2, 129))
    logits = {"right": one_hot(batch[:, 1:], 128), "same": one_hot(batch[:, :-1], 128)}
    loss = {}
    for name, each in logits.items():
        monkeypatch.setattr(model, "forward", lambda context, each=each: 100.0 * each)
        loss[name] = model.training_step(batch, 0).item()
    assert loss["right"] < 1e-6
    assert loss["same"] > 90  # among 256 random characters, hardly one equals the next
