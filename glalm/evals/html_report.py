"""One self-contained HTML page of one or several runs: what they are, how they were trained, what they reach.

Made from the JSON files of their folders alone. Figures are inside the page; nothing is fetched.
"""

import base64
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from glalm.config.strict import flatten_tree
from glalm.evals import plot
from glalm.evals.published import RECALL, RECALL_ROWS, UNSURE, ZERO_SHOT, our_row, paper_table
from glalm.evals.result_files import read_json, read_metrics, scores, tokens_of, training_speed

STYLE = """
:root { color-scheme: light; --line: #ddd; --dim: #666; --ours: #eaf3fa; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 60rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, figcaption, summary, .note { color: var(--dim); font-size: .9rem; margin: .4rem 0; }
figure { margin: 1rem 0; } img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; margin: .5rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #999; } tbody th { font-weight: 500; }
tr.ours > *, tr.ours > th:first-child { background: var(--ours); font-weight: 600; }
table.text th { text-align: left; }
table.text td { text-align: left; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
tr.differs > * { background: #fff6d6; } tr.differs > th:first-child { background: #fff6d6; }
pre { white-space: pre-wrap; font-size: .8rem; background: #f6f6f6; padding: .6rem; margin: .4rem 0; }
summary { cursor: pointer; padding: .4rem 0; }
"""
DASH = "–"
ZERO_SHOT_EVALUATORS = ("paper_zero_shot", "zero_shot")


@dataclass
class Run:
    """A folder that train.py, eval.py or scripts/mqar.py wrote."""

    folder: Path
    name: str

    @cached_property
    def record(self) -> dict:
        return read_json(self.folder / "run.json") or {}

    @cached_property
    def metrics(self) -> list[dict]:
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def files(self) -> list[dict]:
        """What evaluators wrote, without the dotted files of unfinished ones."""
        return [read_json(path) for path in sorted(self.folder.glob("eval/[!.]*.json"))]

    def result(self, evaluator: str) -> dict | None:
        """An evaluator's file, under this run's name."""
        found = next((f for f in self.files if f.get("evaluator") == evaluator), None)
        return found and found | {"model": self.name}


def page(folders: Sequence[Path]) -> str:
    """The page. Raises ValueError when a folder holds nothing to report, or a file in it is damaged."""
    runs = [Run(Path(f), name) for f, name in zip(folders, names(folders), strict=True)]
    for run in runs:
        if not (run.record or run.metrics or run.files):
            raise ValueError(f"{run.folder} holds no run and no results: train or evaluate one there first")
    title = ", ".join(run.name for run in runs)
    parts = (overview, losses, zero_shot, lengths, recall, decoding, samples, recipe, provenance)
    body = "\n".join(section for part in parts for section in part(runs))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{esc(title)}</h1>\n{body}\n</body></html>\n"
    )


def found_by(evaluator: str, runs: list[Run]) -> list[dict]:
    """An evaluator's files of the runs that have one."""
    return [result for run in runs if (result := run.result(evaluator))]


