"""The methods under contract: a new method is one more case here."""

from __future__ import annotations

import torch

from avalanche_gradproj import GPMPlugin, HALRPPlugin, KFACLaplacePlugin, LOGDPlugin, OGDPlugin, XKFACPlugin
from avalanche_gradproj.testing import MethodCase
from avalanche_gradproj.testing.cases import stream

_BAD_GPM = [
    (lambda: GPMPlugin(threshold=1.5), "threshold=1.5"),
    (lambda: GPMPlugin(threshold=-0.1), "threshold=-0.1"),
    (lambda: GPMPlugin(threshold=float("nan")), "threshold=nan"),
    (lambda: GPMPlugin(threshold=[0.9, 2]), "threshold=[0.9, 2]"),
    (lambda: GPMPlugin(threshold=[]), "threshold=[]"),
    (lambda: GPMPlugin(threshold="0.9"), "threshold='0.9'"),
    (lambda: GPMPlugin(threshold=True), "threshold=True"),
    (lambda: GPMPlugin(threshold_step=-1), "threshold_step=-1"),
    (lambda: GPMPlugin(threshold_step=float("nan")), "threshold_step=nan"),
    (lambda: GPMPlugin(threshold_step=[0.1]), "threshold_step=[0.1]"),
    (lambda: GPMPlugin(seed=10**17), "seed=100000000000000000"),
    (lambda: GPMPlugin(n_samples=0), "n_samples=0"),
    (lambda: GPMPlugin(n_samples=[10, 2.5]), "n_samples=[10, 2.5]"),
    (lambda: GPMPlugin(rank_rule="big"), "rank_rule='big'"),
    (lambda: GPMPlugin(apply_to="weights"), "apply_to='weights'"),
    (lambda: GPMPlugin(uncovered="ignore"), "uncovered='ignore'"),
    (lambda: GPMPlugin(batchnorm="thaw"), "batchnorm='thaw'"),
    (lambda: GPMPlugin(route="fast"), "route='fast'"),
    (lambda: GPMPlugin(seed=1.5), "seed=1.5"),
    (lambda: GPMPlugin(record_batch_size=0), "record_batch_size=0"),
]


def _gpm(**kwargs):
    settings = {"threshold": 0.9, "n_samples": 40, **kwargs}
    return lambda: GPMPlugin(**settings)


_BAD_OGD = [
    (lambda: OGDPlugin(n_gradients=-1), "n_gradients=-1"),
    (lambda: OGDPlugin(n_gradients=2.5), "n_gradients=2.5"),
    (lambda: OGDPlugin(n_gradients=True), "n_gradients=True"),
    (lambda: OGDPlugin(target="loss"), "target='loss'"),
    (lambda: OGDPlugin(max_bytes=0), "max_bytes=0"),
    (lambda: OGDPlugin(max_bytes="1GB"), "max_bytes='1GB'"),
    (lambda: OGDPlugin(apply_to="weights"), "apply_to='weights'"),
    (lambda: OGDPlugin(batchnorm="thaw"), "batchnorm='thaw'"),
    (lambda: OGDPlugin(seed=1.5), "seed=1.5"),
    (lambda: OGDPlugin(record_batch_size=0), "record_batch_size=0"),
]


def _ogd(**kwargs):
    settings = {"n_gradients": 40, **kwargs}
    return lambda: OGDPlugin(**settings)


_BAD_LOGD = [
    (lambda: LOGDPlugin(-1), "patterns_per_exp=-1"),
    (lambda: LOGDPlugin(n_components=0), "n_components=0"),
    (lambda: LOGDPlugin(variant="both"), "variant='both'"),
    (lambda: LOGDPlugin(margin=-1.0), "margin=-1.0"),
    (lambda: LOGDPlugin(blocks=0), "blocks=0"),
    (lambda: LOGDPlugin(selection="best"), "selection='best'"),
    (lambda: LOGDPlugin(memory_device="nowhere"), "memory_device='nowhere'"),
    (lambda: LOGDPlugin(seed=None), "seed=None"),
]


def _logd(*args, **kwargs):
    return lambda: LOGDPlugin(*args, **kwargs)


