"""Methods of other packages: found through entry points, set from the command line, refused by name where broken."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import external
from benchmarks.assignments import check
from benchmarks.cli import app
from benchmarks.jobs import make_job
from benchmarks.methods import METHODS, find_method
from benchmarks.protocols import resolve
from benchmarks.settings import InputError, settable, values
from tests.processes import run_to_end

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

GOOD = """
from __future__ import annotations
from typing import TYPE_CHECKING, Any, Literal
from avalanche.core import SupervisedPlugin
if TYPE_CHECKING:
    from elsewhere import Unknown

class Mine(SupervisedPlugin):
    '''Does something simple.

    More of it.
    '''
    def __init__(self, strength: float = 0.5, *, mode: Literal["a", "b"] = "a", count: int | None = None,
                 rates: tuple[float, ...] = (0.1, 0.2), flag=False, size: int | Literal["all"] = 3, lr: float = 2.0,
                 callback: Unknown = None, untyped=7, odd: Unknown = 4, seed: int = -1, _private=1,
                 **rest: Any) -> None:
        super().__init__()
        if strength < 0:
            raise ValueError(f"strength={strength}: give a number from 0")
        if untyped == 13:
            raise RuntimeError("thirteen")
        self.given = dict(locals(), self=None, rest=None, __class__=None)

def made(gain=1.5):
    return Mine(gain)

def not_a_plugin(n: int = 1):
    return [n]

def needs(model, rate: float = 1.0):
    return Mine()

NUMBER = 3
"""

POINTS = {
    "mine": "{module}:Mine",
    "made": "{module}:made",
    "list-maker": "{module}:not_a_plugin",
    "needs-model": "{module}:needs",
    "number": "{module}:NUMBER",
    "gone": "{module}:Nothing",
    "absent": "no_such_module_anywhere:Plugin",
    "broken-import": "{module}_broken:Plugin",
    "leaves": "{module}_leaves:Plugin",
    "malformed": "not a reference",
    "gpm": "{module}:Mine",
    "two,names": "{module}:Mine",
    "dot.ted": "{module}:Mine",
    "digits-split": "{module}:Mine",
}


def install(folder: Path, module: str, points: dict[str, str], distribution: str = "some-methods") -> None:
    """What an installer leaves: a module, and the distribution's metadata beside it."""
    (folder / f"{module}.py").write_text(GOOD)
    (folder / f"{module}_broken.py").write_text("raise OSError('a library is missing')")
    (folder / f"{module}_leaves.py").write_text("raise SystemExit('bye')")
    info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    lines = [f"{name} = {value.format(module=module)}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{external.GROUP}]", *lines, ""]))


