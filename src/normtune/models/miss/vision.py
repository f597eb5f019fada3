"""The image encoder: a vision transformer (Dosovitskiy et al. 2021), named as in MISS's checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from normtune.errors import InputError
from normtune.models.miss.attention import join_heads, with_prefix
from normtune.models.miss.config import VisionDims


def resize_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Bicubic resampling of position embeddings [1, 1 + side * side, width] to a grid of rows x columns.

    The first is the class token's and stays (BLIP's `interpolate_pos_embed`).
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    first, grid = positions[:, :1], positions[:, 1:]
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat((first, grid.to(positions.dtype).permute(0, 2, 3, 1).flatten(1, 2)), 1)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops the branch of a whole image."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = torch.empty((len(branch), 1, 1), dtype=branch.dtype, device=branch.device).bernoulli_(keep)
        return branch * kept / keep


class VisionAttention(nn.Module):
    """Self-attention with one projection for query, key and value; `prefix` as in `SelfAttention`."""

    prefix: nn.Module | None

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.heads = dims.num_attention_heads
        self.qkv = nn.Linear(dims.hidden_size, 3 * dims.hidden_size)
        self.proj = nn.Linear(dims.hidden_size, dims.hidden_size)
        self.register_module("prefix", None)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        joint = self.qkv(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, length, head_dim]
        key, value, _ = with_prefix(self.prefix, key, value)
        return self.proj(join_heads(F.scaled_dot_product_attention(query, key, value)))


class VisionMlp(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims.hidden_size, dims.intermediate_size)
        self.act = ACT2FN[dims.hidden_act]
        self.fc2 = nn.Linear(dims.intermediate_size, dims.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class VisionBlock(GradientCheckpointingLayer):
    """One pre-norm transformer block."""

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
    """Pixels -> one vector a patch."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dims.hidden_size, kernel_size=dims.patch_size, stride=dims.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values)  # [images, width, rows, columns]


class VisionTransformer(nn.Module):
    """Images -> states of the class token and of every patch."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.patch_size = dims.patch_size
        side = dims.image_size // dims.patch_size
        self.patch_embed = PatchEmbed(dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dims.hidden_size))
        depth = dims.num_hidden_layers
        rates = [dims.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList([VisionBlock(dims, rate) for rate in rates])
        self.norm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, 1 + patches, hidden_size].

        Raises:
            InputError: height or width is not a multiple of the patch.
        """
        height, width = pixel_values.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"images of {width} x {height} pixels do not divide into patches of {self.patch_size}. "
                "Resize them to a multiple of it."
            )
        patches = self.patch_embed(pixel_values.to(self.pos_embed.dtype))
        positions = resize_positions(self.pos_embed, *patches.shape[-2:])
        first = self.cls_token.expand(len(patches), -1, -1)
        hidden = torch.cat((first, patches.flatten(2).transpose(1, 2)), 1) + positions
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)
