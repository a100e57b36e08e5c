"""What the records of protocols share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from benchmarks.method_settings import (
    AgemSettings,
    EwcSettings,
    GemSettings,
    GpmSettings,
    HalrpSettings,
    KfacSettings,
    LogdSettings,
    NoSettings,
    OgdSettings,
    ReplaySettings,
    XkfacSettings,
)

#: Sources of figures.
GPM_CODE = "official GPM code"
LOGD_CODE = "official LOGD code"
GEM_CODE = "GEM's code"
HALRP_CODE = "official HALRP code"
HERE = "chosen here"


def settings_of_methods(
    *,
    ewc: EwcSettings,
    replay: ReplaySettings,
    gpm: GpmSettings,
    gem: GemSettings,
    agem: AgemSettings,
    ogd: OgdSettings,
    logd: LogdSettings,
    kfac: KfacSettings | None = None,
    xkfac: XkfacSettings | None = None,
    halrp: HalrpSettings | None = None,
) -> Mapping[str, Any]:
    """Return the settings of every method; those without any need none.

    Those of HALRP, K-FAC and XK-FAC are the defaults unless given; what is left of XK-FAC without some of its parts has
    its settings otherwise.
    """
    xkfac = xkfac or XkfacSettings()
    chosen: dict[str, Any] = {
        "ewc": ewc,
        "replay": replay,
        "gem": gem,
        "agem": agem,
        "gpm": gpm,
        "ogd": ogd,
        "logd": logd,
        "halrp": halrp or HalrpSettings(),
    }
    chosen["kfac"] = kfac or KfacSettings()
    chosen["xkfac"] = xkfac
    chosen["kfac-unmerged"] = replace(xkfac, inter_example=False, batchnorm="track")
    chosen["kfac-merged"] = replace(xkfac, inter_example=False)
    fixed: Literal["track", "freeze"] = "track" if xkfac.batchnorm == "track" else "freeze"
    chosen["kfac-fixed-bn"] = replace(xkfac, batchnorm=fixed)
    return MappingProxyType({"naive": NoSettings(), "joint": NoSettings(), **chosen})
