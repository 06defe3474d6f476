"""`fuse(model, cuda_graphs=True)`: buckets, invalidation and aliasing, with a stand-in for the GPU."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.modules import graphs
from tests.families import qformers
from tests.families.builders import MEDIA_DIM, idefics, luc_resampler, of_model, of_resampler
from tests.families.captures import Recorder, captured, recorded, skipped
from tests.families.generating import SYSTEMS, System


def media(seed: int = 0, *, images: int = 2, tokens: int = 7) -> Tensor:
    return torch.randn(images, 1, 1, tokens, MEDIA_DIM, generator=torch.Generator().manual_seed(seed))


def twins() -> tuple[nn.Module, nn.Module, Recorder]:
    """(replayed, the same weights without graphs, stand-in) of a resampler."""
    upstream = of_resampler().eval()
    replayed = copy.deepcopy(upstream)
    return replayed, upstream, recorded(replayed)


def check(replayed: nn.Module, upstream: nn.Module, **sizes: int) -> None:
    """Three runs on different inputs: met, captured, replayed."""
    with torch.no_grad():
        for seed in range(3):
            torch.testing.assert_close(replayed(media(seed, **sizes)), upstream(media(seed, **sizes)))


# equal results


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_generation(system: System) -> None:
    """The images are encoded by replays from the third run on, and each run says what upstream says."""
    upstream = system.build()
    fused = copy.deepcopy(upstream)
    recorder = recorded(fused)
    replays = []
    for seed in range(4):
        assert torch.equal(system.generate(fused, seed), system.generate(upstream, seed))
        replays.append(recorder.replays)
    assert replays[0] == 0 and recorder.captures > 0
    # Everything on the image side is replayed: one graph, or vision model and Q-Former.
    assert (
        replays[3] - replays[2]
        == recorder.captures
        == (2 if "blip2" in system.name or "instruct" in system.name else 1)
    )
    assert "captured" in str(mllm_fast.fuse(fused, cuda_graphs=True))


@pytest.mark.parametrize("kind", qformers.KINDS, ids=str)
def test_qformer_with_text_masks_and_shared_queries(kind: qformers.Kind) -> None:
    upstream = kind.build().double()
    fused = copy.deepcopy(upstream)
    recorder = recorded(fused)
    with torch.no_grad():
        for seed in range(3):
            drawn = qformers.draw(seed)
            mask = torch.nn.functional.pad(drawn["text_mask"], (qformers.QUERIES, 0), value=1)
            for ours in (fused, upstream):
                given = kind.text(drawn["tokens"].expand(3, -1, -1), drawn["ids"], ours)
                out = ours(**given, attention_mask=mask, encoder_hidden_states=drawn["image"]).last_hidden_state
                expected = out if ours is fused else expected  # noqa: F821
            torch.testing.assert_close(expected, out, atol=1e-10, rtol=1e-10)
    assert (recorder.captures, recorder.replays) == (1, 2)


def test_requests_for_hidden_states_are_a_shape_of_their_own() -> None:
    upstream = qformers.Kind("blip2").build()
    fused = copy.deepcopy(upstream)
    recorder = recorded(fused)
    with torch.no_grad():
        for seed in range(3):
            drawn = {name: x.float() for name, x in qformers.draw(seed).items() if x.is_floating_point()}
            for hidden in (False, True):
                given = {"query_embeds": drawn["tokens"].expand(3, -1, -1), "encoder_hidden_states": drawn["image"]}
                ours, theirs = (m(**given, output_hidden_states=hidden) for m in (fused, upstream))
                torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
                assert (ours.hidden_states is None) == (not hidden)
                for mine, reference in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
                    torch.testing.assert_close(mine, reference)
    assert (recorder.captures, recorder.replays) == (2, 4)


# buckets


def test_each_shape_and_dtype_has_a_graph_from_its_second_run_on() -> None:
    replayed, upstream, recorder = twins()
    check(replayed, upstream)
    assert (recorder.captures, recorder.replays) == (1, 2)
    check(replayed, upstream, tokens=5)
    check(replayed, upstream, images=3)
    assert captured(replayed) == {"": 3}
    check(replayed, upstream)  # the first shape was not forgotten
    assert (recorder.captures, recorder.replays) == (3, 9)


def test_the_longest_unused_shape_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_BUCKETS", 2)
    replayed, upstream, recorder = twins()
    for tokens in (4, 5, 6):
        check(replayed, upstream, tokens=tokens)
    assert captured(replayed) == {"": 2}
    check(replayed, upstream, tokens=5)
    assert recorder.captures == 3
    check(replayed, upstream, tokens=4)
    assert recorder.captures == 4


def test_the_backend_in_force_is_part_of_the_shape() -> None:
    replayed, upstream, recorder = twins()
    check(replayed, upstream)
    with mllm_fast.backend("torch"):
        check(replayed, upstream)
    assert recorder.captures == 2


@pytest.mark.parametrize("nested", [False, True])
def test_a_call_is_its_leaves_and_a_structure_to_look_up(nested: bool) -> None:
    x, y = torch.zeros(2), torch.ones(3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, y), {}), ((x,), {"a": y}), ((x,), {"b": y}), ((), {"a": x, "b": y}), ((x, None), {"a": 1, "b": y}),
    ]  # fmt: skip
    if nested:
        calls = [((list(args),), {"given": {"inside": kwargs}}) for args, kwargs in calls]
    seen = set()
    for args, kwargs in calls:
        leaves, structure = graphs._flat(args, kwargs)
        assert not any(isinstance(leaf, (list, dict)) for leaf in leaves)
        found_args, found_kwargs = graphs._nested(leaves, structure)
        assert (tuple(found_args), found_kwargs) == (args, kwargs)
        assert graphs._flat(args, dict(kwargs))[1] == structure
        seen.add(structure)
    assert len(seen) == len(calls)


def test_what_is_expanded_stays_one_row_in_the_graph() -> None:
    rows = torch.randn(1, 3, 4).expand(5, -1, -1)
    buffer = graphs._buffer(rows)
    assert buffer.shape == rows.shape and buffer.stride(0) == 0
    assert graphs._kind(rows) != graphs._kind(rows.contiguous())


# weights


def test_weights_written_to_moved_or_replaced() -> None:
    """A resampler's keys and values are projected by weights folded from norms and projections."""
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "optimiser step": lambda m: m.layers[0][0].norm_media.weight.add_(0.5),
        "projection": lambda m: m.layers[1][0].to_kv.weight.mul_(1.5),
        "load_state_dict": lambda m: m.load_state_dict(of_resampler(seed=3).state_dict()),
        "parameter": lambda m: setattr(m.layers[0][0].to_kv, "weight", nn.Parameter(torch.randn(64, MEDIA_DIM))),
        "data": lambda m: setattr(m.latents, "data", m.latents.data * 2),
        "child": lambda m: setattr(m.layers[0][0], "to_q", copy.deepcopy(m.layers[2][0].to_q)),
        "requires_grad": lambda m: m.requires_grad_(False),
    }
    replayed, upstream, recorder = twins()
    check(replayed, upstream)
    for change in changes.values():
        for module in (replayed, upstream):
            torch.manual_seed(0)
            with torch.no_grad():
                change(module)
        check(replayed, upstream)
    assert recorder.captures == len(changes)  # the last one changes no value


