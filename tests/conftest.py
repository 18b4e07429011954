"""What all tests share: small random models that are built in milliseconds, and the optional folder of real data."""

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from open_clip.model import CLIP
from pyarrow import fs
from torch.overrides import TorchFunctionMode

import servers
from rayclip.models import Clip
from rayclip.models.checkpoint import save_checkpoint

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for others.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

TINY = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 8, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"size": [8, 8], "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}


_TOKENIZER = open_clip.SimpleTokenizer(context_length=16)  # reads a large vocabulary, hence once


def tiny_clip(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Clip:
    """A CLIP with random weights, large enough ones for its predictions to differ between classes and images."""
    config = {**TINY, "model_cfg": {**TINY["model_cfg"], **changes}}
    torch.manual_seed(seed)
    model = CLIP(
        config["model_cfg"]["embed_dim"],
        config["model_cfg"]["vision_cfg"],
        config["model_cfg"]["text_cfg"],
        quick_gelu=bool(changes.get("quick_gelu")),
        init_logit_bias=changes.get("init_logit_bias"),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "token_embedding" in name or "positional" in name:
                p.mul_(20)
    return Clip(model, config, _TOKENIZER, "tiny").to(dtype).eval()


class NormInputs(TorchFunctionMode):
    """Rows and tokens that a LayerNorm gets within the block. A hook would see them too, but changes the way."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.seen = norm, list[tuple[int, int]]()

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is F.layer_norm and any(x is self.norm.weight for x in (*args, *(kwargs or {}).values())):
            self.seen.append((args[0].shape[0], args[0].shape[1]))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def text_rows(clip: Clip) -> Iterator[list[tuple[int, int]]]:
    """Rows and their length at each forward of the text tower within the block."""
    with NormInputs(clip.model.transformer.resblocks[0].ln_1) as inputs:
        yield inputs.seen


# Their files begin first, so that all processes end together
LONGEST = (
    "test_cluster.py",
    "test_rehearsal.py",
    "test_faults.py",
    "test_ray_surroundings.py",
    "test_commands.py",
    "test_sweep.py",
    "test_captions.py",
    "test_failures.py",
    "test_waits.py",
    "test_loop.py",
    "test_workers.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What the imports have left stays to the end: no garbage collection need look through it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries complain of what is left at exit


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test draws the same numbers in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of remote files and memories of checked ones do not touch the home of whoever runs the tests."""
    os.environ["RAYCLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture
def saved_clip(tmp_path: Path) -> str:
    """A tiny model's specification."""
    save_checkpoint(tiny_clip(), tmp_path / "tiny", {})
    return f"local-dir:{tmp_path / 'tiny'}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and models that a developer may have beside the checkout."""
    folder = Path(os.environ.get("RAYCLIP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no folder {folder} with real images and models")
    return folder


@pytest.fixture
def free_port() -> int:
    return servers.free_port()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, free_port: int) -> Iterator[str]:
    """The URI of an empty place on an object store: a real S3 protocol against a server of this process."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port)
    server.start()
    where = f"127.0.0.1:{free_port}&allow_bucket_creation=true&region=us-east-1"
    uri = f"s3://bucket/place?scheme=http&endpoint_override={where}"
    system, path = fs.FileSystem.from_uri(uri)
    system.create_dir(path)
    yield uri
    server.stop()


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making its tables takes a second."""
    from mlflow import MlflowClient

    place = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{place}").search_experiments()
    return place


@pytest.fixture
def mlflow_uri(mlflow_tables: Path, tmp_path: Path) -> str:
    """The address of an MLflow store of the test's own, without runs."""
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.MlflowServer]:
    """An MLflow server of the module's own."""
    server = servers.MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.ObjectStore]:
    """An object store of the module's own, in a process of its own, which clients of this process reach."""
    store = servers.ObjectStore(tmp_path_factory.mktemp("object-store"))
    store.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.env.items():
            patch.setenv(name, value)
        fs.FileSystem.from_uri(store.place("made"))[0].create_dir("bucket")
        yield store
    store.kill()
