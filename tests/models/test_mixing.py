import pytest
import torch

from conftest import tiny_clip
from rayclip.api.checks import Opened, plan_cells
from rayclip.api.request import Evaluation
from rayclip.attacks import parse_attacks
from rayclip.evaluation import Protocol
from rayclip.models import load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.models.prompts import WithFrame
from rayclip.models.specs import mix_spec, parse_mix
from rayclip.types import UserError


@pytest.fixture
def ends(tmp_path):
    """A model and another one of the same architecture; the second has a negative zero, which 0 + -0 would lose."""
    specs = []
    for seed in (0, 1):
        clip = tiny_clip(seed, quick_gelu=True)
        with torch.no_grad():
            clip.model.visual.proj[0, 0] = -0.0
        save_checkpoint(clip, tmp_path / str(seed), {})
        specs.append(f"local-dir:{tmp_path / str(seed)}")
    return specs


def weights(spec):
    return {k: v.detach() for k, v in load_model(spec).model.state_dict().items()}


def test_both_ends_are_reproduced_bit_for_bit(ends):
    for a, end in enumerate(ends):
        mixed, own = load_model(mix_spec(*ends, a)), load_model(end)
        assert mixed.fingerprint() == own.fingerprint()
        for name, tensor in own.model.state_dict().items():
            assert tensor.numpy().tobytes() == mixed.model.state_dict()[name].numpy().tobytes(), name


def test_the_ends_share_their_cells(ends):
    """An evaluation of a = 0 or 1 finds what was computed for the end itself."""
    evaluation = Evaluation(data=["digits"], attacks=parse_attacks("clean,pgd", {}), protocol=Protocol(eps=1 / 255))
    for a, end in enumerate(ends):
        cells, _ = plan_cells([end, mix_spec(*ends, a)], evaluation, Opened(quiet=True))
        assert [c.id for c in cells[:2]] == [c.id for c in cells[2:]]
        assert [c.model for c in cells] == [end, end, *[mix_spec(*ends, a)] * 2]


@pytest.mark.parametrize("a", [0.25, 0.5, 0.9])
def test_in_between_every_weight_is_the_weighted_mean(ends, a):
    mixed, start, end = weights(mix_spec(*ends, a)), weights(ends[0]), weights(ends[1])
    for name, tensor in mixed.items():
        expected = (1 - a) * start[name].double() + a * end[name].double()
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-7), name
    assert not torch.equal(mixed["visual.proj"], start["visual.proj"])


def test_a_mix_can_be_saved_and_named_again(ends, tmp_path):
    spec = mix_spec(*ends, 0.5)
    mixed = load_model(spec)
    assert mixed.spec == spec and parse_mix(spec) == (*ends, 0.5)
    save_checkpoint(mixed, tmp_path / "half", {})
    assert load_model(f"local-dir:{tmp_path / 'half'}").fingerprint() == mixed.fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 24},
        {"quick_gelu": False},
        {"vision_cfg": {"image_size": 8, "layers": 2, "width": 32, "head_width": 8, "patch_size": 4}},
    ],
    ids=["width", "activation", "heads"],
)
def test_other_architectures_are_refused(ends, tmp_path, changes):
    """Activation and number of heads do not show in the shapes of the weights."""
    save_checkpoint(tiny_clip(**({"quick_gelu": True} | changes)), tmp_path / "other", {})
    with pytest.raises(UserError, match="architecture"):
        load_model(f"mix:{ends[0]}+local-dir:{tmp_path / 'other'}@0.5")


def test_a_learned_prompt_is_no_end(ends, tmp_path):
    save_checkpoint(WithFrame.begin(load_model(ends[0])), tmp_path / "frame", {})
    with pytest.raises(UserError, match="prompt"):
        load_model(f"mix:{ends[0]}+prompted:{tmp_path / 'frame'}@0.5")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mix:digits@0.5", "is no interpolation"),
        ("mix:digits+digits", "is no interpolation"),
        ("mix:digits+@0.5", "is no interpolation"),
        ("mix:digits+digits@half", "is no interpolation"),
        ("mix:digits+digits@1.5", "1.5 is not from 0"),
        ("mix:digits+digits@nan", "nan is not from 0"),
        ("mix:digits+nonsense@0.5", "unknown model 'nonsense'"),
    ],
)
def test_bad_specifications_are_explained(spec, says):
    with pytest.raises(UserError, match=says):
        load_model(spec)
