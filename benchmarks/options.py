"""Options of the commands, with what holds where they are left out.

What None stands for is said by `show_default`: brackets in a help text would be taken for markup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: Those that `compare` takes where none are named.
ALL_METHODS = "naive,ewc,replay,gem,agem,gpm,ogd,logd,kfac,xkfac,halrp,joint"

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[PROTOCOL=]FILE",
        help="Images as a Keras-convention .npz file.",
        show_default="embedded or downloaded images",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
MaybeDevice = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="cpu")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting of the protocol or the method.",
        show_default="the protocol's own",
    ),
]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=V,V,...",
        help="Try several values of a setting (gpm.threshold=0.9,0.95).",
        show_default="one value of each",
    ),
]
#: Where results go if nothing else is said.
OUT = Path("results")
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
MaybeOut = Annotated[Path | None, typer.Option(help="Folder of the results.", show_default=str(OUT))]
File = Annotated[
    Path | None, typer.Option(help="YAML file that says the same as these options.", show_default="no file")
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Names of methods, separated by commas.",
        show_default=f"those that can run of {ALL_METHODS.replace(',', ', ')}",
    ),
]
Seeds = Annotated[str | None, typer.Option(help="Seeds, separated by commas.", show_default="0,1,2")]
Jobs = Annotated[int | None, typer.Option(help="Runs at a time.", show_default="1")]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of each run.", show_default="the machine's, divided among the jobs; 1 on a cluster"),
]
Backend = Annotated[str | None, typer.Option(help="local, ray or dask.", show_default="local")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Address of the Ray or Dask cluster.", show_default="the one that Ray finds, or of Dask's configuration"
    ),
]
GpuShare = Annotated[float | None, typer.Option(help="Fraction of a GPU for each run on a cluster.", show_default="1")]
Wandb = Annotated[
    str | None,
    typer.Option(metavar="PROJECT", help="Log to Weights & Biases as well.", show_default="not logged there"),
]
Test = Annotated[str | None, typer.Option(help="Paired test of the report: t or wilcoxon.", show_default="t")]
Name = Annotated[
    str | None,
    typer.Option(
        help="Folder of the report below --out.", show_default="that of the file, or the protocols joined by +"
    ),
]
