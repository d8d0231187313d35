"""What came of a study, for people and for the next run.

Enters: the search. Leaves, in the job's folder: the best settings as a spec, all trials as a table, and the
plots. Called by the runner at the end.

    study/best.toml                    runs with `cliptune train`
    study/trials.csv
    study/study.html                   all plots, to be moved about in; needs no network
    pictures/study-NAME.png            history, importances, parallel
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import optuna
import tomli_w
from matplotlib import pyplot
from matplotlib.axes import Axes
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

from cliptune.durable import write_atomically
from cliptune.spec import spec_to_mapping
from cliptune.v1 import spec_pb2
from cliptune_trainer.job import JobFolder
from cliptune_trainer.tuning.search import Search, Tried
from cliptune_trainer.tuning.settings import with_tried

BEST_FILE: Final = "best.toml"
TRIALS_FILE: Final = "trials.csv"
PAGE_FILE: Final = "study.html"
_DPI: Final = 120
# Importances are shares of a variance: one trial has none.
_TRIALS_TO_WEIGH: Final = 2


def write_report(job: JobFolder, spec: spec_pb2.JobSpec, search: Search) -> list[str]:
    """Writes it all; returns the files, relative to the job's folder. Needs a trial that came to its end."""
    best = search.best()
    if best is None:
        raise ValueError("no trial came to its end")
    job.study.mkdir(parents=True, exist_ok=True)
    job.pictures.mkdir(parents=True, exist_ok=True)
    write_atomically(job.study / BEST_FILE, _best_spec(spec, best).encode())
    write_atomically(job.study / TRIALS_FILE, _table(search.tried()).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna's plots are experimental to it
        page = _page(spec.name, search)
        pictures = list(_pictures(job.pictures, search))
    write_atomically(job.study / PAGE_FILE, page.encode())
    files = [job.study / BEST_FILE, job.study / TRIALS_FILE, job.study / PAGE_FILE, *pictures]
    return [file.relative_to(job.path).as_posix() for file in files]


def _best_spec(spec: spec_pb2.JobSpec, best: Tried) -> str:
    header = f"# Trial {best.number} of the study {spec.name}: {best.value}\n"
    return header + tomli_w.dumps(spec_to_mapping(with_tried(spec, best.settings)))


def _table(tried: Sequence[Tried]) -> str:
    paths = sorted({path for trial in tried for path in trial.settings})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "outcome", "value", "seconds", "job_id", *paths])
    for trial in tried:
        value = "" if trial.value is None else repr(trial.value)
        settings = [trial.settings.get(path, "") for path in paths]
        writer.writerow([trial.number, trial.outcome, value, f"{trial.seconds:.3f}", trial.job_id, *settings])
    return text.getvalue()


def _weighable(study: optuna.Study) -> bool:
    """Whether trials differ, so that a setting can have made the difference."""
    values = [trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    return len(values) >= _TRIALS_TO_WEIGH and len(set(values)) > 1


def _pictures(folder: Path, search: Search) -> Iterator[Path]:
    from optuna.visualization import matplotlib as plots

    study, metric = search.study, search.metric
    weigh = PedAnovaImportanceEvaluator()
    made: dict[str, Callable[[], Axes]] = {
        "history": lambda: plots.plot_optimization_history(study, target_name=metric),
        "parallel": lambda: plots.plot_parallel_coordinate(study, target_name=metric),
    }
    if _weighable(study):
        made["importances"] = lambda: plots.plot_param_importances(study, evaluator=weigh, target_name=metric)
    pyplot.switch_backend("agg")
    for name, plot in made.items():
        figure = plot().get_figure(root=True)
        if figure is None:
            continue
        path = folder / f"study-{name}.png"
        figure.savefig(path, dpi=_DPI, bbox_inches="tight")
        pyplot.close("all")
        yield path


def _page(name: str, search: Search) -> str:
    """One page with all plots; the library that moves them is in it once."""
    from optuna import visualization as plots

    study, metric = search.study, search.metric
    figures: list[Any] = [
        plots.plot_optimization_history(study, target_name=metric),
        plots.plot_parallel_coordinate(study, target_name=metric),
    ]
    if _weighable(study):
        weigh = PedAnovaImportanceEvaluator()
        figures.append(plots.plot_param_importances(study, evaluator=weigh, target_name=metric))
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        figures.append(plots.plot_intermediate_values(study))
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=place == 0) for place, figure in enumerate(figures)
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Study {name}</title></head>\n'
        f"<body>\n<h1>Study {name}</h1>\n{body}\n</body>\n</html>\n"
    )
