"""The line that makes an optimizer: its class, its import, and several of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from altgrad.report.optimizer_lines import (
    Maker,
    list_makers,
    name_optimizers,
    replace_makers,
    write_imports,
    write_optimizers,
)
from tests.report.runs import make_run
from tests.report.twin_runs import make_recipe

ADAMW, SGD = Maker("torch.optim", "AdamW"), Maker("torch.optim", "SGD")


def list_of(*paths: str) -> dict[Maker, int]:
    return list_makers(make_run([], optimizers=dict.fromkeys(paths, 1)))


def test_the_class_of_the_run_is_named_by_its_public_module() -> None:
    assert list_of("torch.optim.adamw.AdamW") == {ADAMW: 1}
    assert list_of("torchao.optim.adam._AdamW") == {Maker("torchao.optim", "_AdamW"): 1}
    assert list_of("bitsandbytes.optim.adamw.AdamW8bit") == {
        Maker("bitsandbytes.optim", "AdamW8bit"): 1
    }
    assert list_of("optimi.adamw.AdamW") == {Maker("optimi", "AdamW"): 1}


@pytest.mark.parametrize("path", ["__main__.Mine", "torchaos.x.Mine", "a.<locals>.Mine", "Mine"])
def test_a_class_of_the_user_is_not_imported(path: str) -> None:
    makers = list_of(path)
    assert makers == {Maker("", "Mine"): 1}
    assert write_imports(makers, "import torch") == ["import torch", ""]


@pytest.mark.parametrize("path", ["a.f();x", "a.b\nimport os", "", "torch.optim.é", "x.", "a b"])
def test_no_name_of_a_class_is_read_as_code(path: str) -> None:
    assert list_of(path) == {Maker("", "Optimizer"): 1}


def test_an_older_run_file_has_one_class() -> None:
    now = make_recipe("now", optimizer="torch.optim.sgd.SGD")
    assert list_makers(make_run([], now=now)) == {SGD: 1}
    assert list_makers(make_run([])) == {Maker("", "Optimizer"): 1}


@pytest.mark.parametrize(
    ("maker", "family"),
    [
        (Maker("torchao.optim", "_AdamW"), "AdamW"),
        (Maker("torchao.optim", "AdamWFp8"), "AdamW"),
        (Maker("bitsandbytes.optim", "Adam8bit"), "Adam"),
        (SGD, "SGD"),
        (Maker("", "Lion"), "Lion"),
    ],
)
def test_variants_of_an_optimizer_are_a_family(maker: Maker, family: str) -> None:
    assert maker.family == family


def test_a_library_has_all_optimizers_or_none() -> None:
    other = Maker("optimi", "AdamW")
    assert replace_makers({ADAMW: 2}, lambda _: other) == {other: 2}
    find = {ADAMW: other}.get
    assert replace_makers({ADAMW: 1, SGD: 1}, find) is None


@pytest.mark.parametrize(("counts", "made"), [((1, 0), 1), ((1, 1), 2), ((2, 2), 4), ((3, 2), 5)])
def test_each_optimizer_is_made_and_named(counts: tuple[int, int], made: int) -> None:
    makers = {maker: count for maker, count in zip((ADAMW, SGD), counts, strict=True) if count}
    net = nn.Linear(2, 2)
    names = {
        "model": net,
        "arguments": {"lr": 0.5},
        **{f"parameters_{k}": [nn.Parameter(torch.ones(2))] for k in range(1, 5)},
        **{f"arguments_{k}": {"lr": 0.5} for k in range(1, 5)},
        **{
            f"groups_{k}": [([nn.Parameter(torch.ones(2))], {"lr": 0.5}) for _ in range(count)]
            for k, count in enumerate(makers.values(), 1)
        },
    }
    code = [*write_imports(makers), *write_optimizers(makers)]
    code.append(f"every = [{name_optimizers(makers)}]")
    exec(compile("\n".join(code), "lines", "exec"), names)
    every = names["every"]
    assert [type(each).__name__ for each in every] == ["AdamW"] * counts[0] + ["SGD"] * counts[1]
    assert len(every) == made
    assert {each.defaults["lr"] for each in every} == {0.5}
