"""Checks that a tower is open_clip's own in every part, so that a shorter forward pass can replace its own.

`models.image` and `models.text` compute what open_clip's towers do with less work. They only support stock towers: a
hook, an adapter, a subclassed attention or patch embedding, a parametrized weight or a patched method changes the
function, and they would ignore it. Such a model uses its own `encode_image` and `encode_text`.

The check runs at each call, since hooks are added and removed. torch has no public way to list a module's hooks; they
are recognised as tables of functions among a module's attributes.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, cast

from torch import nn
from torch.nn.modules import module as torch_modules

_Classes = tuple[type | None, ...]  # classes that a child may have; None: it may be missing


def is_stock(model: nn.Module, parts: Iterable[str]) -> bool:
    """Return whether an open_clip CLIP is stock, in itself and in the named children; the other children may be
    anything.

    Stock means exactly open_clip's and torch's classes in the places where open_clip's own code puts them, with the
    settings that the shorter passes support, and without hooks or patched methods, on classes or instances.
    """
    allowed = _models().get(type(model))
    if allowed is None or any(map(_is_patched, (*_models(), *_children()))) or any(_tables(vars(torch_modules))):
        return False
    held = dict(model.named_children())
    return _is_bare(model) and all(_is_one_of(allowed[name], held.get(name)) for name in parts)


def _is_one_of(classes: _Classes, module: nn.Module | None) -> bool:
    """Return whether `module` is exactly of one of the classes, and stock including all its children."""
    kind = None if module is None else type(module)
    if module is None or kind is None or kind not in classes:
        return kind in classes
    if not _is_bare(module) or (kind in _settings() and not _settings()[kind](module)):
        return False
    held, wanted = dict(module.named_children()), _children()[kind]
    if kind is nn.ModuleList:
        return all(_is_one_of(wanted["*"], child) for child in held.values())
    return held.keys() <= wanted.keys() and all(_is_one_of(wanted[name], held.get(name)) for name in wanted)


def _is_bare(module: nn.Module) -> bool:
    """Return whether a module has no hooks, and nothing on the instance that hides what its class defines."""
    attributes, kind = vars(module), cast(type, type(module))
    return not any(_hooks(attributes)) and _defined_by(kind).isdisjoint(attributes)


def _tables(attributes: Mapping[str, Any]) -> list[Any]:
    """Return the tables of functions that torch or a module calls around a forward or backward pass."""
    return [attributes[name] for name in _named_as_hooks(attributes)]


def _named_as_hooks(attributes: Iterable[str]) -> list[str]:
    return [name for name in attributes if name.endswith("hooks") and ("forward" in name or "backward" in name)]


_hooks = operator.itemgetter(*_named_as_hooks(vars(nn.Module())))  # takes a module's attributes


@functools.cache
def _defined_by(kind: type) -> frozenset[str]:
    return frozenset(dir(kind))


def _is_patched(kind: type) -> bool:
    """Return whether a method of a class was defined outside the class."""
    return any(
        type(value) is FunctionType and (value.__module__ != kind.__module__ or hasattr(value, "__wrapped__"))
        for value in vars(kind).values()
    )


@functools.cache
def _models() -> dict[type, dict[str, _Classes]]:
    """Return the classes that each child of open_clip's two plain CLIPs may have."""
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import LayerNorm, LayerNormFp32, TextTransformer, Transformer, VisionTransformer

    image = {"visual": (VisionTransformer,)}
    text = {"token_embedding": (nn.Embedding,), "transformer": (Transformer,), "ln_final": (LayerNorm, LayerNormFp32)}
    return {
        CLIP: {**image, **text, "text_projection": (nn.Linear, None)},
        CustomTextCLIP: {**image, "text": (TextTransformer,)},
    }


@functools.cache
def _children() -> dict[type, dict[str, _Classes]]:
    """Return the classes that each child of a stock tower's classes may have; `*`: all items of a list."""
    from open_clip import transformer as t  # the import takes seconds

    norm, scale = (t.LayerNorm, t.LayerNormFp32), (t.LayerScale, nn.Identity)
    mlp = {"c_fc": (nn.Linear,), "gelu": (nn.GELU, t.QuickGELU), "c_proj": (nn.Linear,)}
    out_proj = type(nn.MultiheadAttention(1, 1).out_proj)  # a Linear that only attention has
    text = {"token_embedding": (nn.Embedding,), "transformer": (t.Transformer,), "ln_final": norm}
    inner: dict[type, dict[str, _Classes]] = {
        t.VisionTransformer: {
            "conv1": (nn.Conv2d,),
            "patch_dropout": (nn.Identity, t.PatchDropout),
            "ln_pre": (*norm, nn.Identity),
            "transformer": (t.Transformer,),
            "ln_post": norm,
        },
        t.TextTransformer: {**text, "text_projection": (nn.Linear, None)},
        t.Transformer: {"resblocks": (nn.ModuleList,)},
        nn.ModuleList: {"*": (t.ResidualAttentionBlock,)},
        t.ResidualAttentionBlock: {
            "ln_1": norm,
            "attn": (nn.MultiheadAttention,),
            "ls_1": scale,
            "ln_2": norm,
            "mlp": (nn.Sequential,),
            "ls_2": scale,
        },
        nn.MultiheadAttention: {"out_proj": (out_proj,)},
        nn.Sequential: mlp,
    }
    leaves = (nn.Conv2d, nn.Embedding, nn.Linear, nn.GELU, nn.Identity, nn.LayerNorm, out_proj)
    own_leaves = (t.LayerNorm, t.LayerNormFp32, t.LayerScale, t.QuickGELU, t.PatchDropout)
    return inner | {kind: {} for kind in (*leaves, *own_leaves)}


@functools.cache
def _settings() -> dict[type, Callable[[Any], bool]]:
    """Return the settings that the shorter passes require of each class; other classes may have any."""
    from open_clip import transformer as t

    return {
        t.VisionTransformer: lambda x: x.attn_pool is None and x.pool_type == "tok" and not x.output_tokens,
        t.TextTransformer: lambda x: x.cls_emb is None and not (x.use_pad_mask or x.output_tokens),
        t.Transformer: lambda x: x.batch_first and not x.grad_checkpointing,
        nn.Conv2d: lambda x: x.bias is None and (x.stride, x.padding) == (x.kernel_size, (0, 0)) and _is_dense(x),
        nn.MultiheadAttention: lambda x: x.in_proj_weight is not None and x.bias_k is None and _attends_plainly(x),
    }


def _is_dense(conv: Any) -> bool:
    return conv.dilation == (1, 1) and conv.groups == 1


def _attends_plainly(attention: Any) -> bool:
    return attention.batch_first and not (attention.add_zero_attn or attention.dropout)
