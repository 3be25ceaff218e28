"""What `hint_points.py` found: means, paired differences to the best control, a table, a figure, and words."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from hint_points_setting import Arm
from hintsearch.models.errors import InputError
from hintsearch.models.files import replacing
from matplotlib import pyplot
from scipy.stats import t as student_t

CONFIDENCE = 0.95
# Parameters of a trial that say what was chosen; the points themselves are told with those of the other arms.
CHOSEN = ("hints.clusters", "hints.metrics", "hints.selector", "loss.", "weight.", "temperature")
# Okabe and Ito's, told apart by the colour-blind; the markers differ, too.
CONTROL, OTHER, ZERO = ("#0072B2", "o"), ("#D55E00", "s"), "#595959"


def figures_of(arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all arms that have a result.

    Args:
        arms: in the order of the table.
        results: of single runs.

    Returns:
        The keys `arms`, `best_control` and `finding`.
    """
    by_arm: dict[str, dict[str, Any]] = {}
    for arm in arms:
        own = [line for line in results if line["arm"] == arm.name]
        accuracy = {str(line["seed"]): 100 * line["accuracy"] for line in own if not line["failed"]}
        if not accuracy:
            continue
        values = list(accuracy.values())
        by_arm[arm.name] = {
            "title": arm.title,
            "control": arm.is_control,
            "accuracy": accuracy,
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "half_interval": half_interval(values),
            "pairs": {str(line["seed"]): line["pairs"] for line in own},
            "same_as": twins(arm.name, list(by_arm), results),
            "failed": {str(line["seed"]): line["failed"] for line in own if line["failed"]},
        }
    controls = [name for name, arm in by_arm.items() if arm["control"]]
    if not controls:
        raise InputError("no run of a control arm is finished; let the benchmark go on")
    best = max(controls, key=lambda name: by_arm[name]["mean"])
    for name, figures in by_arm.items():
        if name != best:
            figures["over_best_control"] = difference(figures["accuracy"], by_arm[best]["accuracy"])
    return {"best_control": best, "arms": by_arm, "finding": finding(by_arm, best)}