def test_the_check_of_the_weights_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the stand-in replays what was folded from old weights, as a GPU would."""
    monkeypatch.setattr(graphs.Fingerprint, "same_weights", lambda self: True)
    replayed, upstream, _ = twins()
    check(replayed, upstream)
    for module in (replayed, upstream):
        with torch.no_grad():
            module.layers[0][0].norm_media.weight.add_(0.5)
    with pytest.raises(AssertionError):
        check(replayed, upstream)


def test_another_dtype() -> None:
    replayed, upstream, recorder = twins()
    check(replayed, upstream)
    for module in (replayed, upstream):
        module.double()
    with torch.no_grad():
        for seed in range(3):
            x = media(seed).double()
            torch.testing.assert_close(replayed(x), upstream(x), atol=1e-12, rtol=1e-12)
    assert recorder.captures == 2


def test_weights_that_were_freed_and_came_back_to_the_same_address() -> None:
    """Address and version may be equal by chance; the storage is not."""
    linear = nn.Linear(3, 3)
    fingerprint = graphs.Fingerprint([linear])
    assert fingerprint.same_modules() and fingerprint.same_weights()
    state = fingerprint._state
    linear.weight.data = torch.randn(3, 3)
    fingerprint._state = fingerprint._read_state()  # as if by chance
    assert fingerprint._state != state and not fingerprint.same_weights()


# aliasing


def test_outputs_belong_to_the_caller_and_inputs_are_left_alone() -> None:
    replayed, upstream, _ = twins()
    check(replayed, upstream)
    with torch.no_grad():
        inputs = [media(seed) for seed in range(2)]
        copies = [x.clone() for x in inputs]
        first = replayed(inputs[0])
        kept = first.clone()
        second = replayed(inputs[1])
        assert torch.equal(first, kept) and not torch.equal(first, second)
        second.zero_()
        assert torch.equal(replayed(inputs[0]), kept)
        assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


def test_inference_mode_and_back() -> None:
    replayed, upstream, recorder = twins()
    with torch.inference_mode():
        for seed in range(3):
            torch.testing.assert_close(replayed(media(seed)), upstream(media(seed)))
    check(replayed, upstream)
    with torch.inference_mode():
        assert replayed(media()).is_inference()
    assert recorder.captures == 1


# what is not captured


def test_training_gradients_autocast_and_hooks_take_the_ordinary_path() -> None:
    replayed, upstream, recorder = twins()
    check(replayed, upstream)
    replays = recorder.replays
    out = replayed(media())
    assert "gradients" in skipped(replayed)
    out.sum().backward()
    assert replayed.latents.grad is not None
    with torch.no_grad():
        replayed.train()
        replayed(media())
        assert "training" in skipped(replayed)
        replayed.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert replayed(media()).dtype == upstream(media()).dtype
        assert "autocast" in skipped(replayed)
        seen = []
        handle = replayed.layers[0][0].to_q.register_forward_hook(lambda *_: seen.append(1))
        replayed(media())
        assert "hook" in skipped(replayed) and seen
        handle.remove()
        assert recorder.replays == replays
        replayed(media())
        assert recorder.replays == replays + 1 and not skipped(replayed)


def test_a_capture_that_fails_is_not_tried_again() -> None:
    replayed, upstream, recorder = twins()
    recorder.fails = True
    check(replayed, upstream)
    assert skipped(replayed) == "its capture failed: operation not permitted when stream is capturing"
    recorder.fails = False
    check(replayed, upstream)
    assert recorder.captures == 0
    check(replayed, upstream, tokens=5)
    assert recorder.captures == 1


def test_packed_weights() -> None:
    class Packed(nn.Parameter):
        pass

    replayed, _, recorder = twins()
    replayed.layers[0][0].to_q.weight = Packed(replayed.layers[0][0].to_q.weight.detach())
    with torch.no_grad():
        for seed in range(3):
            replayed(media(seed))
    assert recorder.captures == 0 and "packed" in skipped(replayed)


def test_in_a_trace() -> None:
    replayed, upstream, recorder = twins()
    check(replayed, upstream)
    replays = recorder.replays
    with torch.no_grad():
        ours = torch.compile(replayed, fullgraph=True, backend="eager")(media())
        torch.testing.assert_close(ours, upstream(media()))
    assert recorder.replays == replays


def test_on_a_cpu_the_report_says_why_not() -> None:
    model = idefics()
    report = mllm_fast.fuse(model, cuda_graphs=True)
    assert {row.path for row in report.graphs} == {"model", "model.perceiver_resampler"}
    assert all(row.status == "not captured: on cpu there are no CUDA graphs" for row in report.graphs)
    assert "CUDA graphs" in str(report)
    assert not mllm_fast.fuse(idefics()).graphs


# the model around it


def test_parts_of_a_captured_run_are_not_captured_themselves() -> None:
    fused = of_model()
    recorder = recorded(fused)
    for seed in range(3):
        SYSTEMS[0].generate(fused, seed)
    assert captured(fused) == {"": 1, "perceiver": 0} and recorder.captures == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_start_without_graphs(how: Callable[[nn.Module], nn.Module]) -> None:
    upstream = luc_resampler().eval()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, cuda_graphs=True)
    x = torch.randn(2, 2, 7, MEDIA_DIM)
    with torch.no_grad():
        for _ in range(2):
            fused(x)
        other = how(fused)
        assert captured(other) == {"": 0}
        recorder = Recorder()
        other._mllm_fast.shared.capture = recorder
        for seed in range(3):
            x = torch.randn(2, 2, 7, MEDIA_DIM, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(other(x), upstream(x))
    assert recorder.captures == 1


def test_unfuse_drops_the_graphs() -> None:
    fused, upstream = qformers.generator("blip2"), qformers.generator("blip2")
    classes = [type(m) for m in fused.modules()]
    recorded(fused)
    assert [type(m) for m in fused.modules()] != classes
    mllm_fast.unfuse(fused)
    assert [type(m) for m in fused.modules()] == classes
    assert not any("_mllm_fast" in m.__dict__ for m in fused.modules())
    mllm_fast.fuse(fused)
    assert captured(fused) == {} and type(fused.vision_model) is type(upstream.vision_model)


def test_fusing_again_with_other_options_is_refused() -> None:
    model = of_model()
    mllm_fast.fuse(model, cuda_graphs=True)
    before = [type(m) for m in model.modules()]
    for options in ({}, {"level": 2, "cuda_graphs": True}, {"fixes": "all", "cuda_graphs": True}):
        with pytest.raises(ValueError, match=r"is fused already, with level 1, fixes: none, CUDA graphs; .*unfuse"):
            mllm_fast.fuse(model, **options)
    assert [type(m) for m in model.modules()] == before
    assert not mllm_fast.fuse(model, cuda_graphs=True).fused
    mllm_fast.unfuse(model)
    assert mllm_fast.fuse(model, level=2).options.level == 2


def test_a_saved_model_holds_no_graphs() -> None:
    replayed, upstream, _ = twins()
    check(replayed, upstream)
    assert replayed.state_dict().keys() == upstream.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(replayed.state_dict(), buffer)
