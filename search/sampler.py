"""Optuna's part: it suggests, it hears the truth about every trial, and it is rebuilt from the journal.

Each control arm has an Optuna study of its own, so that no control is in the history of the search's sampler. A new
sampler is made for each suggestion, seeded by (study seed, trial number): what is suggested depends on the trials
before it alone, also after a resume.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json

from ..distill.seeding import derived_seed
from ..models.files import replacing
from .events import Event, Finished, Reported, Suggested
from .points import choices_of
from .study import Study
from .suggestions import Parameters, chosen, default_parameters, suggest_parameters


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
        # Of each trial the latest value of each objective, in the order of their directions.
        objective = study.objective
        self._objectives = [objective.metric, *([objective.against] if objective.against else [])]
        self._values: dict[int, dict[str, float]] = {}

    def suggest(
        self, number: int, control: str, point: Mapping[str, Any] | None = None
    ) -> tuple[Parameters, dict[str, str]]:
        """Parameters for a new trial.

        Args:
            number: of the trial.
            control: name of its control arm; empty for a search trial.
            point: parameters that a search trial is to have, of an earlier search; checked by `choices_of` before.

        Returns:
            Every parameter by its MLflow name, and Optuna's JSON of the distributions of those that it chose.
        """
        study = self._optuna_study(control)
        if control and not study.trials:
            study.enqueue_trial(default_parameters(self._study.space, self._study.recipe.lr))
        if point is not None:
            study.enqueue_trial(choices_of(point, self._study))
        return self._ask(study, number, control)

    def on_event(self, event: Event) -> None:
        """Tells Optuna; a suggestion that it has not made itself is added as a running trial.

        Of repeats, which nobody suggested, it does not hear.
        """
        match event:
            case Suggested() if event.number not in self._trials and event.arm != "confirm":
                study = self._optuna_study(event.control)
                study.enqueue_trial({name: chosen(name, event.parameters) for name in event.distributions})
                self._ask(study, event.number, event.control)
            case Reported() if event.number in self._trials:
                self._report(event)
            case Finished() if event.number in self._trials:
                self._tell(event)
            case _:
                pass

    def save(self, path: Path) -> None:
        """Writes all Optuna studies to a sqlite file, for Optuna's own tools; whole or not at all.

        Raises:
            OSError: it could not be written, on a full disk for example.
        """
        # In memory first: it is one write then, and a full disk is an OSError rather than one of the database's.
        storage = optuna.storages.RDBStorage("sqlite://")
        for study in self._studies.values():
            optuna.copy_study(from_study_name=study.study_name, from_storage=self._storage, to_storage=storage)
        connection = storage.engine.raw_connection()
        database = connection.driver_connection
        assert database is not None
        with replacing(path) as temporary:
            temporary.write_bytes(database.serialize())
        connection.close()
        storage.engine.dispose()

    def _optuna_study(self, control: str) -> optuna.Study:
        if control not in self._studies:
            self._studies[control] = optuna.create_study(
                study_name=f"{self._name}/{control}" if control else self._name,
                directions=[self._study.objective.direction, "minimize"][: len(self._objectives)],
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

    def _report(self, event: Reported) -> None:
        values = {name: event.metrics[name] for name in self._objectives if name in event.metrics}
        self._values.setdefault(event.number, {}).update(values)
        # Optuna keeps intermediate values of one objective only.
        if len(self._objectives) == 1 and values:
            self._trials[event.number][1].report(values[self._study.objective.metric], step=event.epoch)

    def _tell(self, event: Finished) -> None:
        study, trial = self._trials[event.number]
        states = {
            "completed": optuna.trial.TrialState.COMPLETE,
            "pruned": optuna.trial.TrialState.PRUNED,
            "failed": optuna.trial.TrialState.FAIL,
        }
        values = None
        if event.outcome == "completed":
            values = [self._values[event.number][name] for name in self._objectives]
        study.tell(trial, values, state=states[event.outcome])


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