def twins(name: str, above: Sequence[str], results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By seed the arms above one in the table that have its very configuration, and so its result."""
    by_seed: dict[str, list[str]] = {}
    for line in results:
        if line["arm"] != name:
            continue
        same = [
            other["arm"]
            for other in results
            if other["arm"] in above
            and (other["seed"], other["configuration"]) == (line["seed"], line["configuration"])
        ]
        if same:
            by_seed[str(line["seed"])] = same
    return by_seed


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Any]:
    """The paired difference, with its interval where at least two seeds have both."""
    gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean, half = statistics.mean(gains), half_interval(gains)
    if half is None:
        return {"mean": mean, "low": None, "high": None, "seeds": len(gains), "finding": "unknown"}
    found = "better" if mean - half > 0 else "worse" if mean + half < 0 else "null"
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(gains), "finding": found}


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % t-interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def finding(by_arm: Mapping[str, Mapping[str, Any]], best: str) -> str:
    """What the differences say, a null as a null."""
    others = {name: arm["over_best_control"]["finding"] for name, arm in by_arm.items() if not arm["control"]}
    better = [name for name, found in others.items() if found == "better"]
    worse = [name for name, found in others.items() if found == "worse"]
    null = [name for name, found in others.items() if found == "null"]
    unknown = [name for name, found in others.items() if found == "unknown"]
    sentences = [f"The best control is {best}."]
    if better:
        sentences.append(f"Better than it by more than noise: {', '.join(better)}.")
    elif null or worse:
        sentences.append("A null: no way to choose hint points, weights or a warm-up beat it by more than noise.")
    if null:
        sentences.append(f"Not told apart from it: {', '.join(null)}.")
    if worse:
        sentences.append(f"Worse by more than noise: {', '.join(worse)}.")
    if unknown:
        sentences.append(f"One seed tells no noise: {', '.join(unknown)}.")
    return " ".join(sentences)


def write_report(path: Path, figures: Mapping[str, Any]) -> None:
    """Prints the table, and writes it beside the JSON file, with the figure."""
    text = report(figures, path.stem)
    print(f"\n{text}")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    with replacing(path.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    draw(figures, path.with_suffix(".png"))


def report(figures: Mapping[str, Any], stem: str) -> str:
    """The table as Markdown, with what it takes to read it."""
    setting, teacher, seeds = figures["setting"], figures["teacher"], len(figures["seeds"])
    rungs = ", ".join(map(str, setting["rungs"]))
    lines = [
        "# Does it matter which layers give the hints?",
        "",
        f"CIFAR-100, {teacher['model']} → {setting['student']}, {setting['training_images']:,} training images, "
        f"{setting['rungs'][-1]} epochs (annealed schedules end at {rungs}), {seeds} paired seeds, "
        f"{setting['precision']}. The teacher, trained on the same images for {teacher['epochs']} epochs, has "
        f"{teacher['accuracy']:.2f} % on the test images. Accuracy is of the 10,000 test images, seen once by each "
        "student after its last epoch; the search was decided by 5,000 validation images.",
        "",
        f"{figures['machine']}; {figures['date']}; the runs took {figures['seconds']['runs'] / 60:.0f} minutes, summed "
        f"over {setting['workers']} processes; search and teacher are not counted. "
        f"`{figures['command']}`",
        "",
        f"**{figures['finding']}**",
        "",
        "| | arm | accuracy % (mean ± sd) | seeds | less the best control, points (95 % interval) | |",
        "|---|---|---|---|---|---|",
        *(row(name, arm, name == figures["best_control"]) for name, arm in figures["arms"].items()),
        "",
        *notes(figures["arms"]),
        *of_search(figures["search"]),
        "- The best control is the best of seven in the same runs: it is flattered by that, the others are not.",
        "- Intervals are 95 % t-intervals of paired differences, not corrected for the number of arms.",
        "",
        f"![accuracy and paired difference of each arm]({stem}.png)",
        "",
    ]
    return "\n".join(lines)


def row(name: str, arm: Mapping[str, Any], is_best: bool) -> str:
    sd = "" if arm["sd"] is None else f" ± {arm['sd']:.2f}"
    kind = "control" if arm["control"] else ""
    start = f"| {kind} | {arm['title']} (`{name}`) | {arm['mean']:.2f}{sd} | {len(arm['accuracy'])} |"
    if is_best:
        return f"{start} the best control | |"
    over = arm["over_best_control"]
    interval = "" if over["low"] is None else f" ({over['low']:+.2f} .. {over['high']:+.2f})"
    return f"{start} {over['mean']:+.2f}{interval} | {over['finding']} |"


def notes(by_arm: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the hint points lie, which arms are one and the same, and what failed."""
    lines = []
    for name, arm in by_arm.items():
        pairs = {seed: ", ".join(f"{ours}→{theirs}" for ours, theirs in own) for seed, own in arm["pairs"].items()}
        different = dict.fromkeys(pairs.values())
        if any(different):
            said = "; ".join(different) if len(different) > 1 else next(iter(different))
            lines.append(f"- {name}: {said}" + (" (by seed)" if len(different) > 1 else ""))
        for seed, same in arm["same_as"].items():
            lines.append(f"- {name}, seed {seed}: the very configuration, and so the run, of {', '.join(same)}")
        for seed, reason in arm["failed"].items():
            lines.append(f"- {name}, seed {seed} failed: {reason}")
    return lines


def of_search(search: Mapping[str, Any] | None) -> list[str]:
    """How the searched arm was found."""
    if search is None:
        return ["- The searched arm is missing: the search has not ended."]
    metric = next(key for key in search["winner"] if key.startswith("val_"))
    outcomes = [trial["outcome"] for trial in search["trials"]]
    epochs = sum(trial["epochs"] for trial in search["trials"])
    return [
        f"- searched: trial {search['winner']['trial']} of {len(outcomes)} trials (validation "
        f"{100 * search['winner'][metric]:.2f} %), of which {outcomes.count('completed')} completed, "
        f"{outcomes.count('pruned')} stopped by ASHA, {outcomes.count('failed')} failed; {epochs} epochs in all. It is "
        f"{described(search['winner'])}.",
        "- Only the searched arm was tuned; all others take the study's defaults, so its difference is one of tuning "
        "as much as of hint points.",
    ]


def described(winner: Mapping[str, Any]) -> str:
    parameters = {name: value for name, value in winner["parameters"].items() if name.startswith(CHOSEN)}
    return ", ".join(f"{name} {shortened(value)}" for name, value in sorted(parameters.items()))


def shortened(value: Any) -> str:
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return str(value)


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Accuracy with the single seeds, and the paired difference to the best control, of each arm."""
    arms, best = figures["arms"], figures["best_control"]
    seeds = len(figures["seeds"])
    drawn, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.42 * len(arms) + 1.6), sharey=True)
    for place, arm in enumerate(arms.values()):
        colour, marker = CONTROL if arm["control"] else OTHER
        values = list(arm["accuracy"].values())
        left.plot(values, [place + 0.24] * len(values), "|", color=colour, markersize=7)
        left.errorbar(arm["mean"], place, xerr=arm["half_interval"], fmt=marker, color=colour, capsize=3)
        over = arm.get("over_best_control")
        if over:
            half = None if over["low"] is None else over["high"] - over["mean"]
            right.errorbar(over["mean"], place, xerr=half, fmt=marker, color=colour, capsize=3)
    right.axvline(0, color=ZERO, linewidth=1, linestyle="--")
    left.set_yticks(range(len(arms)), [arm["title"] for arm in arms.values()])
    left.invert_yaxis()
    left.set_xlabel(f"test accuracy, %: mean with 95 % interval,\nticks: single seeds ({seeds})")
    right.set_xlabel(f"paired difference to the best control\n({best}), points, 95 % interval")
    for axes in (left, right):
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
    for kind, (colour, marker) in (("control", CONTROL), ("not a control", OTHER)):
        right.plot([], [], marker, color=colour, label=kind)
    right.legend(loc="best", fontsize=9)
    drawn.tight_layout()
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=150, format="png")
    pyplot.close(drawn)
