"""The kinds of files that come from elsewhere, by name."""

from fuzz.kind import Kind
from fuzz.of_data import ANNOTATIONS, ARCHIVES, CAPTIONS, MANIFESTS, TABLES
from fuzz.of_models import CHECKPOINTS
from fuzz.of_results import JOURNALS, RESULTS

KINDS: dict[str, Kind] = {
    "manifests": MANIFESTS,
    "journals": JOURNALS,
    "results": RESULTS,
    "checkpoints": CHECKPOINTS,
    "captions": CAPTIONS,
    "annotations": ANNOTATIONS,
    "archives": ARCHIVES,
    "tables": TABLES,
}
