"""What the records of protocols share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.method_settings import (
    AgemSettings,
    EwcSettings,
    GemSettings,
    GpmSettings,
    KfacSettings,
    LogdSettings,
    NoSettings,
    OgdSettings,
    ReplaySettings,
)

#: Sources of figures.
GPM_CODE = "official GPM code"
LOGD_CODE = "official LOGD code"
GEM_CODE = "GEM's code"
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
) -> Mapping[str, Any]:
    """Return the settings of every method; those without any need none, K-FAC's are its defaults unless given."""
    chosen: dict[str, Any] = {
        "ewc": ewc,
        "replay": replay,
        "gem": gem,
        "agem": agem,
        "gpm": gpm,
        "ogd": ogd,
        "logd": logd,
    }
    chosen["kfac"] = kfac or KfacSettings()
    return MappingProxyType({"naive": NoSettings(), "joint": NoSettings(), **chosen})