def names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as much of what is above them as tells them apart."""
    parts = [Path(f).resolve().parts for f in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len({*parts}):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


# --------------------------------------------------------------------------------------------------- the sections


def overview(runs: list[Run]) -> list[str]:
    rows = []
    for run in runs:
        perplexity, extrapolation = run.result("perplexity"), run.result("extrapolation")
        known = perplexity or extrapolation or next(iter(run.files), {})
        speed = training_speed(run.metrics)
        model = run.record.get("config", {}).get("model", {})
        rows.append(
            [
                run.name,
                model.get("layers") or model.get("mixer") or known.get("model_config", {}).get("model_type"),
                "parameters" in known and plot.quantity(known["parameters"]),
                plot.quantity(max(tokens_of(run.metrics), default=0)) if run.metrics else None,
                speed and f"{speed:,.0f}",
                validation_perplexity(run, perplexity),
                furthest(extrapolation),
            ]
        )
    trained = [row for row in rows if any(cell and cell != DASH for cell in row[1:])]
    header = ["run", "mixer", "parameters", "tokens", "tokens/s", "validation perplexity", "perplexity far / near"]
    note = (
        "Tokens: trained on; tokens/s: the median. Far / near: at the most training lengths that documents reach, over "
        "that at one, with the state carried."
    )
    return [table(header, trained), p(note)] if trained else []


def validation_perplexity(run: Run, result: dict | None) -> str:
    """Of the whole split, with the checkpoint if training has gone on from it; else the last one of training."""
    if result is None:
        return number(next((row["val_perplexity"] for row in reversed(run.metrics) if "val_perplexity" in row), None))
    older = run.metrics and result["checkpoint"] != f"step_{run.metrics[-1]['step']}"
    return number(result["results"]["perplexity"]) + (f" ({result['checkpoint']})" if older else "")


def furthest(extrapolation: dict | None) -> str | None:
    carried = extrapolation and extrapolation["results"]["contexts"].get("stateful")
    ratios = carried["ratios"] if carried else {}
    return next((f"{r['ratio']:.3f} at {n}×" for n, r in reversed(ratios.items()) if r["documents"]), None)


def losses(runs: list[Run]) -> list[str]:
    curves = {r.name: r.folder / "metrics.jsonl" for r in runs if any("val_loss" in row for row in r.metrics)}
    if not curves:
        return []
    if len(curves) == 1:
        [(name, file)] = curves.items()
        return [h2("Training"), figure(plot.plot_training, file, f"Losses of {name}.")]
    return [h2("Training"), figure(plot.plot_losses, curves, "Validation losses.")]


def zero_shot(runs: list[Run]) -> list[str]:
    rows = {run.name: paper_table(tasks_of(run, *ZERO_SHOT_EVALUATORS)) for run in runs}
    compared = beside_published(rows, ZERO_SHOT)
    if compared is None:
        return []
    return [
        h2("Zero-shot"),
        compared,
        p(
            "Accuracies in percent, Hella and ARC-c normalised by length; Avg over the six accuracies. Below ours, the "
            "rows of the GLA paper (arXiv 2312.06635v6): 340M on 15B tokens, 1.3B on 100B, SlimPajama. ?: copies of "
            "the paper differ."
        ),
        *(p(f"{run.name}, unlike the paper: {what}.") for run in runs if (what := unlike_published(run))),
        *(task_table(result) for evaluator in ZERO_SHOT_EVALUATORS for result in found_by(evaluator, runs)),
    ]


def lengths(runs: list[Run]) -> list[str]:
    results = found_by("extrapolation", runs)
    if not results:
        return []
    parts = [
        h2("Length generalisation"),
        figure(plot.plot_extrapolation, results, "Perplexity by position; band: one standard error."),
        figure(
            plot.plot_ratios,
            results,
            "Perplexity at n training lengths over that at one, of the same documents; band: one standard error.",
        ),
    ]
    for result in results:
        for context, found in result["results"]["contexts"].items():
            rows = [
                [
                    f"{b['start']:,}-{b['end']:,}",
                    number(b["perplexity"], 3),
                    band(b),
                    b["documents"],
                    f"{b['tokens']:,}",
                ]
                for b in found["buckets"]
            ]
            header = ["positions", "perplexity", "± one standard error", "documents", "tokens"]
            parts.append(details(f"{result['model']}, context {context}: every bucket", table(header, rows)))
    return parts


def recall(runs: list[Run]) -> list[str]:
    parts = []
    rows = {run.name: our_row(tasks_of(run, "recall"), RECALL) for run in runs}
    if compared := beside_published(rows, RECALL_ROWS):
        parts += [
            compared,
            p(
                "Percent of answers contained, by lm-evaluation-harness; below ours, the GLA paper's rows, whose "
                "version of these tasks processed answers differently."
            ),
        ]
    for result in found_by("needle", runs):
        chance = f"Ranked first by chance: {result['results']['chance']:.0%}."
        parts.append(
            figure(
                plot.plot_needle,
                result,
                f"{result['model']}: a number told at a depth of a long text and asked for at its end; percent of its "
                f"tokens that are the likeliest. {chance}",
            )
        )
        header = ["length", "depth", "tokens right", "answers right", "ranked first", "mean rank"]
        shares = ("token_accuracy", "exact_match", "ranked_first")
        rows = [
            [f"{c['length']:,}", f"{c['depth']:.0%}", *(f"{c[k]:.0%}" for k in shares), number(c["mean_rank"])]
            for c in result["results"]["cells"]
        ]
        parts.append(details("every length and depth", table(header, rows)))
    if models := [f for run in runs for f in run.files if f.get("evaluator") == "mqar"]:
        caption = (
            "Multi-query associative recall (arXiv 2312.04927): accuracy by width, the best of the learning rates."
        )
        parts.append(figure(plot.plot_mqar, models, caption))
    return [h2("Recall"), *parts] if parts else []


def decoding(runs: list[Run]) -> list[str]:
    results = found_by("decode_speed", runs)
    if not results:
        return []
    rows = [
        [
            result["model"],
            f"{r['length']:,}",
            r["batch_size"],
            f"{r['tokens_per_second']:,.0f}",
            plot.bytes_of(r["state_bytes"] / r["batch_size"]),
        ]
        for result in results
        for r in result["results"]["lengths"]
    ]
    return [
        h2("Decoding"),
        figure(plot.plot_decoding, results, "Speed of a batch, and the state of one sequence."),
        details("every length", table(["model", "tokens behind", "sequences", "tokens/s", "state of each"], rows)),
    ]


def samples(runs: list[Run]) -> list[str]:
    parts = []
    for result in found_by("generate", runs):
        texts = (f"<pre><b>{esc(t['prompt'])}</b>{esc(t['continuation'])}</pre>" for t in result["results"])
        parts.append(details(f"{result['model']}: {len(result['results'])} continuations", "".join(texts)))
    return [h2("Samples"), *parts] if parts else []


def recipe(runs: list[Run]) -> list[str]:
    """The configs of training, the keys that differ first and marked."""
    configs = {r.name: flatten_tree(r.record["config"]) for r in runs if "config" in r.record}
    if not configs:
        return []
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    keys = [k for k in keys if k not in ("name", "runs_dir") and not k.startswith("train_evals.")]
    differs = {k for k in keys if len({repr(config.get(k)) for config in configs.values()}) > 1}
    rows = [
        [k, *(str(config.get(k, DASH)) for config in configs.values())]
        for k in sorted(keys, key=lambda k: k not in differs)
    ]
    whole = table(["key", *configs], rows, kind="text", marks={k: "differs" for k in differs})
    return [h2("Recipe"), details(f"{len(keys)} settings" + (f", {len(differs)} differ" if differs else ""), whole)]


def provenance(runs: list[Run]) -> list[str]:
    rows = []
    for run in runs:
        if run.record:
            git = run.record.get("git") or {}
            commit = f"{git.get('commit', '')[:12]}{' (changed)' if git.get('dirty') else ''}"
            rows.append(
                [f"{run.name}: training", run.record.get("device", DASH), spelled(run.record), commit or DASH, DASH]
            )
        for f in run.files:
            if f.get("evaluator") == "mqar":
                continue
            seconds = f"{f['seconds']:,.0f} s" if "seconds" in f else DASH
            rows.append(
                [
                    f"{run.name}: {f['evaluator']}",
                    f.get("device", DASH),
                    spelled(f),
                    f"{f.get('checkpoint', '')} {f.get('checksum', '')[:12]}",
                    seconds,
                ]
            )
    header = ["what", "device", "versions", "commit or checkpoint", "took"]
    return [h2("Made with"), details(f"{len(rows)} records", table(header, rows, kind="text"))] if rows else []


# ----------------------------------------------------------------------------------------------- tasks and tables


def tasks_of(run: Run, *evaluators: str) -> dict[str, dict]:
    """What the harness found on each task, the first evaluator's where several ran it."""
    return {
        task: metrics
        for evaluator in reversed(evaluators)
        for result in found_by(evaluator, [run])
        for task, metrics in result["results"]["tasks"].items()
    }


