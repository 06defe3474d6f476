"""Make a model ready to be trained: freeze it, unfreeze and cast the parts that are trained, attach LoRA, fuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import nn

from ..families import state_of
from ..families.recipes import Recipe, recipe_of, resolve, unwrapped
from ..fusion import NothingToFuseError, fuse
from ..quantization.selection import quantized_layers
from . import checkpointing as blocks
from .checkpointing import Checkpointing
from .estimate import activations
from .lora import Lora, find_targets, inject, lora_layers, lora_parameters, same_lora
from .memory import BatchShape
from .plan import FinetuningPlan, Optimizer, PartRow, part_rows

__all__ = ["FinetuningPlan", "Lora", "PartRow", "prepare_finetuning"]

LORA = "lora"

# The dtypes that parameters had before they were cast for training, by name.
_CAST = "_mllm_fast_cast"


def prepare_finetuning(
    model: nn.Module,
    train: str = "bridge",
    *,
    lora: Lora | None = None,
    trained_dtype: torch.dtype = torch.float32,
    checkpointing: Checkpointing = "none",
    optimizer: Optimizer = "adamw",
    batch: BatchShape | None = None,
) -> FinetuningPlan:
    """Make `model` ready to train some of its parts through the rest, which stays frozen and as it is.

    Only what is trained is cast; everything else keeps its dtype and bytes, quantised or not. The vision model, while it
    is frozen, stays in evaluation mode whatever `model.train()` says, and so does what the original's training keeps there.
    Nothing is kept for backward below the first trained layer. Whatever `mllm_fast.fuse` knows is fused, LoRA layers over
    quantised layers among them. May be called again with other parts.

    Args:
        model: a whole model of a supported system, on any device (also meta), quantised or not, fused or not, and inside
            PEFT's wrapper or not.
        train: names of parts joined by "+": "bridge", "projection+lora", "vision+bridge", ... What there is depends on the
            system; "lora" is LoRA on the language model.
        lora: default `Lora()` where `train` has "lora".
        trained_dtype: of the trained parameters, low-rank matrices too; not narrower than what the language model is in.
            Parts that the original computes in fp32 are trained in fp32.
        checkpointing: "recompute" keeps only the input of each block and computes it again in backward; "offload" keeps
            these inputs in CPU memory.
        optimizer: for the table: AdamW with fp32 states ("adamw") or bitsandbytes' 8-bit states ("adamw8bit").
        batch: for the table: estimate the activations of a step with such a batch.

    Returns:
        The plan: trained parameters, and the table of what training costs.

    Raises:
        ValueError: a model without a recipe, an unknown part, layers that cannot be trained, or arguments that do not fit
            each other; the model is then as it was.
        MissingPartError: the model lacks something that its recipe names.
    """
    base, recipe = unwrapped(model), recipe_of(model)
    _check_choices(checkpointing, optimizer, trained_dtype)
    parts = _parts(recipe, train, lora)
    roots = [] if recipe.language_model is None else _modules(resolve(base, recipe.language_model))
    members = {part: [m for path in recipe.parts[part] for m in resolve(base, path)] for part in parts}
    trained = list({id(p): p for found in members.values() for m in found for p in _parameters(m)}.values())
    _check_trainable(base, members)
    before = dict(getattr(base, _CAST, {}))
    compute_dtype = _compute_dtype(base, roots, before)
    if trained_dtype.itemsize < compute_dtype.itemsize:
        raise ValueError(
            f"trained_dtype is {trained_dtype}, narrower than {compute_dtype}, which the language model is in; choose "
            f"{compute_dtype} or torch.float32, or load the language model in {trained_dtype}"
        )
    targets = _targets(base, recipe, roots, lora) if _wants_lora(train) else None
    checkpoints = blocks.find(base, recipe) if checkpointing != "none" else None

    with contextlib.ExitStack() as undo:
        _restore_on_failure(undo, base)
        base.requires_grad_(False)
        if targets is not None:
            undo.callback(inject(base, targets, lora or Lora()))
        adapters = lora_parameters(lora_layers(base).values()) if _wants_lora(train) else []
        base.requires_grad_(False)
        wanted = {id(p): trained_dtype for p in [*trained, *adapters]}
        for path in recipe.fp32 if trained_dtype.itemsize < 4 else ():
            wanted |= {id(p): torch.float32 for m in resolve(base, path) for p in _parameters(m) if id(p) in wanted}
        _cast(base, wanted, before)
        for p in (*trained, *adapters):
            p.requires_grad_(True)
        _keep_in_evaluation(base, recipe)
        with contextlib.suppress(NothingToFuseError):
            fuse(model, training=True, **_fuse_options(model))
        blocks.apply(base, checkpoints, checkpointing)
        ids = {id(p) for p in (*trained, *adapters)}
        names = tuple(name for name, p in model.named_parameters() if id(p) in ids)
        labels = _labels(base, recipe, members, roots)
        estimates = None if batch is None else activations(base, recipe, batch, compute_dtype, checkpointing, labels)
        rows = part_rows(base, labels, optimizer, estimates)
        plan = FinetuningPlan(model, train, rows, names, compute_dtype, optimizer)
        undo.pop_all()
    return plan


def _check_choices(checkpointing: str, optimizer: str, dtype: torch.dtype) -> None:
    for name, value, allowed in (
        ("checkpointing", checkpointing, get_args(Checkpointing)),
        ("optimizer", optimizer, get_args(Optimizer)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"trained_dtype is {dtype}; choose torch.float32 or torch.bfloat16")


def _parts(recipe: Recipe, train: str, lora: Lora | None) -> list[str]:
    """The parts that `train` names, "lora" left out."""
    names = [name.strip() for name in train.split("+")]
    known = [*recipe.parts, *([LORA] if recipe.language_model is not None else [])]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"train names {', '.join(map(repr, unknown))}; this system has {', '.join(known)}, joined by +"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"train names a part twice: {train!r}")
    if lora is not None and LORA not in names:
        raise ValueError(f"lora is given, but train={train!r} does not train it; write train={f'{train}+lora'!r}")
    return [name for name in names if name != LORA]


def _wants_lora(train: str) -> bool:
    return LORA in (name.strip() for name in train.split("+"))


def _check_trainable(base: nn.Module, members: Mapping[str, list[nn.Module | nn.Parameter]]) -> None:
    quantized = {id(layer): path for path, layer in quantized_layers(base).items()}
    for part, found in members.items():
        paths = [quantized[id(m)] for member in found for m in _submodules(member) if id(m) in quantized]
        if paths:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            raise ValueError(
                f"{part} cannot be trained, because {paths[0]}{more} is quantised; quantise the language model only "
                '(mllm_fast.load does), or train="lora"'
            )
        if not any(True for member in found for _ in _parameters(member)):
            raise ValueError(f"{part} has no parameters in this {type(base).__name__}; there is nothing to train")


def _targets(base: nn.Module, recipe: Recipe, roots: list[nn.Module], lora: Lora | None) -> list[str] | None:
    """Where LoRA has to be put; None where the model has it already."""
    existing = lora_layers(base)
    if existing and lora is None:
        return None
    inside = {id(m) for root in roots for m in root.modules()}
    parts = [m for paths in recipe.parts.values() for path in paths for m in _modules(resolve(base, path))]
    # A part that holds the language model, or is it, is no part of the bridge.
    bridge = [m for m in parts if not any(root in set(m.modules()) for root in roots)]
    assert inside
    names = find_targets(base, roots, bridge, lora or Lora())
    if not existing:
        return names
    if lora is not None and same_lora(existing, lora, names):
        return None
    raise ValueError(
        f"the model has LoRA already, on {len(existing)} layers, and not as {lora} would have it; leave lora out to train "
        "what is there, or merge or remove it first"
    )


def _compute_dtype(base: nn.Module, roots: list[nn.Module], before: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype that most of the language model's parameters have, or had before an earlier call cast them.

    Packed weights do not count: what is asked for is the dtype of hidden states.
    """
    quantized = {id(layer.weight) for layer in quantized_layers(base).values()}
    own = {id(p) for root in roots for p in root.parameters()} or {id(p) for p in base.parameters()}
    adapters = {id(p) for layer in lora_layers(base).values() for p in lora_parameters([layer])}
    counts: dict[torch.dtype, int] = {}
    for name, p in base.named_parameters():
        if id(p) in own - quantized - adapters and p.is_floating_point():
            dtype = before.get(_plain(name), p.dtype)
            counts[dtype] = counts.get(dtype, 0) + p.numel()
    return max(counts, key=counts.__getitem__, default=torch.float32)


