"""Stopping between two experiences and going on in another process, with the same result.

The whole strategy is stored as it is: network, optimizer, plugins of any origin, and the states of the random
generators. What the new process makes again from protocol and seed (images, datasets, the benchmark) is stored by name
alone, so that a checkpoint has the size of what was learned, and its objects are those of the new process afterwards.
"""

from __future__ import annotations

import inspect
import io
import pickle
import random
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.files import write_bytes
from benchmarks.streams import Stream

#: Attributes of a strategy that hold a step's values: set anew by the next training.
_TRANSIENT = ("mbatch", "mb_output", "loss", "dataloader", "adapted_dataset", "experience")

_KNOWN: ContextVar[Mapping[str, Any]] = ContextVar("known")


class CheckpointError(Exception):
    """A checkpoint cannot be read or belongs to another run."""


def known_objects(stream: Stream, **others: Any) -> dict[str, Any]:
    """Name what a new process makes again.

    Args:
        stream: the run's stream.
        others: further objects by name.

    Returns:
        Name to object.
    """
    found: dict[str, Any] = {"stream": stream, "benchmark": stream.benchmark, **others}
    for part in ("train", "test", "valid"):
        for position, dataset in enumerate(getattr(stream, part)):
            found[f"{part}/{position}"] = dataset
            found[f"{part}/{position}/images"] = dataset.shared_images
    for name, own in stream.benchmark.streams.items():
        found[f"stream/{name}"] = own
        for position, experience in enumerate(own):
            found[f"experience/{name}/{position}"] = experience
            found[f"dataset/{name}/{position}"] = experience.dataset
    return found


def save(path: Path, key: str, content: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Store a checkpoint; the file is never there in part.

    Args:
        path: the file.
        key: of the run that it belongs to.
        content: what to store by name, the entry `strategy` among it.
        known: objects that are stored by name (`known_objects`).

    Raises:
        CheckpointError: if something in the strategy cannot be stored.
        OSError: if the file cannot be written.
    """
    names = {id(value): name for name, value in known.items()}

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            name = names.get(id(value))
            if name is not None:
                return _find, (name,)
            return _fresh_iterator(value) if inspect.isgenerator(value) else NotImplemented

    strategy = content["strategy"]
    held = {name: strategy.__dict__[name] for name in _TRANSIENT if name in strategy.__dict__}
    buffer = io.BytesIO()
    try:
        strategy.__dict__.update(dict.fromkeys(held))
        module = SimpleNamespace(__name__="pickle", Pickler=Pickler, dumps=pickle.dumps)
        everything = {"key": key, "content": dict(content), "random": _random_states()}
        torch.save(everything, buffer, pickle_module=module)
    except Exception as error:  # what pickle raises depends on the object
        raise CheckpointError(f"the strategy cannot be stored: {error}") from error
    finally:
        strategy.__dict__.update(held)
    write_bytes(path, buffer.getbuffer())


def load(path: Path, key: str, known: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Read a checkpoint and set the random generators to where they were.

    Args:
        path: the file.
        key: of the run that goes on.
        known: objects of this process for those stored by name.
        device: where the run happens.

    Returns:
        The content.

    Raises:
        CheckpointError: if the file cannot be read, or is of another run.
    """

    def place(storage: Any, location: str) -> Any:
        # What was on the CPU stays there, also beside a GPU: Adam counts its steps there, so as not to wait for it.
        return storage if location == "cpu" else torch.serialization.default_restore_location(storage, str(device))

    token = _KNOWN.set(known)
    try:
        # Written by `save` in the user's own folder: as trustworthy as the code itself.
        everything = torch.load(path, map_location=place, weights_only=False)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    finally:
        _KNOWN.reset(token)
    if not isinstance(everything, dict) or everything.get("key") != key:
        raise CheckpointError(f"{path} belongs to another run")
    _set_random_states(everything["random"])
    return dict(everything["content"])


def _fresh_iterator(generator: Any) -> Any:
    """Store an iterator over a loader that nothing was taken from yet: the loader makes another one."""
    fresh = inspect.getgeneratorstate(generator) == inspect.GEN_CREATED
    owner = generator.gi_frame.f_locals.get("self") if fresh else None
    if owner is None or generator.__name__ != "__iter__":
        return NotImplemented  # refused by pickle, by name
    return iter, (owner,)


def _find(name: str) -> Any:
    """Return an object of this process by its name."""
    return _KNOWN.get()[name]


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  Avalanche and scikit-learn draw from the global generator
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), index)