_BAD_KFAC = [
    (lambda: KFACLaplacePlugin(-1.0), "strength=-1.0"),
    (lambda: KFACLaplacePlugin([1.0, float("nan")]), "strength=nan"),
    (lambda: KFACLaplacePlugin([]), "strength=[]"),
    (lambda: KFACLaplacePlugin(float("inf")), "strength=inf"),
    (lambda: KFACLaplacePlugin(True), "strength=True"),
    (lambda: KFACLaplacePlugin(mode="both"), "mode='both'"),
    (lambda: KFACLaplacePlugin(fisher="true"), "fisher='true'"),
    (lambda: KFACLaplacePlugin(n_samples=0), "n_samples=0"),
    (lambda: KFACLaplacePlugin(n_samples=[10]), "n_samples=[10]"),
    (lambda: KFACLaplacePlugin(truncate=0.0), "truncate=0.0"),
    (lambda: KFACLaplacePlugin(truncate=1.5), "truncate=1.5"),
    (lambda: KFACLaplacePlugin(damping=-1e-3), "damping=-0.001"),
    (lambda: KFACLaplacePlugin(refresh_every=0), "refresh_every=0"),
    (lambda: KFACLaplacePlugin(refresh_every=2.5), "refresh_every=2.5"),
    (lambda: KFACLaplacePlugin(eigenbasis="yes", mode="online"), "eigenbasis='yes'"),
    (lambda: KFACLaplacePlugin(eigenbasis=True), "mode='separate'"),
    (lambda: KFACLaplacePlugin(seed=1.5), "seed=1.5"),
    (lambda: KFACLaplacePlugin(record_batch_size=0), "record_batch_size=0"),
]


def _kfac(*args, **kwargs):
    return lambda: KFACLaplacePlugin(*args, **kwargs)


_BAD_XKFAC = [
    (lambda: XKFACPlugin("equal"), "strength='equal'"),
    (lambda: XKFACPlugin(-1.0), "strength=-1.0"),
    (lambda: XKFACPlugin(adaptive=1), "adaptive=1"),
    (lambda: XKFACPlugin(reparameterise="yes"), "reparameterise='yes'"),
    (lambda: XKFACPlugin(inter_example=None), "inter_example=None"),
    (lambda: XKFACPlugin(batchnorm="thaw"), "batchnorm='thaw'"),
    (lambda: XKFACPlugin(pairs="none"), "pairs='none'"),
    (lambda: XKFACPlugin(pairs={"norm": 3}), "pairs={'norm': 3}"),
    (lambda: XKFACPlugin(unpaired="ignore"), "unpaired='ignore'"),
    (lambda: XKFACPlugin(mode="both"), "mode='both'"),
    (lambda: XKFACPlugin(damping=float("inf")), "damping=inf"),
    (lambda: XKFACPlugin(n_samples=0), "n_samples=0"),
    (lambda: XKFACPlugin(refresh_every=True), "refresh_every=True"),
    (lambda: XKFACPlugin(seed=-1), "seed=-1"),
    (lambda: XKFACPlugin(record_batch_size=0), "record_batch_size=0"),
]


def _xkfac(*args, **kwargs):
    return lambda: XKFACPlugin(*args, **kwargs)


_BAD_HALRP = [
    (lambda: HALRPPlugin(warmup_epochs=0), "warmup_epochs=0"),
    (lambda: HALRPPlugin(warmup_epochs=1.5), "warmup_epochs=1.5"),
    (lambda: HALRPPlugin(approximation_rate=0.0), "approximation_rate=0.0"),
    (lambda: HALRPPlugin(approximation_rate=1.1), "approximation_rate=1.1"),
    (lambda: HALRPPlugin(max_rank=0), "max_rank=0"),
    (lambda: HALRPPlugin(l1=-1e-4), "l1=-0.0001"),
    (lambda: HALRPPlugin(weight_decay=float("nan")), "weight_decay=nan"),
    (lambda: HALRPPlugin(max_growth=-0.1), "max_growth=-0.1"),
    (lambda: HALRPPlugin(prune_threshold=-1.0), "prune_threshold=-1.0"),
    (lambda: HALRPPlugin(prune="none"), "prune='none'"),
    (lambda: HALRPPlugin(importance=None), "importance=None"),
    (lambda: HALRPPlugin(head=3), "head=3"),
    (lambda: HALRPPlugin(unseen="guess"), "unseen='guess'"),
    (lambda: HALRPPlugin(seed=-1), "seed=-1"),
    (lambda: HALRPPlugin(record_batch_size=0), "record_batch_size=0"),
]


