"""Tiny LLaVA-Med checkpoints in their original layouts, and a reference of what they compute in plain torch.

Tensor names, files and config fields are those of the released checkpoints. The reference computes CLIP's
features of one layer, the projector, and the language model on the embeddings; CLIP and the language model
are transformers' own classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from normtune.errors import InputError
from normtune.models.importers.llava_med.importer import import_llava_med
from tests.support.tiny_models import TEXT_SIZES, VISION_SIZES, bpe_tokenizer

FileFormat = Literal["safetensors", "bin", "old bin"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE, PATCHES = 32, 16
IMAGE_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
HEADS: dict[str, Any] = {"vision_heads": 2}  # the tiny encoder's heads are not 64 wide, which the importer assumes
VISION = {**VISION_SIZES, "num_hidden_layers": 3, "projection_dim": 32}
TOWER = "model.vision_tower.vision_tower.vision_model."


@dataclass
class OriginalModel:
    """The modules from which a checkpoint is written."""

    clip: Any
    language: Any
    projector: dict[str, Tensor]
    tokenizer: Any
    layer: int = -2

    @torch.no_grad()
    def logits(self, pixels: Tensor, before: list[int], after: list[int]) -> Tensor:
        """The logits [tokens, vocabulary] of a text around an image; pixels [3, side, side]."""
        vision_output = self.clip(pixels[None].to(self.clip.dtype), output_hidden_states=True)
        features = vision_output.hidden_states[self.layer][:, 1:]
        layer_names = {name.rpartition(".")[0]: None for name in self.projector}
        for i, name in enumerate(layer_names):
            if i:
                features = F.gelu(features)
            weight, bias = (self.projector[f"{name}.{kind}"] for kind in ("weight", "bias"))
            features = F.linear(features, weight, bias)
        embed = self.language.get_input_embeddings()
        parts = [embed(torch.tensor([before])), features, embed(torch.tensor([after]))]
        return self.language(inputs_embeds=torch.cat(parts, 1)).logits[0]

    def split_prompt(self, prompt: str) -> tuple[list[int], list[int]]:
        """The token ids before and after <image>; like the original code, it tokenises them separately."""
        before, after = (self.tokenizer(part).input_ids for part in prompt.split("<image>"))
        assert before[0] == after[0] == self.tokenizer.bos_token_id
        return before, after[1:]


def randomize(model: torch.nn.Module) -> Any:
    """Draw weights that give distinct logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def build_tokenizer(*special: str, **named_tokens: Any) -> Any:
    return bpe_tokenizer(
        ["<unk>", "<s>", "</s>", *special],
        sentencepiece=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **named_tokens,
    )


