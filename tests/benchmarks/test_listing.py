"""What `list` shows of a protocol is the whole of it: settings, and what cannot be set."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from benchmarks import fixed, models
from benchmarks.cli import app
from benchmarks.fixed import figures
from benchmarks.protocols import PROTOCOLS
from benchmarks.record import Expected, Normalisation, Protocol
from benchmarks.settings import settable

#: Of each field that cannot be set, and that fixes something, values that no protocol has together.
OTHERS = {
    "source": ["npz", "mnist"],
    "expected": [Expected((9, 9)), Expected(channels=3), Expected(n_classes=17), Expected(coarse=True)],
    "split": ["rotations", "superclasses"],
    "model": ["mlp-bias", "lenet"],
    "normalisation": [Normalisation(17.0), Normalisation(mean=(0.25,)), Normalisation(std=(0.25,))],
    "task_orders": [{"A": (0, 2, 1)}],
    "image_shape": [(3, 30, 31)],
    "optimizer": ["adam", "sgd"],
    "permuted_heads": [True, False],
    "permutation_rule": ["gem", "gpm"],
    "outputs": ["masked", "heads"],
    "draw_rule": ["each", "same"],
    "valid_share": [0.375],
    "valid_rule": ["first", "random"],
}
#: Words for people, and what is listed otherwise.
NAMES = {"name", "summary", "methods", "sources", "notes"}
#: Fields that matter with some protocols alone.
APPLIES = {
    "outputs": lambda protocol: protocol.split in ("classes", "superclasses"),
    "permuted_heads": lambda protocol: protocol.split in ("permutations", "rotations"),
    "permutation_rule": lambda protocol: protocol.split == "permutations",
    "valid_rule": lambda protocol: bool(protocol.valid_share),
}


def test_a_method_is_listed_with_its_settings():
    """Its defaults, and which protocols have other ones."""
    found = CliRunner().invoke(app, ["list", "gpm"], env={"COLUMNS": "300"}).stdout
    assert "gpm: gradient projection memory" in found
    (line,) = [line for line in found.splitlines() if " threshold " in line]
    assert "pmnist-gpm ([0.95, 0.99, 0.99])" in line
    assert "It has no settings" in CliRunner().invoke(app, ["list", "naive"]).stdout
    wrong = CliRunner().invoke(app, ["list", "gpn"])
    assert wrong.exit_code == 2
    assert "unknown protocol or method 'gpn': did you mean 'gpm'" in wrong.stderr


def test_every_field_is_settable_listed_or_for_people():
    offered = {field.name for field in dataclasses.fields(Protocol) if field.metadata.get("settable")}
    assert {field.name for field in dataclasses.fields(Protocol)} == offered | set(OTHERS) | NAMES


@pytest.mark.parametrize("field", OTHERS)
def test_protocols_that_differ_in_what_is_fixed_differ_in_the_list(field):
    chosen = [protocol for protocol in PROTOCOLS.values() if APPLIES.get(field, lambda _: True)(protocol)]
    assert chosen
    for protocol in chosen:
        for value in OTHERS[field]:
            other = dataclasses.replace(protocol, **{field: value})
            seen = other == protocol or figures(other) != figures(protocol)
            assert seen, f"{protocol.name}: {field}={value} is not to be seen"


def test_what_becomes_of_the_learning_rate_is_said():
    plain = PROTOCOLS["npz-split"]
    found = {
        figures(dataclasses.replace(plain, patience=patience, lr_decay=decay))["learning rate"]
        for patience, decay in ((None, None), (3, None), (None, 0.5))
    }
    assert len(found) == 3


def test_every_network_is_described():
    assert set(fixed.NETWORKS) == set(models._BUILDERS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_whole_protocol_is_listed(name):
    listing = CliRunner().invoke(app, ["list", name], env={"COLUMNS": "400"})
    assert listing.exit_code == 0
    for key, text in figures(PROTOCOLS[name]).items():
        assert f"│ {key} " in listing.stdout
        assert f"│ {text} " in listing.stdout
    for key in settable(PROTOCOLS[name]):
        assert f"│ {key} " in listing.stdout
