"""What was found, as a heat map and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from haystack.measure import Cell

GIB = 1 << 30


def markdown_table(cells: Sequence[Cell]) -> str:
    """One row per cell: context, depth, whether exact, times, rates, memory."""
    lines = [
        "| context | depth | exact | TTFT s | prefill tok/s | decode tok/s | of bound | again s "
        "| mapped GiB | dense KV GiB | peak RSS GiB |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        found = cell.as_dict()
        row = [
            f"{cell.prompt_tokens:,}",
            f"{cell.depth:g} %",
            "yes" if cell.exact else f"**no** ({cell.score:.0%})",
            f"{cell.ttft_s:.2f}",
            f"{cell.prefill_tokens_per_s:,.0f}",
            _number(cell.decode_tokens_per_s, "{:.1f}"),
            _number(found["decode_share_of_bound"], "{:.0%}"),
            _number(cell.second_ttft_s, "{:.2f}"),
            f"{cell.mapped_bytes / GIB:.2f}",
            f"{cell.dense_kv_bytes / GIB:.2f}",
            _number(cell.peak.rss and cell.peak.rss / GIB, "{:.2f}"),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def draw_heat_map(cells: Sequence[Cell], title: str, path: Path) -> None:
    """Draw the share of right answer tokens over context length and depth as a PNG.

    Needs matplotlib (the dependency group `bench`).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    figure, axes = pyplot.subplots(
        figsize=(2.4 + 1.1 * len(lengths), 1.6 + 0.5 * len(depths)), dpi=120
    )
    scores = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        row, column = depths.index(cell.depth), lengths.index(cell.length)
        scores[row][column] = 100 * cell.score
        text = f"{100 * cell.score:.0f} %\n{cell.ttft_s:.1f} s"
        # White on the dark ends of the scale.
        color = "black" if 0.15 < cell.score < 0.85 else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    image = axes.imshow(scores, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, label="answer tokens right (%)")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
