"""CrossAttentionProjector against the released code's numbers, and against its formula written out."""

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from golden_files import DTYPES, arguments, assert_recorded, golden, inputs, names, under
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feature_store.errors import InputError
from student_trainer.methods.cap import CrossAttentionProjector, raster_to_window, window_to_raster
from student_trainer.official import load_projector, projector_names

CASES = names("cap_")
MODES = ("train", "eval")


def official_projector(case: str, token_order: str = "window") -> CrossAttentionProjector:
    args = arguments(case)
    projector = CrossAttentionProjector(
        args["student_dims"],
        args["teacher_dims"],
        query_hw=tuple(args["query_hw"]),
        key_hw=tuple(args["pos_hw"]),
        num_heads=args["num_heads"],
        softmax_scale=args["softmax_scale"],
        windows=tuple(args["window_shapes"]),
        learned_query=args["self_query"],
        norm="layer" if "convnext" in args["official_class"] else "batch",
        token_order=token_order,
    )
    load_projector(projector, under(golden(case), "param/"))
    return projector


@dataclass
class Run:
    output: Tensor
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    middle: dict[str, Tensor] = field(default_factory=dict)


@cache
def run(case: str, mode: str, dtype: torch.dtype) -> Run:
    arrays, projector = inputs(case, dtype), official_projector(case).to(dtype).train(mode == "train")
    middle: dict[str, Tensor] = {}
    projector.query_proj.register_forward_hook(lambda _, args, out: middle.update(q_tokens=out))
    projector.to_k.register_forward_hook(lambda _, args, out: middle.update(kv_tokens=args[0]))
    projector.norm.register_forward_hook(lambda _, args, out: middle.update(attn_out=args[0], norm_out=out))
    leaves = {"x": arrays["x"].requires_grad_()}
    if arguments(case)["external_query_passed"]:
        leaves["query"] = arrays["query"].requires_grad_()
    output = projector(leaves["x"], leaves.get("query"))
    (output * arrays["cot"]).sum().backward()
    parameters = dict(projector.named_parameters())
    own = {name: ours for name, ours in projector_names(projector).items() if ours in parameters}
    shapes = {name: golden(case)[f"param/{name}"].shape for name in own}
    found = {name: parameters[ours].grad for name, ours in own.items()}
    return Run(
        output,
        {name: leaf if leaf is None else leaf.reshape(shapes[name]) for name, leaf in found.items()}
        | {f"input {name}": leaf.grad for name, leaf in leaves.items()},
        {name: projector.state_dict()[ours] for name, ours in projector_names(projector).items() if name not in own},
        middle,
    )


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_projector_gives_released_output_when_released_weights_are_loaded(case, mode, dtype):
    released = golden(case)[f"{mode}/out_f64"]
    assert_recorded(lambda dtype: {"output": run(case, mode, dtype).output}, dtype, {"output": released})


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_projector_gives_released_gradients_when_released_weights_are_loaded(case, mode, dtype):
    arrays = golden(case)
    expected = under(arrays, f"{mode}/grad_f64/")
    expected |= {f"input {name}": arrays[f"{mode}/grad_{name}_f64"] for name in ("x", "query")
                 if f"{mode}/grad_{name}_f64" in arrays}  # fmt: skip
    assert_recorded(lambda dtype: run(case, mode, dtype).gradients, dtype, expected)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_projector_updates_batchnorm_as_released_when_training(case, dtype):
    released = under(golden(case), "train/buffer_after_f64/")
    assert_recorded(lambda dtype: run(case, "train", dtype).buffers, dtype, released)


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_projector_passes_through_released_intermediates_when_training(case):
    expected = under(golden(case), "train/mid_")
    got = run(case, "train", torch.float64).middle
    expanded = {name: leaf.expand_as(expected[name]) for name, leaf in got.items()}
    assert_recorded(lambda _: expanded, torch.float64, expected)


@pytest.mark.golden
@pytest.mark.parametrize("case", [case for case in CASES if arguments(case)["window_shapes"] != [1, 1]])
def test_projector_gives_released_tokens_in_raster_order_when_windowed_by_default(case):
    args, arrays = arguments(case), inputs(case, torch.float64)
    projector = official_projector(case, token_order="raster").double().eval()
    raster = projector(arrays["x"], arrays["query"] if args["external_query_passed"] else None)
    released = golden(case)["eval/out_f64"]
    windowed = raster_to_window(raster, args["query_hw"], args["window_shapes"])
    assert_recorded(lambda _: {"output": windowed}, torch.float64, {"output": released})
    assert not torch.allclose(raster, released)