def unlike_published(run: Run) -> str:
    """The settings by which a run's zero-shot scores are other quantities than the paper's."""
    found = {}
    for evaluator in ZERO_SHOT_EVALUATORS:
        settings = (run.result(evaluator) or {}).get("settings", {})
        found |= {f"harness.{key}": settings[key] for key in ("limit", "num_fewshot", "stateful") if settings.get(key)}
        if any(path.startswith("wikitext2/") for path in settings.get("data", {}).get("wikitext", ())):
            found["Wiki ppl"] = "of the tokenised text, whose rare words are <unk>"
    return ", ".join(f"{key}={value}" if "." in key else f"{key} {value}" for key, value in found.items())


def task_table(result: dict) -> str:
    """All that the harness found, folded away."""
    found = result["results"]
    rows = [
        [task, metric, number(value, 4), number(values.get(f"{metric}_stderr"), 4), values.get("samples", DASH)]
        for task, values in found["tasks"].items()
        for metric, value in scores(values).items()
    ]
    rows += [[task, why, DASH, DASH, DASH] for task, why in found.get("missing", {}).items()]
    header = ["task", "metric", "value", "standard error", "questions"]
    return details(f"{result['model']}: every task", table(header, rows))


def beside_published(ours: dict[str, dict], published: dict[str, tuple]) -> str | None:
    """A table of the rows {run: {column: value}} that hold anything, above the paper's; None when none does."""
    ours = {name: row for name, row in ours.items() if any(x is not None for x in row.values())}
    if not ours:
        return None
    columns = [*next(iter(ours.values()))]

    def cell(name: str, label: str, value: float | None) -> str:
        return number(value, 2 if "ppl" in label else 1) + ("?" if (name, label) in UNSURE else "")

    values = [*((name, row.values()) for name, row in ours.items()), *published.items()]
    rows = [[name, *(cell(name, c, x) for c, x in zip(columns, row, strict=True))] for name, row in values]
    return table(["", *columns], rows, marks=dict.fromkeys(ours, "ours"))


