"""The image encoder of MISS: a vision transformer (Dosovitskiy et al. 2021) with MISS's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from normtune.errors import InputError
from normtune.models.miss.attention import join_heads, prepend_prefix
from normtune.models.miss.config import VisionDims


def resize_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Resample position embeddings to a grid of another size (bicubic; BLIP's `interpolate_pos_embed`).

    Args:
        positions: [1, 1 + side * side, width]; the first belongs to the class token and does not change.
        rows, columns: patches of the image vertically and horizontally.

    Returns:
        [1, 1 + rows * columns, width].
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    first, grid = positions[:, :1], positions[:, 1:]
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, width, side, side]
    grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat((first, grid.to(positions.dtype).permute(0, 2, 3, 1).flatten(1, 2)), 1)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops a residual branch for whole images at random.

    Branches that remain are scaled by 1 / (1 - rate), so that the expected value does not change.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        mask = torch.empty((len(branch), 1, 1), dtype=branch.dtype, device=branch.device).bernoulli_(keep)
        return branch * mask / keep


class VisionAttention(nn.Module):
    """Self-attention with one projection for query, key and value; `prefix` as in `text.SelfAttention`."""

    prefix: nn.Module | None

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.heads = dims.num_attention_heads
        self.qkv = nn.Linear(dims.hidden_size, 3 * dims.hidden_size)
        self.proj = nn.Linear(dims.hidden_size, dims.hidden_size)
        self.register_module("prefix", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, width] -> the same shape; length is 1 + patches."""
        batch, length, width = hidden.shape
        joint = self.qkv(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, length, head_dim]
        key, value, _ = prepend_prefix(self.prefix, key, value)
        return self.proj(join_heads(F.scaled_dot_product_attention(query, key, value)))


class VisionMlp(nn.Module):
    """The feed-forward network of a block."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims.hidden_size, dims.intermediate_size)
        self.act = ACT2FN[dims.hidden_act]
        self.fc2 = nn.Linear(dims.intermediate_size, dims.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class VisionBlock(GradientCheckpointingLayer):
    """One transformer block; the norms precede attention and feed-forward network (pre-norm)."""

    def __init__(self, dims: VisionDims, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)
        self.attn = VisionAttention(dims)
        self.norm2 = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)
        self.mlp = VisionMlp(dims)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.drop_path(self.attn(self.norm1(hidden)))
        return hidden + self.drop_path(self.mlp(self.norm2(hidden)))


class PatchEmbed(nn.Module):
    """Embeds patches: a convolution with kernel and stride of the patch size."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dims.hidden_size, kernel_size=dims.patch_size, stride=dims.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values)  # [images, 3, height, width] -> [images, hidden_size, rows, columns]


class VisionTransformer(nn.Module):
    """Encodes images: one state for the class token and one for each patch."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.patch_size = dims.patch_size
        side = dims.image_size // dims.patch_size
        self.patch_embed = PatchEmbed(dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dims.hidden_size))
        depth = dims.num_hidden_layers
        # stochastic depth grows linearly from 0 in the first block to the full rate in the last
        rates = [dims.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList([VisionBlock(dims, rate) for rate in rates])
        self.norm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, 1 + patches, hidden_size].

        Raises:
            InputError: height or width is not a multiple of the patch size.
        """
        height, width = pixel_values.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"images of {width} x {height} pixels do not divide into patches of {self.patch_size}. "
                "Resize them to a multiple of the patch size."
            )
        patches = self.patch_embed(pixel_values.to(self.pos_embed.dtype))
        positions = resize_positions(self.pos_embed, *patches.shape[-2:])
        class_token = self.cls_token.expand(len(patches), -1, -1)  # [images, 1, hidden_size]
        # patches row by row: [images, hidden_size, rows, columns] -> [images, rows * columns, hidden_size]
        hidden = torch.cat((class_token, patches.flatten(2).transpose(1, 2)), 1) + positions
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)
