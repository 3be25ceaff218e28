"""Published combinations of losses, with their weights as they were published: of terms that are not normalised."""

from dataclasses import dataclass

from ..models.registry import Registry


@dataclass(frozen=True)
class LossPreset:
    """Losses and their raw weights.

    Attributes:
        hint: (hint loss, β), all of them on each hint pair.
        logit: the logit loss.
        logit_weight: α.
        temperature: τ.
    """

    hint: tuple[tuple[str, float], ...]
    logit: str = "kd"
    logit_weight: float = 1.0
    temperature: float = 4.0


LOSS_PRESETS: Registry[LossPreset] = Registry("loss preset")

# The combinations are those of PURSUhInT, the β of RepDistiller's runs; that both weights of two hint losses stay as
# they are for each alone, and α = 1, is our choice.
_SOURCE = "Keser et al. 2023, arXiv 2103.00053; β of Tian et al. 2020, arXiv 1910.10699 (RepDistiller); α = 1 is ours"
_RAW = {"fitnet": 100.0, "at": 1000.0, "vid": 1.0, "crd": 0.8}


def _register(name: str, *hint: str, logit: str = "kd") -> None:
    preset = LossPreset(tuple((loss, _RAW[loss]) for loss in hint), logit)
    weights = " + ".join(f"{weight:g}·{loss}" for loss, weight in preset.hint)
    LOSS_PRESETS.register(name, source=_SOURCE, kind="losses", loss=f"cross-entropy + {logit} + {weights}, raw")(preset)


_register("fitnet", "fitnet")
_register("at", "at")
_register("vid", "vid")
_register("crd", "crd")
_register("wsl+at", "at", logit="wsl")
_register("wsl+crd", "crd", logit="wsl")
_register("at+crd", "at", "crd")
