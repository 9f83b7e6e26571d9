"""What a search at the proxy found: the best settings, what counted, and whether they are better.

The best trial of many is the luckiest too. So its settings and the configuration's own are trained
again, with seeds that the search has not seen, and the differences decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_completep.config.schema import Config
from megatron_completep.config.yaml_text import dump_yaml
from megatron_completep.document import Report, new_figure, png_of
from megatron_completep.errors import DataError
from megatron_completep.files import write_whole
from megatron_completep.instruments import sweep
from megatron_completep.instruments.check_report import dump, finite
from megatron_completep.instruments.fits import Estimate, mean_estimate
from megatron_completep.instruments.proxy_search import (
    Search,
    Settings,
    open_study,
    optuna_package,
    short_run,
)
from megatron_completep.instruments.search_space import (
    BETAS,
    Dimension,
    from_coordinate,
    settings_of,
    with_settings,
)
from megatron_completep.instruments.trial import with_seed

Say = Callable[[str], None]
IMPORTANCES_FROM = 20  # finished trials: fewer say nothing of what counts
FIRST_SEED = 1  # trials are of seed 0


@dataclass(frozen=True)
class Trial:
    """One trial of the search."""

    number: int
    state: str  # complete | pruned | ...
    loss: float | None
    settings: dict[str, float]
    diverged: bool = False


@dataclass(frozen=True)
class Comparison:
    """The best settings beside the configuration's own, on seeds that the search has not seen."""

    losses: list[tuple[float, float]]  # the configuration's own, and the best settings', by seed
    gain: Estimate  # own minus best, in nats; the mean over seeds with its 95 % interval

    @property
    def verdict(self) -> str:
        """What the differences say."""
        if not math.isfinite(self.gain.value):
            return "a run diverged"
        if self.gain.low > 0:
            return "better by more than seed noise"
        if self.gain.high < 0:
            return "worse by more than seed noise"
        return "not better by more than seed noise"


def trials_of(search: Search, folder: Path) -> list[Trial]:
    """All trials that have begun. Raises DataError where none is finished."""
    study = open_study(folder, search.config.training.train_steps)
    trials = []
    for trial in study.get_trials(deepcopy=False):
        # What waits has no settings yet.
        if len(trial.params) < len(search.space):
            continue
        settings = {name: from_coordinate(name, x) for name, x in trial.params.items()}
        diverged = bool(trial.user_attrs.get("diverged"))
        state = trial.state.name.lower()
        trials.append(Trial(trial.number, state, trial.value, settings, diverged))
    if not any(trial.state == "complete" for trial in trials):
        raise DataError(
            f"{folder}: no trial is finished. Go on with tools/tune_proxy.py search, "
            "or widen its ranges if all were given up."
        )
    return trials


def best_of(trials: Sequence[Trial]) -> Trial:
    """The finished trial with the lowest loss."""
    finished = [trial for trial in trials if trial.state == "complete"]
    return min(finished, key=lambda trial: math.inf if trial.loss is None else trial.loss)


def importances(search: Search, folder: Path) -> dict[str, float]:
    """By setting: its share in what makes good trials good (PED-ANOVA), largest first.

    Empty below IMPORTANCES_FROM finished trials.
    """
    optuna = optuna_package()
    study = open_study(folder, search.config.training.train_steps)
    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(finished) < IMPORTANCES_FROM:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def points_of(search: Search, best: Settings, seeds: int) -> list[tuple[sweep.Point, sweep.Point]]:
    """By seed: the runs of the configuration's own settings and of the best ones."""
    own = short_run(search.config)
    tuned = with_settings(own, best)
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    return [(_point(own, "own", seed), _point(tuned, "tuned", seed)) for seed in numbers]


def _point(config: Config, name: str, seed: int) -> sweep.Point:
    model = config.model
    optimizer = config.optimizer
    return sweep.Point(
        name,
        model.hidden_size,
        model.num_layers,
        config.training.train_steps,
        optimizer.base_weight_decay,
        optimizer.base_init_std,
        optimizer.base_lr,
        seed,
        with_seed(config, seed),
        0 if model.moe is None else model.moe.num_experts,
    )


def compare(pairs: Sequence[tuple[sweep.Point, sweep.Point]], folder: Path) -> Comparison:
    """The comparison of runs that are done. Raises DataError for those that are not."""
    losses = []
    for pair in pairs:
        results = [result for _, result in sweep.read_results(pair, folder)]
        if len(results) < 2:
            raise DataError(f"{folder / 'points'}: a run of seed {pair[0].seed} is missing.")
        losses.append((sweep.loss_of(results[0]), sweep.loss_of(results[1])))
    return Comparison(losses, mean_estimate([own - best for own, best in losses]))


