"""Recipes by name: the settings of arXiv 2404.16385 (LN tuning) and of MILE (arXiv 2403.06407)."""

from __future__ import annotations

from normtune.methods.registry import METHODS, TEXT_ONLY


def _presets() -> dict[str, str]:
    """Preset name -> recipe text."""
    # MILE's LoRA: rank 4 or 8, alpha 32, dropout 0.1
    lora = {f"lora{rank}": f"lora(r={rank},alpha=32,dropout=0.1)" for rank in (4, 8)}
    # each method on all parts; bare `lora` is not a preset, so that it has the defaults of METHODS
    presets = {name: f"all={name}" for name in METHODS if name != "lora"}
    presets |= {
        "ln-vision": "vision=ln",
        "ln-language": "language=ln",
        "ln-encoder": "encoder=ln",
        "ln-decoder": "decoder=ln",
        "ln-encoder+decoder": "encoder=ln,decoder=ln",
        "ln-bias": "all=ln+bias",
        "ln-gain-only": "all=ln(bias=0)",
        "ln-bias-only": "all=ln(gain=0)",
        "bitfit": "all=ln(gain=0)+bias",
        "difffit": "all=ln+bias+gamma",
        "ln-connector": "connector?=full,language=ln",
        "attention-vision": "vision=attention",
        "attention-language": "language=attention",
        "ffn-vision": "vision=ffn",
        "ffn-language": "language=ffn",
        "lora-4": f"all={lora['lora4']}",
        "lora-8": f"all={lora['lora8']}",
    }
    methods = {name: name for name in METHODS if name not in ("lora", "frozen", "full")} | lora
    # vision-encoder-decoder, the rows of MILE's tables: F-LoRA4-LoRA4 is `frozen-lora4-lora4`,
    # T-T-prefix is `full-full-prefix`
    for word, method in methods.items():
        for vision, encoder in (
            ("frozen", "frozen"),
            ("frozen", "full"),
            ("full", "frozen"),
            ("full", "full"),
            ("frozen", word),
            ("full", word),
            (word, word),
        ):
            if vision == word and word in TEXT_ONLY:
                continue  # MILE has no prefixes in the vision part
            text = {"frozen": "frozen", "full": "full", word: method}
            presets[f"{vision}-{encoder}-{word}"] = f"vision={text[vision]},encoder?={text[encoder]},decoder={method}"
    return presets


PRESETS: dict[str, str] = _presets()
