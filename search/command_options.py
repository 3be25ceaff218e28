"""Arguments and options that several commands share."""

from typing import Annotated

import typer

StudyArgument = Annotated[str, typer.Argument(help="A study file, or the name of one that ships with hintsearch.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; logs go to stderr.")]
TrackingOption = Annotated[str | None, typer.Option("--tracking", metavar="URI", help="MLflow tracking store.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="A Ray cluster; started here without one.")]
SearchName = Annotated[str, typer.Argument(metavar="NAME", help="A search, or a study: then its latest search.")]
FiguresOption = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the pictures go. [default: figures/STUDY]"),
]
