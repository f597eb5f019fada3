"""Train `normtune-nano`, the base that comes with the package, on phantoms of hospital A, and evaluate it.

    python scripts/train_nano.py --out src/normtune/models/nano

    python scripts/train_nano.py --out runs/bases/nano --stop 1950 --save-at 195,650,1950
    python scripts/train_nano.py --out runs/bases/pico --width 64 --layers 3,2,1

The first command takes about 45 minutes on two cores. The others write the weaker bases of
`studies/when-norms.yaml`: `nano-195` and so on after 3, 10 and 30% of the steps, and a smaller one. Every parameter
is trained from random weights, on images of hospital A's training split only. An interrupted run resumes from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from tokenizers import normalizers, pre_tokenizers

from normtune.data.groups import Group
from normtune.data.phantom import Scene, phantom_dataset, sample_scene
from normtune.data.phantom.dataset import scene_seed
from normtune.data.records import Example
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.models.families.miss import MissFamily, miss_processor
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.models.miss.tokenizer import ENCODE, build_bert_tokenizer
from normtune.runtime.files import write_json

SIZE = 96
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VISION = {"image_size": SIZE, "patch_size": 12, "drop_path_rate": 0.0}
TEXT = {"max_position_embeddings": 192, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Images:
    """The training images as grey values, with their traits, questions and reports."""

    grey: np.ndarray  # [images, size, size] uint8
    traits: torch.Tensor  # [images, traits], 0 or 1
    keys: list[str]
    questions: list[list[Example]]
    reports: list[Example]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the finished base")
    parser.add_argument("--work", type=Path, default=Path("runs/nano"), help="folder of the checkpoints")
    parser.add_argument("--images", type=int, default=24_000, help="images of hospital A to train on")
    parser.add_argument("--steps", type=int, default=6_500)
    parser.add_argument("--batch", type=int, default=20, help="images per step")
    parser.add_argument("--questions", type=int, default=6, help="questions per image in a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128, help="of all parts")
    parser.add_argument("--layers", default="6,3,2", help="of the image encoder, the question encoder and the decoder")
    parser.add_argument("--save-at", default="", help="steps at which the base is also written, to OUT-STEP: 195,650")
    parser.add_argument("--stop", type=int, help="end after this step of the schedule, without the finished base")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images = render_images(options.images, options.work / f"images-{options.images}.npy")
    layers = [int(number) for number in options.layers.split(",")]
    family = build_family(build_vocabulary(images), options.width, layers)
    print(f"{sum(p.numel() for p in family.model.parameters()):,} parameters")
    fit(family, images, options)
    if options.stop:
        return
    family.model.eval()
    family.save(options.out)
    scores = {}
    for hospital in ("a", "b"):
        result = evaluate_config(
            EvaluateConfig(
                model=str(options.out), data=f"phantom-{hospital}:500", out=options.work / f"test-{hospital}"
            )
        )
        scores[f"hospital {hospital}"] = result.record["metrics"]
    write_json(options.out / "training.json", {**vars(options), "out": None, "work": None, "test": scores})
    for name, metrics in scores.items():
        print(name, {metric: round(100 * value["value"], 1) for metric, value in metrics.items()})


def render_images(count: int, cache: Path) -> Images:
    """Draw the training split of hospital A; the other splits, which are for tests, are not used."""
    data = phantom_dataset("a", {"train": count}, size=SIZE, task="all")
    questions: dict[str, list[Example]] = {}
    reports = []
    for example in data.examples:
        if example.kind == "report":
            reports.append(example)
        else:
            questions.setdefault(example.images[0], []).append(example)
    keys = list(questions)
    if cache.is_file():
        grey = np.load(cache)
    else:
        grey = np.stack([np.asarray(data.open_image(key).convert("L")) for key in track(keys, "drawing phantoms")])
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, grey)
    scenes = [sample_scene(scene_seed("train", number, 0), "a") for number in range(count)]
    return Images(grey, traits_of_scenes(scenes), keys, list(questions.values()), reports)


def traits_of_scenes(scenes: list[Scene]) -> torch.Tensor:
    """[scenes, traits], 0 or 1: which traits each scene shows.

    Traits are findings with their side, zone, size and count, devices, and a missing kidney.
    """
    traits_of_scene = []
    for scene in scenes:
        scene_traits = {f"device {scene.device}", f"no {scene.missing_kidney} kidney"}
        for finding in scene.findings:
            kind, side = finding.kind, finding.side
            scene_traits |= {kind, f"{kind} {side}", f"{finding.organ} {side}"}
            scene_traits |= {f"{kind} {finding.zone}", f"{kind} {finding.size}", f"{kind} {finding.count}"}
        traits_of_scene.append(scene_traits)
    names = sorted(set().union(*traits_of_scene))
    return torch.tensor([[float(name in scene_traits) for name in names] for scene_traits in traits_of_scene])


def build_vocabulary(images: Images) -> dict[str, int]:
    """WordPiece's vocabulary: hospital A's words by frequency, and single characters for all other words."""
    normalise, split = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = [text for group in images.questions for e in group for text in (e.question, e.answer)]
    texts += [report.answer for report in images.reports]
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(normalise.normalize_str(text)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    signs = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = dict.fromkeys([*SPECIAL, *words, *signs, *(f"##{sign}" for sign in signs)])
    return {piece: index for index, piece in enumerate(pieces)}


def build_family(pieces: dict[str, int], width: int, layers: list[int]) -> MissFamily:
    """A MISS with random weights for this vocabulary; `layers` of image encoder, question encoder and decoder."""
    widths = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 4 * width}
    tokenizer = build_bert_tokenizer(pieces)
    config = MissConfig(
        vision_dims={**widths, **VISION, "num_hidden_layers": layers[0]},
        encoder_dims={**widths, **TEXT, "num_hidden_layers": layers[1]},
        decoder_dims={**widths, **TEXT, "num_hidden_layers": layers[2]},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        encode_token_id=tokenizer.convert_tokens_to_ids(ENCODE),
    )
    return MissFamily(MissForQuestionAnswering(config), miss_processor(tokenizer, SIZE))


class TraitHead(torch.nn.Module):
    """An auxiliary head that predicts the traits of an image; it is not part of the trained model.

    Each patch predicts the traits that it shows; the logit of the image is the log-mean-exp over its patches.
    Without the head, the image encoder learns little about small findings from the questions.
    """

    def __init__(self, width: int, trait_count: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(width, trait_count)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.constant_(self.head.bias, -4.0)

    def forward(self, image_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """image_states [images, tokens, width], labels [images, traits] -> summed cross-entropy per image."""
        logits = self.head(image_states).logsumexp(1) - math.log(image_states.shape[1])
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(labels)


def fit(family: MissFamily, images: Images, options: argparse.Namespace) -> None:
    """Train with AdamW, warm-up and cosine decay; every fifth step is on reports, the others on questions."""
    model, steps = family.model.train(), options.steps
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    head = TraitHead(options.width, images.traits.shape[1])
    head_optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    checkpoint, first_step = options.work / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        head.load_state_dict(state["head"])
        head_optimizer.load_state_dict(state["head_optimizer"])
        first_step = state["step"]
    processor = family.processor.image_processor
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    losses: list[float] = []
    trait_losses: list[float] = []
    start = time.perf_counter()
    for step in range(first_step, steps):
        rng = random.Random(f"{options.seed}-{step}")
        is_report_step = step % 5 == 4
        indices = rng.sample(range(len(images.keys)), options.batch)
        members = [
            [images.reports[i]] if is_report_step else rng.sample(images.questions[i], options.questions)
            for i in indices
        ]
        groups = [
            Group(
                group[0].images,
                tuple(family.tokenize(e.id, e.question, e.answer, report=is_report_step) for e in group),
            )
            for group in members
        ]
        pixels = torch.from_numpy(images.grey[indices]).float()[:, None] / 255
        prepared = (pixels.expand(-1, 3, -1, -1) - mean) / deviation
        batch = family.collate(groups, [[{"pixel_values": image}] for image in prepared])
        batch["image_states"] = model.visual_encoder(batch.pop("pixel_values"))
        total, tokens = family.loss(batch, label_smoothing=0.05)
        loss = total / tokens
        trait_loss = head(batch["image_states"], images.traits[indices])
        (loss + 0.1 * trait_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        head_optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        head_optimizer.zero_grad(set_to_none=True)
        losses += [] if is_report_step else [loss.item()]
        trait_losses.append(trait_loss.item())
        if (step + 1) % 100 == 0:
            seconds = (time.perf_counter() - start) / (step + 1 - first_step)
            recent = f"loss {np.mean(losses[-80:]):.3f}, traits {np.mean(trait_losses[-100:]):.2f}"
            print(f"step {step + 1}/{steps}  {recent}  {seconds:.2f} s a step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": step + 1}
            state |= {"head": head.state_dict(), "head_optimizer": head_optimizer.state_dict()}
            partial = checkpoint.with_suffix(".tmp")
            torch.save(state, partial)
            partial.replace(checkpoint)
        if str(step + 1) in options.save_at.split(","):
            family.save(Path(f"{options.out}-{step + 1}"))
        if step + 1 == options.stop:
            return


if __name__ == "__main__":
    main()
