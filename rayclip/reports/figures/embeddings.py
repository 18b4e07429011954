"""Figures of embedding shifts: t-SNE of clean and adversarial image embeddings (MMCoA's figure 9), with their mean
cosine similarity.

Shapes: N images, D embedding.
"""

import functools

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure as Canvas

from rayclip.reports.document import Figure
from rayclip.reports.figures.style import SERIES, Kept, panels, short
from rayclip.reports.results import examples, has_examples
from rayclip.reports.table import heading

_FEWEST = 8  # with fewer images a map is meaningless


def tsne(kept: Kept) -> list[Figure]:
    """Return a figure with a panel per model, of the samples whose embeddings the evaluation kept."""
    found: list[tuple[str, np.ndarray, np.ndarray]] = []
    chosen = kept.entries(("image", "multimodal"), lambda cell: has_examples(cell, "features"))
    for subject, _, _, entry in chosen:
        table = examples(entry.cells[0], "features")
        if table is not None and len(table) >= _FEWEST:
            found.append((subject.name, _matrix(table, "clean"), _matrix(table, "adversarial")))
    if not found:
        return []
    _, dataset, attack, _ = chosen[0]
    cosines = {name: mean_cosine(clean_ND, adversarial_ND) for name, clean_ND, adversarial_ND in found}

    def draw() -> Canvas:
        canvas, axes = panels(len(found), width=3.4, height=3.5)
        for ax, (name, clean_ND, adversarial_ND) in zip(axes, found, strict=True):
            clean, adversarial = np.split(_map(clean_ND, adversarial_ND), 2)
            ax.scatter(
                clean[:, 0], clean[:, 1], s=16, color=SERIES[0], marker="o", alpha=0.8, linewidths=0, label="clean"
            )
            ax.scatter(
                adversarial[:, 0],
                adversarial[:, 1],
                s=20,
                color=SERIES[1],
                marker="x",
                linewidths=1.1,
                label="adversarial",
            )
            ax.set_title(f"{short(name, 24)}\nmean cosine {cosines[name]:.3f}")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False)
        return canvas

    spelled = ", ".join(f"{name} {cosine:.3f}" for name, cosine in cosines.items())
    return [
        Figure(
            name="tsne",
            title=f"Embeddings of clean and adversarial images, {dataset} under {heading(attack.label)}",
            caption=f"t-SNE on cosine distance of the first {len(found[0][1])} images, a map for each model; the mean "
            "cosine is between an image before and after the attack.",
            alt=f"Scatter of embeddings before and after the attack. Mean cosine: {spelled}.",
            draw=draw,
        )
    ]


def mean_cosine(clean_ND: np.ndarray, adversarial_ND: np.ndarray) -> float:
    """Return the cosine similarity of an image's clean and adversarial embeddings, averaged over images."""
    norms = np.linalg.norm(clean_ND, axis=1) * np.linalg.norm(adversarial_ND, axis=1)
    return float(((clean_ND * adversarial_ND).sum(1) / norms).mean())


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    return np.stack(table[name].to_numpy(zero_copy_only=False)).astype(np.float64)


def _map(clean_ND: np.ndarray, adversarial_ND: np.ndarray) -> np.ndarray:
    return _fitted(clean_ND.tobytes(), adversarial_ND.tobytes(), clean_ND.shape[1])


@functools.lru_cache(maxsize=8)  # reused when a figure is drawn as SVG, PDF and PNG
def _fitted(clean: bytes, adversarial: bytes, dimensions: int) -> np.ndarray:
    from sklearn.manifold import TSNE  # takes seconds to import

    both = np.frombuffer(clean + adversarial).reshape(-1, dimensions)
    both = both / np.linalg.norm(both, axis=1, keepdims=True)
    perplexity = min(30.0, (len(both) - 1) / 3)
    return TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(both)
