"""Optuna's part: it suggests, it hears the truth about every trial, and it is rebuilt from the journal.

Each control arm has an Optuna study of its own, so that no control is in the history of the search's sampler. A new
sampler is made for each suggestion, seeded by (study seed, trial number): what is suggested depends on the trials
before it alone, also after a resume.
"""

import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json

from ..analysis.hint_selection import AUTO
from ..distill.loss_names import names_together
from ..distill.seeding import derived_seed
from ..models.files import replacing
from .events import Event, Finished, Reported, Suggested
from .study import Study
from .study_sections import Range, Space
from .study_types import KD_ONLY, NO_DISTILLATION

Parameters = dict[str, Any]

# Optuna's names of its yes-or-no choices: an optional term after its weight, a layer metric after the prefix.
SWITCH = ".on"
# Between a weight's name and the loss whose own range it has.
OF_LOSS = "@"
METRIC_SWITCH = "hints.metrics."


class ArmSampler:
    """Suggests parameters for search and control trials, and follows their events.

    Args:
        study: the study; its space, seed, objective and budget are used.
        name: of the search; Optuna's study names start with it, so that no two searches mix.
        control_clusters: number of hint points of a control, the student's number of stages.
    """

    def __init__(self, study: Study, name: str, control_clusters: int) -> None:
        self._study, self._name, self._control_clusters = study, name, control_clusters
        # Its notices of studies that are made here would stand between the lines of the live table.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = optuna.storages.InMemoryStorage()
        self._studies: dict[str, optuna.Study] = {}
        self._trials: dict[int, tuple[optuna.Study, optuna.Trial]] = {}

    def suggest(self, number: int, control: str) -> tuple[Parameters, dict[str, str]]:
        """Parameters for a new trial.

        Args:
            number: of the trial.
            control: name of its control arm; empty for a search trial.

        Returns:
            Every parameter by its MLflow name, and Optuna's JSON of the distributions of those that it chose.
        """
        study = self._optuna_study(control)
        if control and not study.trials:
            study.enqueue_trial(default_parameters(self._study.space, self._study.recipe.lr))
        return self._ask(study, number, control)

    def on_event(self, event: Event) -> None:
        """Tells Optuna; a suggestion that it has not made itself is added as a running trial."""
        match event:
            case Suggested() if event.number not in self._trials:
                study = self._optuna_study(event.control)
                study.enqueue_trial({name: _chosen(name, event.parameters) for name in event.distributions})
                self._ask(study, event.number, event.control)
            case Reported():
                if self._study.objective.metric in event.metrics:
                    value = event.metrics[self._study.objective.metric]
                    self._trials[event.number][1].report(value, step=event.epoch)
            case Finished():
                self._tell(event)
            case _:
                pass

    def save(self, path: Path) -> None:
        """Writes all Optuna studies to a sqlite file, for Optuna's own tools; whole or not at all."""
        with replacing(path) as temporary:
            temporary.unlink()
            storage = optuna.storages.RDBStorage(f"sqlite:///{temporary}")
            for study in self._studies.values():
                optuna.copy_study(from_study_name=study.study_name, from_storage=self._storage, to_storage=storage)
            storage.engine.dispose()

    def _optuna_study(self, control: str) -> optuna.Study:
        if control not in self._studies:
            self._studies[control] = optuna.create_study(
                study_name=f"{self._name}/{control}" if control else self._name,
                direction=self._study.objective.direction,
                storage=self._storage,
            )
        return self._studies[control]

    def _ask(self, study: optuna.Study, number: int, control: str) -> tuple[Parameters, dict[str, str]]:
        study.sampler = _new_sampler(self._study, number)
        trial = study.ask()
        parameters = suggest_parameters(
            trial, self._study.space, control, self._control_clusters, self._study.recipe.lr
        )
        self._trials[number] = study, trial
        return parameters, {name: distribution_to_json(d) for name, d in trial.distributions.items()}

    def _tell(self, event: Finished) -> None:
        study, trial = self._trials[event.number]
        states = {
            "completed": optuna.trial.TrialState.COMPLETE,
            "pruned": optuna.trial.TrialState.PRUNED,
            "failed": optuna.trial.TrialState.FAIL,
        }
        value = None
        if event.outcome == "completed":
            reported = study.trials[trial.number].intermediate_values
            value = reported[max(reported)]
        study.tell(trial, value, state=states[event.outcome])


def suggest_parameters(
    trial: optuna.Trial, space: Space, control: str, control_clusters: int, recipe_lr: float
) -> Parameters:
    """Asks Optuna for what the arm leaves open, define-by-run.

    Args:
        trial: source of the values.
        space: what may be chosen.
        control: name of a control arm; empty for a search trial.
        control_clusters: number of hint points of a control.
        recipe_lr: the learning rate if the space does not search it.

    Returns:
        Every parameter by its MLflow name; weights that are off are 0.
    """
    parameters: Parameters = {}
    if not control:
        clusters = space.hints.clusters
        parameters["hints.clusters"] = (
            AUTO if clusters.auto else trial.suggest_int("hints.clusters", clusters.low, clusters.high)
        )
        parameters["hints.metrics"] = ",".join(_metric_subset(trial, space.hints.metrics))
        parameters["hints.selector"] = _choice(trial, "hints.selector", space.hints.selectors)
        parameters["hints.pairing"] = _choice(trial, "hints.pairing", space.hints.pairings)
    elif control not in (NO_DISTILLATION, KD_ONLY):
        parameters |= {"hints.clusters": control_clusters, "hints.metrics": "", "hints.selector": control}
    if "hints.selector" in parameters:
        parameters["loss.hint"] = _choice(trial, "loss.hint", space.loss.hint)
        for name, loss in hint_weights(parameters["loss.hint"]):
            span = space.weight.of_hint(loss)
            parameters[name] = _value(trial, _optuna_name(name, loss, space), span)
    else:
        parameters["weight.hint"] = 0.0
    parameters |= _other_weights(trial, space, control)
    parameters["lr"] = _value(trial, "lr", space.lr) if space.lr else recipe_lr
    return parameters


