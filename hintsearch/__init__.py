"""hintsearch finds which layers, losses and weights make hint distillation work.

The folders of the project are installed as subpackages: `hintsearch.models`, `hintsearch.distill`,
`hintsearch.analysis`, `hintsearch.search`. Importing this front door loads none of them.
"""

import pkgutil
from importlib import import_module
from typing import Any

# A checkout's `hintsearch/` that comes first on a Ray worker's path must not hide an installed wheel's subpackages.
__path__ = pkgutil.extend_path(__path__, __name__)

__version__ = "0.1.0"

_PUBLIC = {
    "run_search": "hintsearch.search.runner",
    "load_study": "hintsearch.search.study",
    "load_hints": "hintsearch.search.export",
    "distill_student": "hintsearch.search.retrain",
    "layer_distances": "hintsearch.search.preparation",
    "select_hints": "hintsearch.analysis.hint_selection",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Resolves a public name on first use, so that `import hintsearch.models` loads no Ray, MLflow or pydantic."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hintsearch' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