def _cast(base: nn.Module, wanted: Mapping[int, torch.dtype], before: Mapping[str, torch.dtype]) -> None:
    """Give parameters the dtypes that `wanted` has, and those that an earlier call cast the dtypes that they had."""
    cast: dict[str, torch.dtype] = {}
    for name, p in base.named_parameters():
        original = before.get(_plain(name), p.dtype)
        dtype = wanted.get(id(p), original)
        if dtype != p.dtype:
            p.data = p.data.to(dtype)
            p.grad = None
        if dtype != original:
            cast[_plain(name)] = original
    base.__dict__[_CAST] = cast


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


class StaysInEvaluation:
    """Takes the place of `module.train` on one instance: the module stays in evaluation mode.

    It holds the module, so that a deep copy of the model has one of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        """As `nn.Module.train`, without effect."""
        return nn.Module.train(self.module, False)


def _keep_in_evaluation(base: nn.Module, recipe: Recipe) -> None:
    for module in base.modules():
        if isinstance(module.__dict__.get("train"), StaysInEvaluation):
            del module.__dict__["train"]
            module.train(base.training)
    for path in (*([recipe.vision] if recipe.vision is not None else []), *recipe.evaluation):
        for module in _modules(resolve(base, path)):
            # A norm of the vision model that belongs to the bridge does not make it a trained one.
            sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
            if 2 * sum(size for size, trained in sizes if trained) <= sum(size for size, _ in sizes):
                module.eval()
                module.__dict__["train"] = StaysInEvaluation(module)


def _fuse_options(model: nn.Module) -> dict[str, Any]:
    """Those that the model is fused with already, where it is."""
    states = (state_of(module) for module in model.modules())
    options = next((state.options for state in states if state is not None and state.shared is not None), None)
    if options is None:
        return {}
    return {name: getattr(options, name) for name in ("level", "fixes", "prepack", "cuda_graphs")}


def _labels(
    base: nn.Module,
    recipe: Recipe,
    members: Mapping[str, list[nn.Module | nn.Parameter]],
    roots: list[nn.Module],
) -> dict[str, list[nn.Module | nn.Parameter]]:
    """The rows of the table: what is trained first, LoRA, and then the rest of the model by its large parts."""
    labels = {part: list(found) for part, found in members.items()}
    if layers := lora_layers(base):
        labels[LORA] = list(lora_parameters(layers.values()))
    vision = [] if recipe.vision is None else resolve(base, recipe.vision)
    around = []
    for part, paths in recipe.parts.items():
        found = [m for path in paths for m in resolve(base, path)]
        if any(m in roots for m in found):
            around += found  # the language model and its head
        elif part not in labels and not any(m in vision for m in found):
            labels[part] = found
    labels.setdefault("vision", []).extend(vision)
    labels.setdefault("language model", []).extend([*roots, *around])
    return labels


def _restore_on_failure(undo: contextlib.ExitStack, base: nn.Module) -> None:
    """Whatever fails from here on, the parameters and modes are put back."""
    flags = [(p, p.requires_grad, p.data, p.grad) for p in base.parameters()]
    modes = [(m, m.training, m.__dict__.get("train")) for m in base.modules()]
    cast = base.__dict__.get(_CAST)

    def restore() -> None:
        for p, flag, data, grad in flags:
            if p.dtype != data.dtype:
                p.data = data
                p.grad = grad
            p.requires_grad_(flag)
        for module, training, train in modes:
            module.training = training
            module.__dict__.pop("train", None)
            if train is not None:
                module.__dict__["train"] = train
        base.__dict__.pop(_CAST, None)
        if cast is not None:
            base.__dict__[_CAST] = cast

    undo.callback(restore)


def _modules(found: Iterable[nn.Module | nn.Parameter]) -> list[nn.Module]:
    return [m for m in found if isinstance(m, nn.Module)]


def _submodules(member: nn.Module | nn.Parameter) -> Iterable[nn.Module]:
    return member.modules() if isinstance(member, nn.Module) else ()


def _parameters(member: nn.Module | nn.Parameter) -> Iterable[nn.Parameter]:
    return [member] if isinstance(member, nn.Parameter) else member.parameters()