def _other_weights(trial: optuna.Trial, space: Space, control: str) -> Parameters:
    """Losses and weights of what is no hint of inner layers."""
    weight, parameters = space.weight, Parameters()
    distils = control != NO_DISTILLATION
    embeds = distils and weight.embedding.high > 0
    parameters["weight.logit"] = 0.0
    if distils:
        # KD only without its logit loss would be no distillation at all, unless the penultimate features are taught.
        may_be_off = weight.logit.optional and not (control == KD_ONLY and weight.embedding.may_be_zero)
        parameters["weight.logit"] = _value(trial, "weight.logit", weight.logit, may_be_off)
    if parameters["weight.logit"] > 0:
        parameters["loss.logit"] = _choice(trial, "loss.logit", space.loss.logit)
        parameters["temperature"] = _value(trial, "temperature", space.temperature)
    if embeds:
        parameters["weight.embedding"] = _value(trial, "weight.embedding", weight.embedding)
        if parameters["weight.embedding"] > 0:
            parameters["loss.embedding"] = _choice(trial, "loss.embedding", space.loss.embedding)
    taught = parameters["weight.logit"] > 0 or parameters.get("weight.embedding", 0.0) > 0
    if control in (NO_DISTILLATION, KD_ONLY) and not taught and weight.classification.may_be_zero:
        # Labels are all that is left.
        parameters["weight.classification"] = 1.0
    else:
        parameters["weight.classification"] = _value(trial, "weight.classification", weight.classification)
    return parameters


def hint_weights(losses: str) -> tuple[tuple[str, str], ...]:
    """The parameters that hold the weights of hint losses such as `at+crd`, and the loss of each."""
    return tuple(
        ("weight.hint" if number == 1 else f"weight.hint.{number}", loss)
        for number, loss in enumerate(names_together(losses), start=1)
    )


def default_parameters(space: Space, recipe_lr: float) -> Parameters:
    """What the first trial of a control arm takes: the study's defaults, every optional term on."""
    weight = space.weight
    ranges = {_optuna_name(name, loss, space): weight.of_hint(loss) for name, loss in hint_weights(space.loss.hint[0])}
    ranges |= {
        "weight.logit": weight.logit,
        "weight.embedding": weight.embedding,
        "weight.classification": weight.classification,
        "temperature": space.temperature,
    }
    if space.lr:
        ranges["lr"] = space.lr
    switches = {f"{name}{SWITCH}": True for name, r in ranges.items() if r.optional}
    values = {name: r.default for name, r in ranges.items()}
    losses = {
        "loss.hint": space.loss.hint[0],
        "loss.logit": space.loss.logit[0],
        "loss.embedding": space.loss.embedding[0],
    }
    return {**losses, "lr": recipe_lr, **values, **switches}


def _optuna_name(name: str, loss: str, space: Space) -> str:
    """Optuna's name of a weight: a loss with a range of its own has a distribution of its own."""
    return f"{name}{OF_LOSS}{loss}" if loss in space.weight.by_loss else name


def _chosen(name: str, parameters: Parameters) -> Any:
    """What Optuna chose under that name, from parameters that show only what its switches led to."""
    if name in parameters:
        return parameters[name]
    value = parameters.get(name.removesuffix(SWITCH).partition(OF_LOSS)[0])
    if value is not None:
        return value > 0 if name.endswith(SWITCH) else value
    return name.removeprefix(METRIC_SWITCH) in parameters["hints.metrics"].split(",")


def _metric_subset(trial: optuna.Trial, metrics: tuple[str, ...]) -> list[str]:
    """A subset that is never empty: the last metric is asked about only if another is in, and is in otherwise."""
    chosen = [m for m in metrics[:-1] if trial.suggest_categorical(f"{METRIC_SWITCH}{m}", [True, False])]
    last = metrics[-1]
    if not chosen or trial.suggest_categorical(f"{METRIC_SWITCH}{last}", [True, False]):
        chosen.append(last)
    return chosen


def _choice(trial: optuna.Trial, name: str, options: tuple[str, ...]) -> str:
    return options[0] if len(options) == 1 else str(trial.suggest_categorical(name, options))


def _value(trial: optuna.Trial, name: str, span: Range, may_be_off: bool | None = None) -> float:
    off_allowed = span.optional if may_be_off is None else may_be_off
    if off_allowed and not trial.suggest_categorical(f"{name}{SWITCH}", [True, False]):
        return 0.0
    return trial.suggest_float(name, span.low, span.high, log=True) if span.searched else span.low


def _new_sampler(study: Study, number: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # `multivariate`, `group` and `constant_liar` are what conditional spaces and parallel trials need.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=derived_seed("sampler", study.seed, number) % 2**32,
            n_startup_trials=study.budget.startup_trials,
            multivariate=True,
            group=True,
            constant_liar=True,
        )