def written_out(projector: CrossAttentionProjector, x: Tensor, query: Tensor, softmax_scale: float = 3.0) -> Tensor:
    """The class docstring's formula, window by window and head by head with an explicit softmax."""
    (rows, columns), heads, dim = projector.windows, projector.num_heads, projector.teacher_dim
    z = projector.key_proj(x) + projector.position
    u = torch.relu(projector.query_proj[0](query)).unflatten(1, projector.query_hw).movedim(-1, 1)
    a = torch.zeros_like(u)
    for row in range(rows):
        for column in range(columns):
            q, k = (
                torch.tensor_split(torch.tensor_split(grid, rows, 2)[row], columns, 3)[column].flatten(2).mT
                for grid in (u, z)
            )
            out = torch.tensor_split(torch.tensor_split(a, rows, 2)[row], columns, 3)[column]
            heads_out = []
            for queries, keys, values in zip(
                *(part.chunk(heads, dim=2) for part in (projector.to_q(q), projector.to_k(k), projector.to_v(k))),
                strict=True,
            ):
                logits = queries @ keys.mT * softmax_scale / (dim / heads) ** 0.5
                heads_out.append(logits.softmax(dim=2) @ values)
            out += torch.cat(heads_out, dim=2).mT.unflatten(2, out.shape[2:])
    n = projector.norm(projector.to_out(a.flatten(2).mT))
    return n + projector.mlp[2](torch.relu(projector.mlp[0](n)))


@settings(max_examples=25, deadline=None)
@given(
    windows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    query_window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    key_window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    heads=st.integers(1, 3),
    learned_query=st.booleans(),
)
def test_projector_equals_the_written_out_formula_when_grids_windows_and_heads_vary(
    windows, query_window, key_window, heads, learned_query
):
    torch.manual_seed(0)
    query_hw, key_hw = ((windows[0] * h, windows[1] * w) for h, w in (query_window, key_window))
    projector = CrossAttentionProjector(
        5, 4 * heads, query_hw, key_hw, heads, softmax_scale=3.0, windows=windows, learned_query=learned_query
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 5, *key_hw, dtype=torch.float64)
    outside = None if learned_query else torch.randn(2, query_hw[0] * query_hw[1], 4 * heads, dtype=torch.float64)
    query = projector.query.expand(2, -1, -1) if outside is None else outside
    with torch.no_grad():
        torch.testing.assert_close(projector(x, outside), written_out(projector, x, query), rtol=1e-10, atol=1e-10)


def test_projector_ignores_its_learned_query_when_one_is_passed():
    torch.manual_seed(0)
    projector = CrossAttentionProjector(4, 8, (2, 3), (3, 2), num_heads=2)
    x, query = torch.randn(2, 4, 3, 2), torch.randn(2, 6, 8)
    projector(x, query).sum().backward()
    assert projector.query.grad is None
    assert not torch.equal(projector(x, query), projector(x))


def test_projector_keeps_its_query_out_of_the_output_when_values_vanish():
    """No residual from the query: with no values to look up, all queries give the same token."""
    projector = CrossAttentionProjector(4, 8, (2, 2), (2, 2), num_heads=2)
    for leaf in (projector.to_v.weight, projector.to_v.bias):
        torch.nn.init.zeros_(leaf)
    out = projector(torch.randn(1, 4, 2, 2))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