def make_original(version: Literal["1.5", "1.0"] = "1.5", dtype: torch.dtype = torch.float32) -> OriginalModel:
    torch.manual_seed(0)
    words = build_tokenizer() if version == "1.5" else build_tokenizer("[PAD]", *IMAGE_TOKENS, pad_token="[PAD]")
    sizes = {**TEXT_SIZES, "vocab_size": len(words), "rms_norm_eps": 1e-5}
    if version == "1.5":
        language: Any = MistralForCausalLM(MistralConfig(**sizes, rope_theta=1e6, sliding_window=None))
        shapes = {"model.mm_projector.0": (32, 32), "model.mm_projector.2": (32, 32)}
    else:
        language = LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 4}))
        shapes = {"model.mm_projector": (32, 32)}
    projector = {}
    for name, shape in shapes.items():
        projector[f"{name}.weight"] = torch.randn(shape).div(shape[1] ** 0.5).to(dtype)
        projector[f"{name}.bias"] = torch.randn(shape[0]).mul(0.1).to(dtype)
    clip = randomize(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    return OriginalModel(clip.to(dtype), randomize(language).to(dtype), projector, words)


def clip_tensors(clip: Any) -> dict[str, Tensor]:
    """The tensors by the names of transformers 4, as released: with the prefix `vision_model.`."""
    return {f"vision_model.{name}": tensor for name, tensor in clip.state_dict().items()}


def original_tensors(original: OriginalModel, *, tower: bool) -> dict[str, Tensor]:
    """The tensors by their original names, in the order of the original modules."""
    tensors = dict(original.language.state_dict())
    head = tensors.pop("lm_head.weight")
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if tower:
        tensors |= {
            TOWER.removesuffix("vision_model.") + name: tensor for name, tensor in clip_tensors(original.clip).items()
        }
        tensors[f"{TOWER}embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
    return {**tensors, **original.projector, "lm_head.weight": head}


def original_config(original: OriginalModel, **changes: Any) -> dict[str, Any]:
    """The fields of the released config.json, with `changes`."""
    text = original.language.config
    mistral = text.model_type == "mistral"
    values = {
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        **{name: getattr(text, name) for name in TEXT_SIZES if name != "head_dim"},
        "initializer_range": 0.02,
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "model_type": "llava_mistral" if mistral else "llava",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": str(original.language.dtype).removeprefix("torch."),
        "transformers_version": "4.36.2",
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
    }
    if mistral:
        values |= {
            "image_aspect_ratio": "pad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "unfreeze_mm_vision_tower": True,
        }
    else:
        values |= {"mm_use_im_start_end": True, "mm_vision_tower": "openai/clip-vit-large-patch14"}
    return {**values, **changes}


def write_tensors(
    directory: Path, tensors: dict[str, Tensor], form: FileFormat = "safetensors", shards: int = 3
) -> None:
    """Write the files of a checkpoint: shards with an index, or one file."""
    directory.mkdir(exist_ok=True)
    stem, end = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = list(tensors)
    file_of_tensor = {}
    for i in range(shards):
        shard_names = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"{stem}.{end}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{end}"
        content = {name: tensors[name].detach().clone() for name in shard_names}
        if form == "safetensors":
            save_file(content, directory / file, metadata={"format": "pt"})
        else:
            torch.save(content, directory / file, _use_new_zipfile_serialization=form == "bin")
        file_of_tensor |= dict.fromkeys(shard_names, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": file_of_tensor}
        (directory / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def write_original(
    directory: Path,
    original: OriginalModel,
    *,
    tower: bool = True,
    form: FileFormat = "safetensors",
    shards: int = 3,
    tensors: dict[str, Tensor] | None = None,
    **changes: Any,
) -> Path:
    write_tensors(directory, original_tensors(original, tower=tower) if tensors is None else tensors, form, shards)
    original.tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(original_config(original, **changes)))
    return directory


def write_clip(directory: Path, clip: Any, *, whole: bool = False, form: FileFormat = "safetensors") -> Path:
    """Write a CLIP image encoder, or with `whole` a complete CLIP as on the Hub."""
    tensors = clip_tensors(clip)
    vision = {**VISION, "hidden_act": "quick_gelu", "model_type": "clip_vision_model"}
    values: dict[str, Any] = vision
    if whole:
        tensors |= {
            "vision_model.embeddings.position_ids": torch.arange(PATCHES + 1)[None],
            "text_model.embeddings.position_ids": torch.arange(8)[None],
            "text_model.final_layer_norm.weight": torch.ones(4),
            "text_projection.weight": torch.ones(4, 4),
            "visual_projection.weight": torch.ones(4, 4),
            "logit_scale": torch.tensor(4.6),
        }
        values = {"model_type": "clip", "vision_config": vision, "text_config": {}}
    write_tensors(directory, tensors, form, 1)
    (directory / "config.json").write_text(json.dumps(values))
    images = {"image_mean": MEAN, "image_std": STD, "crop_size": SIDE, "do_center_crop": True, "size": SIDE}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    return directory


def preprocess(image: Image.Image, *, pad: bool) -> Tensor:
    """Preprocess an image as the original code does, in PIL and torch: [3, side, side]."""
    width, height = image.size
    if pad:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in MEAN))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    scale = SIDE / min(image.size)
    image = image.resize((int(scale * image.size[0]), int(scale * image.size[1])), Image.Resampling.BICUBIC)
    left, top = (image.size[0] - SIDE) // 2, (image.size[1] - SIDE) // 2
    image = image.crop((left, top, left + SIDE, top + SIDE))
    values = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)
    return (values / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def write_delta_and_base(
    target: OriginalModel, folder: Path, dtype: torch.dtype
) -> tuple[Path, Path, dict[str, Tensor]]:
    """(delta folder, base folder, base + delta as torch adds them in `dtype`); the base has fewer rows."""
    torch.manual_seed(5)
    target_tensors = {name: tensor.to(dtype) for name, tensor in original_tensors(target, tower=False).items()}
    rows = len(target.tokenizer) - 4
    base, delta, expected = {}, dict(target_tensors), dict(target_tensors)
    for name, tensor in target_tensors.items():
        if "mm_projector" in name:
            continue
        base[name] = (tensor + 0.01 * torch.randn_like(tensor))[:rows] if tensor.shape[0] == rows + 4 else tensor * 1.01
        if name.endswith("inv_freq"):
            continue
        delta[name] = tensor.clone()
        delta[name][: len(base[name])] -= base[name]
        expected[name] = delta[name].clone()
        expected[name][: len(base[name])] += base[name]
    write_tensors(folder / "base", base, "bin", 2)
    return write_original(folder / "delta", target, tensors=delta), folder / "base", expected


def import_error(source: Path, out: Path, **options: Any) -> str:
    """The one-line message of a refused import, which must leave no files."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError) as error_info:
        import_llava_med(str(source), out, **options)
    assert sorted(source.parent.iterdir()) == before, "no file is left"
    message = str(error_info.value)
    assert "\n" not in message and message.endswith(".")
    return message