def band(b: dict) -> str | None:
    return b["perplexity_low"] and f"{b['perplexity_low']:,.3f} to {b['perplexity_high']:,.3f}"


def spelled(record: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version)


# --------------------------------------------------------------------------------------------------------- the HTML


def esc(text: object) -> str:
    return html.escape(str(text))


def h2(text: str) -> str:
    return f"<h2>{esc(text)}</h2>"


def p(text: str) -> str:
    return f"<p>{esc(text)}</p>"


def number(x: float | None, digits: int = 2) -> str:
    return DASH if x is None or not math.isfinite(x) else f"{x:,.{digits}f}"


def details(title: str, content: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{content}</details>"


def table(header: list[str], rows: list[list], kind: str = "numbers", marks: dict[str, str] | None = None) -> str:
    """marks: {a row's first cell: its class}. An empty cell is a dash."""
    head = "".join(f'<th scope="col">{esc(h)}</th>' for h in header)
    body = []
    for first, *cells in rows:
        mark = f' class="{marks[first]}"' if marks and first in marks else ""
        rest = "".join(f"<td>{esc(DASH if c is None or c is False or c == [] else c)}</td>" for c in cells)
        body.append(f'<tr{mark}><th scope="row">{esc(first)}</th>{rest}</tr>')
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(draw: Callable[[Any, Path], list[Path]], results: Any, caption: str) -> str:
    with TemporaryDirectory() as folder:
        svg = Path(folder) / "figure.svg"
        draw(results, svg)
        content = svg.read_bytes()
    source = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    # At three quarters of its size, as a point is a pixel then, type can be read still: a narrower screen scrolls.
    width = round(float(ElementTree.fromstring(content).get("width").removesuffix("pt")))
    image = f'<img src="{source}" alt="{esc(caption)}" style="min-width: {width}px; max-width: {2 * width}px">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{esc(caption)}</figcaption></figure>'
