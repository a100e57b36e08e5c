"""Whether a run can be carried out, found out without training."""

from __future__ import annotations

from benchmarks.jobs import Job
from benchmarks.methods import find_method
from benchmarks.models import build_model
from benchmarks.resources import reproducible
from benchmarks.settings import InputError
from benchmarks.streams import Stream


def check_stream(job: Job, stream: Stream) -> None:
    """Refuse what does not fit a stream of so many tasks.

    Args:
        job: the run.
        stream: its stream.

    Raises:
        InputError: if joint training cannot take a sample of each task into a batch.
    """
    if find_method(job.method).joint and job.protocol.train_batch < stream.n_heads:
        raise InputError(
            f"train_batch={job.protocol.train_batch}: joint training on {job.protocol.name} takes samples of all "
            f"{stream.n_heads} tasks into each batch; expected at least {stream.n_heads}"
        )


def check_method(job: Job, stream: Stream) -> None:
    """Try a job's method on its network and the sizes of its training sets; nothing is trained.

    Args:
        job: the run.
        stream: its stream.

    Raises:
        InputError: if the method refuses the network, its settings or the data.
    """
    from avalanche_gradproj import GradProjError, HALRPPlugin
    from avalanche_gradproj.plugins.base import GradientTransformPlugin, task_heads
    from avalanche_gradproj.plugins.task_model import head_names

    smallest = min(len(dataset) for dataset in stream.train)
    refused = find_method(job.method).refuse(job.settings, smallest, len(stream.train))
    if refused is not None:
        raise InputError(f"{job.method} on {job.protocol.name}: {refused}")
    try:
        with reproducible(job.seed):
            model = build_model(job.protocol.model, stream, job.protocol.hidden)
        for plugin in find_method(job.method).plugins(job.settings, job.seed):
            if isinstance(plugin, HALRPPlugin):
                plugin.wrap(model)
                plugin.method.start(model, heads=head_names(model), remaining=len(stream.train))
            if not isinstance(plugin, GradientTransformPlugin):
                continue
            plugin.method.start(model, None, heads=task_heads(model))
            needed = plugin.method.required_samples()
            if needed is not None and needed > smallest:
                argument = plugin.method.samples_argument
                name = f"{job.method} on {job.protocol.name}"
                raise InputError(f"{name}: {argument}={needed}: there are experiences of {smallest} samples")
    except GradProjError as error:
        raise InputError(f"{job.method} on {job.protocol.name}: {' '.join(str(error).split())}") from error
