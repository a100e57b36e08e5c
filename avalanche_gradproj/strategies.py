"""Ready strategies, used as Avalanche's own: `GPM(model=..., optimizer=..., threshold=0.97)` beside `Naive(...)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from avalanche.training.templates import SupervisedTemplate

from avalanche_gradproj.plugins.gpm import GPMPlugin
from avalanche_gradproj.plugins.halrp import HALRPPlugin
from avalanche_gradproj.plugins.kfac import KFACLaplacePlugin
from avalanche_gradproj.plugins.logd import LOGDPlugin
from avalanche_gradproj.plugins.ogd import OGDPlugin
from avalanche_gradproj.plugins.xkfac import XKFACPlugin


def strategy_constructor(plugin_class: Callable[..., Any]) -> Callable[..., None]:
    """Make the `__init__` of a strategy that is a plugin's.

    Its keyword arguments are those of `SupervisedTemplate` and of the plugin (Avalanche checks them by the signature,
    and `help` shows it); the only default changed is `eval_mb_size=None`, the size of training batches. The plugin
    comes after the user's, whose list is not changed, and becomes `strategy.plugin`.

    Args:
        plugin_class: the plugin.
    """
    template = inspect.signature(SupervisedTemplate.__init__).parameters
    own = inspect.signature(plugin_class).parameters

    def init(self: Any, **kwargs: Any) -> None:
        plugin = plugin_class(**{name: kwargs.pop(name) for name in list(kwargs) if name in own})
        kwargs["plugins"] = [*(kwargs.get("plugins") or ()), plugin]
        kwargs.setdefault("eval_mb_size", None)
        SupervisedTemplate.__init__(self, **kwargs)
        self.plugin = plugin

    shared = [parameter for name, parameter in template.items() if name not in ("self", "kwargs")]
    needed = [parameter for parameter in shared if parameter.default is inspect.Parameter.empty]
    others = [
        parameter.replace(default=None) if parameter.name == "eval_mb_size" else parameter
        for parameter in shared
        if parameter.default is not inspect.Parameter.empty
    ]
    added = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    init.__signature__ = inspect.Signature([this, *needed, *added, *others])  # type: ignore[attr-defined]
    init.__name__ = "__init__"
    return init


class GPM(SupervisedTemplate):
    """Gradient Projection Memory (arXiv 2103.09762) as a strategy.

    Takes the arguments of Avalanche's `SupervisedTemplate` and those of `GPMPlugin`; `strategy.plugin` holds bases and
    report. `eval_mb_size=None` means `train_mb_size`.
    """

    plugin: GPMPlugin
    __init__ = strategy_constructor(GPMPlugin)


class LOGD(SupervisedTemplate):
    """Layerwise Optimization by Gradient Decomposition (arXiv 2105.07561) as a strategy.

    Takes the arguments of Avalanche's `SupervisedTemplate` and those of `LOGDPlugin`; `strategy.plugin` is the plugin.
    `eval_mb_size=None` means `train_mb_size`.
    """

    plugin: LOGDPlugin
    __init__ = strategy_constructor(LOGDPlugin)


class OGD(SupervisedTemplate):
    """Orthogonal Gradient Descent (arXiv 1910.07104) as a strategy.

    Takes the arguments of Avalanche's `SupervisedTemplate` and those of `OGDPlugin`; `strategy.plugin` is the plugin.
    `eval_mb_size=None` means `train_mb_size`.
    """

    plugin: OGDPlugin
    __init__ = strategy_constructor(OGDPlugin)


class KFACLaplace(SupervisedTemplate):
    """Kronecker-factored online Laplace approximation (arXiv 1805.07810) as a strategy.

    Takes the arguments of Avalanche's `SupervisedTemplate` and those of `KFACLaplacePlugin`; `strategy.plugin` is the
    plugin. `eval_mb_size=None` means `train_mb_size`.
    """

    plugin: KFACLaplacePlugin
    __init__ = strategy_constructor(KFACLaplacePlugin)


class XKFAC(SupervisedTemplate):
    """K-FAC extended to networks with BatchNorm (arXiv 2004.07507) as a strategy.

    Takes the arguments of Avalanche's `SupervisedTemplate` and those of `XKFACPlugin`; `strategy.plugin` is the plugin.
    `eval_mb_size=None` means `train_mb_size`.
    """

    plugin: XKFACPlugin
    __init__ = strategy_constructor(XKFACPlugin)


class HALRP(SupervisedTemplate):
    """Hessian-aware low-rank perturbations (arXiv 2311.15161) as a strategy.

    Takes the arguments of Avalanche's `SupervisedTemplate` and those of `HALRPPlugin`; `strategy.plugin` is the plugin.
    `eval_mb_size=None` means `train_mb_size`.
    """

    plugin: HALRPPlugin
    __init__ = strategy_constructor(HALRPPlugin)