def _halrp(**kwargs):
    settings = {"max_growth": 3.0, **kwargs}
    return lambda: HALRPPlugin(**settings)


CASES = [
    MethodCase("gpm", _gpm(), neutral=_gpm(threshold=0), bad_arguments=_BAD_GPM),
    MethodCase("gpm-heads", _gpm(), neutral=_gpm(threshold=0), task_incremental=True),
    MethodCase("gpm-adam", _gpm(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)),
    MethodCase("gpm-inputs", _gpm(route="inputs"), neutral=_gpm(threshold=0, route="inputs")),
    MethodCase("gpm-track", _gpm(batchnorm="track", uncovered="train", rank_rule="official", n_samples=None)),
    MethodCase("ogd", _ogd(), neutral=_ogd(n_gradients=0), bad_arguments=_BAD_OGD),
    MethodCase("ogd-heads", _ogd(), neutral=_ogd(n_gradients=0), task_incremental=True),
    MethodCase("ogd-adam", _ogd(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)),
    MethodCase("ogd-all", _ogd(target="all", batchnorm="track", apply_to="update")),
    MethodCase("logd", _logd(40), neutral=_logd(0), bad_arguments=_BAD_LOGD),
    MethodCase(
        "logd-heads",
        _logd(40, 3, variant="official", blocks=5),
        neutral=_logd(0),
        task_incremental=True,
        looks_back=True,
    ),
    MethodCase(
        "logd-adam",
        _logd(40, 1, selection="last", blocks="network"),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    ),
    MethodCase("kfac", _kfac(2.0), neutral=_kfac(0.0), bad_arguments=_BAD_KFAC),
    MethodCase(
        "kfac-online", _kfac([2.0, 1.0], mode="online", damping=1e-3), neutral=_kfac([0.0, 0.0, 0.0], mode="online")
    ),
    MethodCase("kfac-heads", _kfac(2.0, n_samples=40), neutral=_kfac(0), task_incremental=True),
    MethodCase(
        "kfac-adam",
        _kfac(2.0, fisher="exact", truncate=0.8, mode="online", refresh_every=3),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    ),
    MethodCase(
        "kfac-eigenbasis",
        _kfac(2.0, mode="online", eigenbasis=True),
        neutral=_kfac(0.0, mode="online", eigenbasis=True),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    ),
    MethodCase("xkfac", _xkfac(), neutral=_xkfac(0.0), bad_arguments=_BAD_XKFAC),
    MethodCase("xkfac-heads", _xkfac(2.0, n_samples=40, damping=1e-3), neutral=_xkfac(0), task_incremental=True),
    MethodCase("xkfac-adam", _xkfac(mode="separate"), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)),
    MethodCase("xkfac-freeze", _xkfac(batchnorm="freeze", adaptive=False)),
    MethodCase("xkfac-track", _xkfac(2.0, batchnorm="track", fisher="exact", truncate=0.9), neutral=_xkfac(0.0)),
    MethodCase("xkfac-single", _xkfac(inter_example=False, reparameterise=False, fisher="empirical")),
    MethodCase("kfac-empirical", _kfac(2.0, fisher="empirical", truncate=0.9, n_samples=20)),
    MethodCase("halrp", _halrp(), bad_arguments=_BAD_HALRP, task_incremental=True),
    MethodCase(
        "halrp-adam",
        _halrp(
            prune="all",
            max_growth=1.8,
            warmup_epochs=2,
            importance=stream(task_labels=True).test_stream,
            exclude=["body.scale"],
        ),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        task_incremental=True,
    ),
]
