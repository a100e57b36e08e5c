"""What the documentation says about saving and resuming, to the letter, beside a training that never stopped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "start.md").read_text(encoding="utf-8")
NEXT = "learner.train(benchmark.train_stream[1])"


def blocks() -> list[str]:
    """The page's Python up to the end of the part on resuming."""
    before, _, rest = PAGE.partition("## Save and resume")
    return re.findall(r"```python\n(.*?)```", before + rest.partition("\n## ")[0], flags=re.DOTALL)


@pytest.mark.parametrize("optimizer", ["SGD(model.parameters(), lr=0.01, momentum=0.9)", "Adam(model.parameters())"])
def test_resuming_as_documented_is_never_having_stopped(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks():
        code = block.replace("SGD(model.parameters(), lr=0.01, momentum=0.9)", optimizer)
        if NEXT in code:
            names["stopped"] = names["learner"]
            code = code.replace(NEXT, f"torch.manual_seed(7)\n{NEXT}")
        exec(compile(code, "start.md", "exec"), names)
    assert names["stopped"] is not names["learner"]
    torch.manual_seed(7)
    names["stopped"].train(names["benchmark"].train_stream[1])
    ours, theirs = names["learner"].model.state_dict(), names["stopped"].model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert any(names["learner"].optimizer.state.values())
