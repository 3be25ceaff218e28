"""Arguments and options that several commands share."""

import os
from typing import Annotated

import typer

# Read when Ray is imported; 0: what it starts here listens on the loopback interface alone, and no machine can join it.
_RAY_OF_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def _keep_ray_here(address: str | None) -> str | None:
    """Lets Ray listen to this machine only, unless a cluster is joined, or the environment says otherwise."""
    if address in (None, "local") and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault(_RAY_OF_SEVERAL_MACHINES, "0")
    return address


StudyArgument = Annotated[str, typer.Argument(help="A study file, or the name of one that ships with hintsearch.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; logs go to stderr.")]
TrackingOption = Annotated[str | None, typer.Option("--tracking", metavar="URI", help="MLflow tracking store.")]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", callback=_keep_ray_here, help="A Ray cluster; started here without one."),
]
SearchName = Annotated[str, typer.Argument(metavar="NAME", help="A search, or a study: then its latest search.")]
FiguresOption = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the pictures go. [default: figures/STUDY]"),
]