def report(
    folder: Path, path: Path, seeds: int, workers: int, device: str, say: Say = lambda text: None
) -> dict[str, Any]:
    """Compare, write the proxy's YAML with the best settings to `path`, and the report.

    Writes report.html, report.md and report.json into the folder, and returns what the last one
    holds. Runs that are done are not repeated. Raises DataError where the folder holds no search or
    no trial is finished.
    """
    search = Search.load(folder)
    trials = trials_of(search, folder)
    best = best_of(trials)
    settings = rounded(best.settings)
    pairs = points_of(search, settings, seeds)
    runs = [point for pair in pairs for point in pair]
    sweep.run_local(runs, folder, workers, device, say)
    comparison = compare(pairs, folder)
    shares = importances(search, folder)

    proxy = with_settings(search.config, settings)
    _write_proxy(path, proxy, folder, best, comparison)
    document = _document(search, trials, settings, comparison, shares)
    document.write_html(folder / "report.html")
    document.write_markdown(folder / "report.md")
    plain: dict[str, Any] = finite(
        {
            "config": str(path),
            "best": settings,
            "own": settings_of(search.config, search.space),
            "trial": best.number,
            "trials": len(trials),
            "gain": vars(comparison.gain),
            "losses": comparison.losses,
            "verdict": comparison.verdict,
            "importances": shares,
        }
    )
    write_whole(folder / "report.json", dump(plain))
    say(_summary(trials, comparison))
    say(f"written: {path}, {folder / 'report.html'}, report.md, report.json")
    return plain


def rounded(settings: Settings) -> dict[str, float]:
    """Values with four significant digits, a beta with those of 1 - beta.

    More digits than a search can tell would make the file hard to read.
    """
    values = {}
    for name, value in settings.items():
        digits = float(f"{1 - value if name in BETAS else value:.4g}")
        values[name] = 1 - digits if name in BETAS else digits
    return values


def _write_proxy(
    path: Path, proxy: Config, folder: Path, best: Trial, comparison: Comparison
) -> None:
    header = [
        f"# Found by a search: {folder}, trial {best.number}, loss {best.loss:.4f}",
        f"# {comparison.verdict}: {comparison.gain} nats",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "\n".join([*header, dump_yaml(proxy.model_dump(mode="json"))])
    write_whole(path, content.encode())


def _summary(trials: Sequence[Trial], comparison: Comparison) -> str:
    states = [trial.state for trial in trials]
    diverged = sum(trial.diverged for trial in trials)
    counts = f"{states.count('complete')} trials finished, {states.count('pruned')} given up"
    return (
        f"{counts} ({diverged} of them diverged)\n"
        f"best settings: {comparison.verdict} ({comparison.gain} nats over "
        f"{len(comparison.losses)} seeds)"
    )


def _document(
    search: Search,
    trials: Sequence[Trial],
    settings: Settings,
    comparison: Comparison,
    shares: dict[str, float],
) -> Report:
    document = Report("Search at the proxy", _summary(trials, comparison))
    own = settings_of(search.config, search.space)
    rows: list[list[Any]] = []
    for one in search.space:
        share = f"{shares[one.name]:.2f}" if one.name in shares else ""
        rows.append([one.name, one.low, one.high, own[one.name], settings[one.name], share])
    headers = ["setting", "low", "high", "own", "best", "importance"]
    note = "" if shares else f"Importances need {IMPORTANCES_FROM} finished trials."
    section = document.section("Settings")
    section.table(headers, rows, note)
    picture = png_of(_draw(search.space, trials))
    section.picture("trials", picture, "Losses of the finished trials over each setting.")

    rows = []
    for seed, (own_loss, best_loss) in enumerate(comparison.losses, FIRST_SEED):
        rows.append([seed, own_loss, best_loss, own_loss - best_loss])
    caption = "Held-out loss where there is held-out data, on seeds that the search has not seen."
    section = document.section("Own settings and best settings")
    section.table(["seed", "own", "best", "gain, nats"], rows, caption)
    return document


def _draw(space: Sequence[Dimension], trials: Sequence[Trial]) -> Any:
    finished = [trial for trial in trials if trial.state == "complete"]
    columns = min(4, len(space))
    figure_rows = -(-len(space) // columns)
    figure = new_figure(3.4 * columns, 3.0 * figure_rows)
    panels = figure.subplots(figure_rows, columns, squeeze=False, sharey=True).ravel()
    for panel, one in zip(panels, space, strict=False):
        values = [trial.settings[one.name] for trial in finished]
        if one.name in BETAS:
            values = [1 - value for value in values]
        panel.scatter(values, [trial.loss for trial in finished], s=9)
        panel.set_xlabel(f"1 - {one.name}" if one.name in BETAS else one.name)
        if one.name != "warmup_fraction":
            panel.set_xscale("log", base=2)
    for panel in panels[len(space) :]:
        panel.set_visible(False)
    panels[0].set_ylabel("loss")
    return figure
