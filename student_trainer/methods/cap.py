"""CAP, the cross attention projector.

Shape legend: B batch, C student channels, D teacher channels, H W student grid (keys), N query positions,
L = H*W key positions, S windows, A attention heads, E = D / A channels of one head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from feature_store.errors import InputError

Grid = tuple[int, int]


class CrossAttentionProjector(nn.Module):
    """Maps a student feature map to tokens on the teacher's grid, in the teacher's width (CAP of the paper).

    With z the student's tokens, u the query tokens and s the softmax scale::

        z = ReLU(norm(patchify(x))) + position
        u = ReLU(W_p q + b_p)
        a = softmax(s / sqrt(E) * Q(u) K(z)^T) V(z)
        n = LayerNorm(W_o a + b_o)
        out = n + MLP(n)

    There is no residual from the query: the output is made of the student's values alone. patchify is the released 3x3
    convolution from C to C channels, which takes most of the FLOPs of wide students; or, separable, a 1x1 convolution
    from C to D and a depthwise 3x3 one, keys and values then being made of D channels.

    Attributes:
        query: Learned queries [N, D] drawn from N(0, 1), or None if they always come from outside.
        position: Learned positional embedding of the student grid [1, C, H, W]; [1, D, H, W] if separable.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        query_hw: Grid,
        key_hw: Grid,
        num_heads: int,
        softmax_scale: float = 5.0,
        windows: Grid = (1, 1),
        learned_query: bool = True,
        norm: Literal["batch", "layer"] = "batch",
        token_order: Literal["raster", "window"] = "raster",
        patchify: Literal["full", "separable"] = "full",
    ) -> None:
        """Build the projector.

        Args:
            student_dim: Channels C of the student map.
            teacher_dim: Channels D of the queries and the output.
            query_hw: Grid of the queries, i.e. of the output.
            key_hw: Grid of the student map.
            num_heads: Attention heads A; must divide teacher_dim.
            softmax_scale: Factor on the attention logits on top of 1 / sqrt(E).
            windows: Rows and columns of windows; window i of the queries sees window i of the keys only.
            learned_query: Hold learned queries. Without them forward needs query_BND.
            norm: Norm of the student map: ``batch``, or ``layer`` over channels, as released for Swin-T.
            token_order: Order of the output tokens: ``raster``, or ``window`` (window by window, as the
                released code returns them). Equal for windows (1, 1).
            patchify: Convolution of the student map, see above; ``full`` as released.

        Raises:
            InputError: Heads that do not divide the width, windows that do not divide a grid, unknown name.
        """
        super().__init__()
        _check_geometry(teacher_dim, query_hw, key_hw, num_heads, windows)
        _check_name("norm", norm, ("batch", "layer"))
        _check_name("token_order", token_order, ("raster", "window"))
        _check_name("patchify", patchify, ("full", "separable"))
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.query_hw, self.key_hw, self.windows = query_hw, key_hw, windows
        self.num_heads, self.token_order = num_heads, token_order
        self.scale = softmax_scale * (teacher_dim // num_heads) ** -0.5

        key_dim = student_dim if patchify == "full" else teacher_dim
        convolution = _patchify(student_dim, key_dim, separable=patchify == "separable")
        norm_layer = nn.BatchNorm2d(key_dim) if norm == "batch" else LayerNorm2d(key_dim, eps=1e-5)
        self.key_proj = nn.Sequential(convolution, norm_layer, nn.ReLU())
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, key_dim, *key_hw), std=0.02))
        queries = query_hw[0] * query_hw[1]
        self.query = nn.Parameter(torch.randn(queries, teacher_dim)) if learned_query else None
        self.query_proj = nn.Sequential(nn.Linear(teacher_dim, teacher_dim), nn.ReLU())
        self.to_q = nn.Linear(teacher_dim, teacher_dim)
        self.to_k = nn.Linear(key_dim, teacher_dim)
        self.to_v = nn.Linear(key_dim, teacher_dim)
        self.to_out = nn.Linear(teacher_dim, teacher_dim)
        self.norm = nn.LayerNorm(teacher_dim)
        self.mlp = nn.Sequential(
            nn.Linear(teacher_dim, 4 * teacher_dim), nn.ReLU(), nn.Linear(4 * teacher_dim, teacher_dim)
        )

    def forward(self, student_BCHW: Tensor, query_BND: Tensor | None = None) -> Tensor:
        """Project a student map.

        Args:
            student_BCHW: The student's feature map on ``key_hw``.
            query_BND: Queries from outside, raster order; they go before the learned ones.

        Returns:
            Tokens [B, N, D] in ``token_order``.

        Raises:
            InputError: A shape that does not fit, or no query from either side.
        """
        z_BLC = self.key_tokens(student_BCHW)
        u_BND = self.query_tokens(query_BND, batch=len(student_BCHW))
        n_BND = self.norm(self.attend(u_BND, z_BLC))
        return n_BND + self.mlp(n_BND)

    def key_tokens(self, student_BCHW: Tensor) -> Tensor:
        """The tokens z [B, L, C] ([B, L, D] if separable) that keys and values are made of, raster order."""
        expected = (self.student_dim, *self.key_hw)
        if student_BCHW.shape[1:] != expected:
            raise InputError(
                f"student map has shape {tuple(student_BCHW.shape)}, expected (B, {str(expected)[1:]}; "
                "build the projector with the student's own channels and grid"
            )
        return (self.key_proj(student_BCHW) + self.position).flatten(2).transpose(1, 2)

    def query_tokens(self, query_BND: Tensor | None, batch: int) -> Tensor:
        """The tokens u [B, N, D] that look the student up, raster order; [1, N, D] if they are learned."""
        if query_BND is not None:
            expected = (batch, self.query_hw[0] * self.query_hw[1], self.teacher_dim)
            if query_BND.shape != expected:
                raise InputError(f"query has shape {tuple(query_BND.shape)}, expected {expected}")
            return self.query_proj(query_BND)
        if self.query is None:
            raise InputError(
                "the projector has no learned query and got none; pass query_BND or build it with learned_query=True"
            )
        return self.query_proj(self.query)[None]

    def attend(self, u_BND: Tensor, z_BLC: Tensor) -> Tensor:
        """Attention output W_o a + b_o [B, N, D], window by window, in ``token_order``."""
        batch = len(z_BLC)
        q_BND = self.to_q(u_BND).expand(batch, -1, -1)  # learned queries are projected once, not once per sample
        q = self._heads(q_BND, self.query_hw)
        k = self._heads(self.to_k(z_BLC), self.key_hw)
        v = self._heads(self.to_v(z_BLC), self.key_hw)
        a_BSANE = attention(q, k, v, self.scale).unflatten(0, (batch, -1))
        a_BND = a_BSANE.transpose(2, 3).flatten(3).flatten(1, 2)
        if self.token_order == "raster":
            a_BND = window_to_raster(a_BND, self.query_hw, self.windows)
        return self.to_out(a_BND)

    def _heads(self, x_BND: Tensor, grid: Grid) -> Tensor:
        """Raster tokens as [B * S, A, tokens of a window, E]; the fused kernels want four axes."""
        windows = self.windows[0] * self.windows[1]
        x_BSND = raster_to_window(x_BND, grid, self.windows).unflatten(1, (windows, -1))
        return x_BSND.flatten(0, 1).unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def _patchify(student_dim: int, key_dim: int, *, separable: bool) -> nn.Module:
    if not separable:
        return nn.Conv2d(student_dim, key_dim, 3, padding=1)
    return nn.Sequential(nn.Conv2d(student_dim, key_dim, 1), nn.Conv2d(key_dim, key_dim, 3, padding=1, groups=key_dim))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * Q K^T) V over the last two axes.

    Half precision takes torch's fused kernels. Wider dtypes take the plain formula, whose float32 rounding is smaller
    than that of the fused CPU kernel; how far both are from float64 depends on the processor.
    """
    if q.dtype in (torch.float16, torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return (scale * q @ k.mT).softmax(dim=-1) @ v


def raster_to_window(x_BND: Tensor, grid: Grid, windows: Grid) -> Tensor:
    """Reorder tokens from row by row to window by window, windows and the tokens in them row by row."""
    (height, width), (rows, columns) = grid, windows
    return x_BND.unflatten(1, (rows, height // rows, columns, width // columns)).transpose(2, 3).flatten(1, 4)


def window_to_raster(x_BND: Tensor, grid: Grid, windows: Grid) -> Tensor:
    """Inverse of raster_to_window."""
    (height, width), (rows, columns) = grid, windows
    return x_BND.unflatten(1, (rows, columns, height // rows, width // columns)).transpose(2, 3).flatten(1, 4)


def _check_geometry(teacher_dim: int, query_hw: Grid, key_hw: Grid, num_heads: int, windows: Grid) -> None:
    if num_heads < 1 or teacher_dim % num_heads:
        raise InputError(
            f"num_heads {num_heads} does not divide the teacher's {teacher_dim} channels; choose a divisor"
        )
    if min(windows) < 1:
        raise InputError(f"windows {tuple(windows)} is not a number of rows and columns; expected at least (1, 1)")
    for name, grid in (("query_hw", query_hw), ("key_hw", key_hw)):
        if grid[0] % windows[0] or grid[1] % windows[1]:
            raise InputError(
                f"windows {tuple(windows)} do not divide {name} {tuple(grid)}; "
                "choose windows that divide both grids, e.g. (1, 1)"
            )


def _check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{field} is {value!r}, expected one of {', '.join(known)}")
