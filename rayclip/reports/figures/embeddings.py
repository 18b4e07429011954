"""Figures of embedding shifts: t-SNE of clean and adversarial image embeddings (MMCoA's figure 9), with their mean
cosine similarity.

Shapes: N images, D embedding.
"""

import functools

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure as Canvas

from rayclip.reports.choosing import choose_examples
from rayclip.reports.figures.style import SERIES, hide_axes, legend, panels, shorten
from rayclip.reports.grid import Figure
from rayclip.reports.notes import heading
from rayclip.reports.results import Results, examples, has_examples
from rayclip.reports.section import Section

_FEWEST = 8  # with fewer images a map is meaningless


def tsne(results: Results, section: Section) -> list[Figure]:
    """Return a figure with a panel per model, of the samples whose embeddings the evaluation kept."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    chosen = choose_examples(section, ("image", "multimodal"), lambda cell: has_examples(cell, "features"))
    for example in chosen:
        table = examples(example.cell, "features")
        if len(table) >= _FEWEST:
            found[example.subject.name] = _matrix(table, "clean"), _matrix(table, "adversarial")
    if not found:
        return []
    cosines = {name: mean_cosine(*both) for name, both in found.items()}

    @functools.cache  # reused when a figure is drawn as SVG, PDF and PNG
    def maps() -> dict[str, list[np.ndarray]]:
        return {name: _map(*both) for name, both in found.items()}

    def draw(columns: int) -> Canvas:
        canvas, axes = panels(len(found), columns, width=3.4, height=3.5, share_x=False, share_y=False)
        for ax, (name, (clean, adversarial)) in zip(axes, maps().items(), strict=True):
            (x, y), (a, b) = clean.T, adversarial.T
            ax.scatter(x, y, color=SERIES[0], marker="o", s=16, linewidths=0, alpha=0.8)
            ax.scatter(a, b, color=SERIES[1], marker="x", s=20, linewidths=1.1)
            ax.set_title(f"{shorten(name, 24)}\nmean cosine {cosines[name]:.3f}")
            hide_axes(ax)
        legend(canvas, dict(zip(("clean", "adversarial"), axes[0].collections, strict=True)), 2)
        return canvas

    spelled = ", ".join(f"{name} {cosine:.3f}" for name, cosine in cosines.items())
    count = len(next(iter(found.values()))[0])
    where = f"{chosen[0].dataset} under {heading(chosen[0].attack.label)}"
    return [
        Figure(
            name="tsne",
            title=f"Embeddings of clean and adversarial images, {where}",
            caption=f"t-SNE on cosine distance of the first {count} images, a map for each model; the mean "
            "cosine is between an image before and after the attack.",
            alt=f"Scatter of embeddings before and after the attack. Mean cosine: {spelled}.",
            draw=draw,
            narrows=len(found) > 1,
        )
    ]


def mean_cosine(clean_ND: np.ndarray, adversarial_ND: np.ndarray) -> float:
    """Return the cosine similarity of an image's clean and adversarial embeddings, averaged over images."""
    norms = np.linalg.norm(clean_ND, axis=1) * np.linalg.norm(adversarial_ND, axis=1)
    return float(((clean_ND * adversarial_ND).sum(1) / norms).mean())


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    return np.stack(table[name].to_numpy(zero_copy_only=False)).astype(np.float64)


def _map(clean_ND: np.ndarray, adversarial_ND: np.ndarray) -> list[np.ndarray]:
    """Return the places of clean and of adversarial embeddings on one map, each `(N, 2)`."""
    from sklearn.manifold import TSNE  # takes seconds to import

    both = np.concatenate([clean_ND, adversarial_ND])
    both = both / np.linalg.norm(both, axis=1, keepdims=True)
    perplexity = min(30.0, (len(both) - 1) / 3)
    places = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(both)
    return np.split(places, 2)