@pytest.mark.parametrize(("grid", "windows"), [((4, 6), (2, 3)), ((6, 4), (3, 1)), ((1, 5), (1, 5)), ((3, 3), (1, 1))])
def test_window_order_is_a_permutation_undone_by_raster_order_when_grid_is_cut(grid, windows):
    raster = torch.arange(grid[0] * grid[1])[None, :, None]
    window = raster_to_window(raster, grid, windows)
    assert sorted(window.flatten().tolist()) == raster.flatten().tolist()
    assert torch.equal(window_to_raster(window, grid, windows), raster)
    pieces = [
        column for row in raster.view(grid).tensor_split(windows[0], 0) for column in row.tensor_split(windows[1], 1)
    ]
    assert torch.equal(window.flatten(), torch.cat([piece.flatten() for piece in pieces]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 does not divide the teacher's 8 channels"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"windows": (2, 2)}, r"windows \(2, 2\) do not divide query_hw \(4, 3\)"),
        ({"windows": (2, 1)}, r"windows \(2, 1\) do not divide key_hw \(5, 5\)"),
        ({"windows": (0, 1)}, r"windows \(0, 1\)"),
        ({"norm": "group"}, "norm is 'group', expected one of batch, layer"),
        ({"patchify": "none"}, "patchify is 'none', expected one of full, separable"),
        ({"token_order": "column"}, "token_order is 'column', expected one of raster, window"),
    ],
)
def test_projector_refuses_when_dimensions_are_impossible(change, message):
    dimensions = {"student_dim": 4, "teacher_dim": 8, "query_hw": (4, 3), "key_hw": (5, 5), "num_heads": 2}
    with pytest.raises(InputError, match=message):
        CrossAttentionProjector(**{**dimensions, **change})


def test_projector_refuses_when_there_is_no_query():
    projector = CrossAttentionProjector(4, 8, (2, 2), (2, 2), num_heads=2, learned_query=False)
    with pytest.raises(InputError, match="no learned query"):
        projector(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("x", "query", "message"),
    [
        ((2, 5, 2, 3), None, r"student map has shape \(2, 5, 2, 3\), expected \(B, 4, 2, 3\)"),
        ((2, 4, 3, 2), None, r"student map has shape \(2, 4, 3, 2\)"),
        ((2, 4, 2, 3), (1, 4, 8), r"query has shape \(1, 4, 8\), expected \(2, 4, 8\)"),
        ((2, 4, 2, 3), (2, 6, 8), r"query has shape \(2, 6, 8\), expected \(2, 4, 8\)"),
    ],
)
def test_projector_names_both_shapes_when_an_input_does_not_fit(x, query, message):
    projector = CrossAttentionProjector(4, 8, (2, 2), (2, 3), num_heads=2)
    with pytest.raises(InputError, match=message):
        projector(torch.zeros(x), None if query is None else torch.zeros(query))


def test_projector_stays_close_to_float32_when_run_under_bfloat16_autocast():
    torch.manual_seed(0)
    projector = CrossAttentionProjector(4, 8, (2, 2), (3, 3), num_heads=2).eval()
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = projector(x)
    torch.testing.assert_close(low.float(), projector(x), rtol=0.05, atol=0.1)
    assert F.cosine_similarity(low.float(), projector(x), dim=-1).min() > 0.999


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_separable_projector_equals_a_full_convolution_of_the_same_kernel(norm):
    """1x1 to the teacher's width, then depthwise 3x3: a 3x3 convolution whose kernel is their product."""
    torch.manual_seed(0)
    projector = CrossAttentionProjector(5, 8, (2, 3), (4, 4), num_heads=2, norm=norm, patchify="separable").double()
    pointwise, depthwise = projector.key_proj[0]
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    kernel = torch.einsum("dhw,dc->dchw", depthwise.weight[:, 0], pointwise.weight[:, :, 0, 0])
    padded = F.pad(x, (1, 1, 1, 1))
    bias = F.pad(pointwise.bias[None, :, None, None].expand(2, -1, 4, 4), (1, 1, 1, 1))
    whole = F.conv2d(padded, kernel) + F.conv2d(bias, depthwise.weight, depthwise.bias, groups=8)
    torch.testing.assert_close(projector.key_proj[0](x), whole)
    query = projector.query.expand(2, -1, -1)
    expected = written_out(projector, x, query, softmax_scale=5.0)
    torch.testing.assert_close(projector(x), expected, rtol=1e-9, atol=1e-9)
    assert projector.position.shape == (1, 8, 4, 4)


def test_separable_projector_is_smaller_when_the_student_is_wide():
    def size(patchify):
        return sum(
            leaf.numel() for leaf in CrossAttentionProjector(64, 16, (2, 2), (2, 2), 2, patchify=patchify).parameters()
        )

    full, separable = 9 * 64 * 64 + 64, 64 * 16 + 16 + 9 * 16 + 16  # convolutions
    narrower = (64 - 16) * (2 + 4 + 2 * 16)  # norm, position, keys and values
    assert size("full") - size("separable") == full - separable + narrower