@pytest.fixture
def installed(tmp_path, monkeypatch, request):
    """A folder of its own on the path; modules have names of their own, since imports are remembered."""
    module = "external_" + str(abs(hash(request.node.nodeid)))
    install(tmp_path, module, POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / f"{module}.py"


@pytest.mark.usefixtures("installed")
def test_settings_come_from_the_signature():
    method = find_method("mine")
    assert (method.name, method.summary) == ("mine", "Does something simple.")
    defaults = method.settings()
    assert values(defaults) == {
        "strength": 0.5,
        "mode": "a",
        "count": None,
        "rates": [0.1, 0.2],
        "flag": False,
        "size": 3,
        "plugin_lr": 2.0,  # lr is the protocol's
        "untyped": 7,
        "odd": 4,  # annotated with what only a type checker can find: the default's type
    }
    texts = {"strength": "2", "mode": "b", "count": "4", "rates": "1,2.5", "flag": "true", "size": "all"}
    protocol, settings, used = resolve(
        "digits-split", "mine", texts | {"plugin_lr": "0.25", "lr": "0.5", "nobody": "1"}
    )
    assert "nobody" not in used
    assert protocol.lr == 0.5
    (plugin,) = method.plugins(settings, 11)
    given = {key: plugin.given[key] for key in ("strength", "mode", "count", "rates", "flag", "size", "lr", "seed")}
    assert given == {
        "strength": 2.0,
        "mode": "b",
        "count": 4,
        "rates": (1.0, 2.5),
        "flag": True,
        "size": "all",
        "lr": 0.25,
        "seed": 11,
    }
    assert plugin.given["callback"] is None
    assert plugin.given["_private"] == 1


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_set_is_listed():
    assert external.load("mine").unset == ("callback",)
    found = CliRunner().invoke(app, ["list", "mine"], env={"COLUMNS": "200"}).stdout
    assert "mine: Does something simple." in found
    assert "from some-methods" in found
    assert "left at their defaults: callback" in found
    assert "plugin_lr" in found


@pytest.mark.usefixtures("installed")
def test_values_that_do_not_fit_are_refused():
    for key, text in (("mode", "c"), ("count", "1.5"), ("flag", "yes"), ("strength", "big"), ("untyped", "x")):
        with pytest.raises(InputError, match=f"^{key}={text}: "):
            make_job("digits-split", "mine", 0, CPU, {key: text})
    with pytest.raises(InputError, match="mine refuses its settings: strength=-1"):
        make_job("digits-split", "mine", 0, CPU, {"strength": "-1"})
    with pytest.raises(InputError, match=r"'mine' of some-methods 1.2 cannot be made: RuntimeError: thirteen"):
        make_job("digits-split", "mine", 0, CPU, {"untyped": "13"})
    with pytest.raises(InputError, match=r"'list-maker' of some-methods 1.2 makes list, expected an Avalanche plugin"):
        make_job("digits-split", "list-maker", 0, CPU, {})
    check(("digits-split",), ("naive", "mine"), {"rates": "1"})
    with pytest.raises(InputError, match=r"unknown setting 'rate'.*'rates'"):
        check(("digits-split",), ("naive", "mine"), {"rate": "1"})


BROKEN = {
    "needs-model": "model: no default",
    "number": "is int, expected a plugin class",
    "gone": "AttributeError",
    "absent": "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    "broken-import": "OSError: a library is missing",
    "leaves": "SystemExit: bye",
    "malformed": "not of the form module:attribute",
    "two,names": "letters, digits",
    "dot.ted": "letters, digits",
    "digits-split": "is taken by a protocol",
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_with_package_and_cause(name):
    with pytest.raises(InputError) as refused:
        find_method(name)
    assert "some-methods 1.2" in str(refused.value)
    assert BROKEN[name] in str(refused.value)
    assert external.origin(name) is None
    assert find_method("mine").name == "mine"


@pytest.mark.usefixtures("installed")
def test_a_name_of_this_project_stays_its_own():
    assert find_method("gpm") is METHODS["gpm"]
    assert "is taken by a method of this project" in external.load("gpm").reason
    assert external.origin("gpm") is None


def test_one_name_of_two_packages_is_refused(installed, monkeypatch):
    other = installed.parent / "other"
    other.mkdir()
    install(other, installed.stem + "_other", {"mine": "{module}:Mine"}, "more-methods")
    monkeypatch.syspath_prepend(other)
    with pytest.raises(InputError, match=r"more-methods 1.2 and some-methods 1.2 .* 2 entries have this name"):
        find_method("mine")


def test_a_damaged_installation_hides_nothing_else(installed):
    for text in (None, "[avalanche_gradproj.methods\nx"):
        info = installed.parent / f"damaged{text is None}-0.dist-info"
        info.mkdir()
        if text is not None:
            (info / "METADATA").write_text("Name: damaged\nVersion: 0\n")
            (info / "entry_points.txt").write_text(text)
    external._found.cache_clear()
    assert find_method("mine").name == "mine"


@pytest.mark.usefixtures("installed")
def test_unknown_names_are_compared_with_those_of_other_packages():
    with pytest.raises(InputError, match="did you mean 'mine'"):
        find_method("mnie")


@pytest.mark.usefixtures("installed")
def test_settings_survive_another_process():
    job = make_job("digits-split", "mine", 3, CPU, {"strength": "4", "rates": "1"})
    again = pickle.loads(pickle.dumps(job.settings))
    assert again == job.settings
    assert settable(again) == settable(job.settings)


def test_the_origin_follows_the_source(installed):
    text = external.origin("mine")
    assert text is not None
    assert text.startswith("some-methods 1.2 ")
    assert external.origin("naive") is None
    assert external.origin("unheard-of") is None

    def after(source: str) -> str | None:
        installed.write_text(source)
        external._load.cache_clear()
        return external.origin("mine")

    assert after("# a comment\n" + GOOD) == text
    changed = after(GOOD.replace("untyped == 13", "untyped == 14"))
    assert changed is not None
    assert changed != text


def test_the_command_line_knows_them(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed.parent), "COLUMNS": "240", "OMP_NUM_THREADS": "1"}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks", *words]
        return run_to_end(command, cwd=ROOT, env=environment)

    listing = call("list")
    assert listing.returncode == 0, listing.stderr
    assert "Does something simple. (some-methods 1.2)" in listing.stdout
    for name, cause in BROKEN.items():
        lines = [line for line in listing.stdout.splitlines() if f"│ {name} " in line]
        (line,) = [line for line in lines if "cannot be used" in line]
        assert cause.split(":", maxsplit=1)[0] in line
    run = call(
        *textwrap.dedent(f"""
        run digits-split --method mine --seed 2 --out {tmp_path}/out --set strength=3 --set rates=1,2
        --set epochs=1 --set train_limit=40 --set n_experiences=2
        """).split()
    )
    assert run.returncode == 0, run.stderr
    written = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("*.json")]
    (one,) = [content for content in written if content.get("method") == "mine"]
    assert one["seed"] == 2
    figures = one["hyper_parameters"]
    assert (figures["strength"], figures["rates"], figures["plugin_lr"]) == (3.0, [1.0, 2.0], 2.0)
    quick = ["--set", "epochs=1", "--set", "train_limit=40", "--set", "n_experiences=2"]
    compared = call(*f"compare digits-split --methods naive,mine --seeds 0 --out {tmp_path}/compared".split(), *quick)
    assert compared.returncode == 0, compared.stderr
    tables = [line for line in compared.stdout.splitlines() if "mine" in line]
    assert tables, compared.stdout
    refused = call("run", "digits-split", "--method", "absent")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "some-methods 1.2" in refused.stderr
