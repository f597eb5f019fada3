"""The command line: parses, calls one function, prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from normtune import processes
from normtune.config import DataOptions, EvaluateConfig, TrainConfig
from normtune.errors import InputError, did_you_mean
from normtune.progress import bar

app = typer.Typer(
    name="normtune",
    help="Fine-tune medical vision-language models by training what is already inside them. "
    "Research use, not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[str, typer.Argument(help="A local directory, a hub name, or 'nano'.")]
Adapter = Annotated[Path | None, typer.Option(help="A trained adapter; none uses the base as it is.")]
Quantize = Annotated[str | None, typer.Option(help="Hold the base in 8 or 4 bits: int8 or nf4.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default CUDA where there is one.")]


def main() -> None:
    """Entry point: bad input is one line on stderr and exit status 2."""
    if processes.launched() > 1:  # read when torch is imported; its warnings come once a process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        status = app(standalone_mode=False)
        processes.leave()
    except (typer.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        status = 130
    except InputError as error:
        status = _refuse(str(error))
    except Exception as error:
        if processes.another_failed():
            sys.exit(2)  # this one met the end of that one
        if not hasattr(
            error, "format_message"
        ):  # the mark of click's own errors; typer carries its click along
            raise
        if not error.format_message():
            error.show()  # type: ignore[attr-defined]  # no command given: the help
            status = 2
        else:
            status = _refuse(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> int:
    if processes.reports():
        print("normtune: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _takes(config: type[DataOptions], positional: str | None = None) -> Callable[[Callable[..., None]], Any]:
    """Give a command the fields of `config` as its options, so that each is written once."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            as_json = values.pop("json")
            run(config.checked(**values), as_json=as_json)

        parameters = [
            _parameter(name, field, name == positional) for name, field in config.model_fields.items()
        ]
        parameters.sort(key=lambda parameter: parameter.name != positional)
        parameters.append(
            inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
        )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__ = run.__doc__
        command.__name__ = run.__name__
        return command

    return decorate


def _parameter(name: str, field: FieldInfo, positional: bool) -> inspect.Parameter:
    info = typer.Argument(help=field.description) if positional else typer.Option(help=field.description)
    default = inspect.Parameter.empty if field.is_required() else field.default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[field.annotation, info]
    )


def _emit(as_json: bool, value: Any, text: str) -> None:
    if processes.is_first():
        print(dumps(value, ensure_ascii=False) if as_json else text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the results are written.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=8, help="Training images of hospital B.")] = 160,
    seed: Annotated[int, typer.Option(help="Of data and training.")] = 0,
    json: Json = False,
) -> None:
    """The main job on the embedded default, offline: adapt 'nano' to another hospital with every recipe."""
    from normtune.demo import run_demo

    results, text = run_demo(out, images=images, seed=seed, quiet=json)
    _emit(json, results, text)


@app.command("inspect")
def inspect_model(
    model: Model,
    tune: Annotated[str | None, typer.Option(help="A recipe: what would it train?")] = None,
    data: Annotated[str | None, typer.Option(help="A dataset: what memory would training take?")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset's files lie.")] = None,
    limit: Annotated[int | None, typer.Option(help="Plan for the first so many pairs only.")] = None,
    batch: Annotated[int | None, typer.Option(help="Question-answer pairs a step.")] = None,
    cap: Annotated[int | None, typer.Option(help="At most so many questions of one image.")] = None,
    memory: Annotated[str | None, typer.Option(help="fast, balanced or tight.")] = None,
    quantize: Quantize = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Parts x roles of a model, what a recipe would train, and the memory it would take with --data.

    No weights are loaded.
    """
    from normtune.inspection import inspect_text, inspection, planned

    options = {
        "data": data,
        "root": root,
        "limit": limit,
        "batch": batch,
        "cap": cap,
        "memory": memory,
        "quantize": quantize,
        "dtype": dtype,
        "device": device,
    }
    found = planned(model, tune, options, inspection(model, tune))
    _emit(json, found, inspect_text(found))


@app.command()
@_takes(DataOptions, positional="data")
def data(options: DataOptions, *, as_json: bool) -> None:
    """What a dataset holds: splits, images, open and closed counts, problems, leaks between splits."""
    from normtune.catalog import open_from
    from normtune.data.survey import survey, survey_text

    found = survey(open_from(options))
    _emit(as_json, found, survey_text(found))


@app.command()
@_takes(TrainConfig, positional="model")
def train(config: TrainConfig, *, as_json: bool) -> None:
    """Train a recipe on a dataset; writes the adapter to --out. Run again after a kill, and it goes on."""
    from normtune.train import PrintProgress, train

    quiet = as_json or not processes.is_first()
    result = train(config, progress=None if quiet else PrintProgress())
    _emit(as_json, asdict(result), result.text())


@app.command()
@_takes(EvaluateConfig, positional="model")
def evaluate(config: EvaluateConfig, *, as_json: bool) -> None:
    """Answer every question of a split and score the answers, with 95% intervals."""
    from normtune.evaluate import evaluate_config, metrics_text

    with bar("answering", quiet=as_json or not processes.is_first()) as tick:
        found = evaluate_config(config, progress=tick)
    _emit(as_json, found, metrics_text(found))


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help='JSONL of {"id", "prediction"}.')],
    references: Annotated[Path, typer.Argument(help='JSONL of {"id", "reference"[, "images", "kind"]}.')],
    task: Annotated[str | None, typer.Option(help="report or vqa; by default as `kind` says.")] = None,
    normalisation: Annotated[
        list[str] | None, typer.Option(help="Of the texts, repeatable: none, r2gen-iu, r2gen-mimic; vqa.")
    ] = None,
    chexbert: Annotated[Path | None, typer.Option(help="Folder of chexbert.pth and vocab.txt.")] = None,
    bertscore: Annotated[Path | None, typer.Option(help="Folder of the model for BERTScore.")] = None,
    radgraph: Annotated[bool, typer.Option("--radgraph", help="Add RadGraph F1.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result there as JSON.")] = None,
    json: Json = False,
) -> None:
    """Score a file of predictions against a file of references, joined by id, with 95% intervals."""
    from normtune.scoring import TASKS, score_files, score_text

    if task not in (None, *TASKS):
        hint = did_you_mean(str(task), TASKS) or "."
        raise InputError(f"--task {task}: unknown{hint} Known: {', '.join(TASKS)}.")
    found = score_files(
        predictions,
        references,
        task=task,  # type: ignore[arg-type]  # checked above
        normalisations=normalisation,
        chexbert=chexbert,
        bertscore=bertscore,
        radgraph=radgraph,
        out=out,
    )
    _emit(json, found, score_text(found))


@app.command()
def ask(
    model: Model,
    image: Annotated[Path, typer.Option(help="PNG, JPEG, TIFF or DICOM.")],
    question: Annotated[list[str], typer.Option(help="Repeat for several questions of the image.")],
    adapter: Adapter = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    device: Device = None,
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """Ask questions of one image."""
    from normtune.asking import ask

    answers = ask(model, image, question, adapter=adapter, beams=beams, device=device, quantize=quantize)
    rows = [
        {"question": q, "answer": a.text, "score": a.score} for q, a in zip(question, answers, strict=True)
    ]
    _emit(
        json,
        {"image": str(image), "answers": rows},
        "\n".join(f"{r['question']}  {r['answer']}" for r in rows),
    )


@app.command()
def describe(
    model: Model,
    image: Annotated[list[Path], typer.Option(help="Repeat for the views of one study.")],
    adapter: Adapter = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    device: Device = None,
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """Write a report for one image or study. Research use, not for diagnosis."""
    from normtune.asking import describe

    answer = describe(model, image, adapter=adapter, beams=beams, device=device, quantize=quantize)
    _emit(
        json, {"images": [str(i) for i in image], "report": answer.text, "score": answer.score}, answer.text
    )


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="The adapter to merge.")],
    out: Annotated[Path, typer.Option(help="Where the merged model is written.")],
    json: Json = False,
) -> None:
    """A loadable model that links the base's own files and adds the trained tensors."""
    from normtune.merge import merge_text, merge_to_disk

    found = merge_to_disk(model, adapter, out)
    _emit(json, _plain(found), merge_text(found))


@app.command()
def export(
    adapter: Annotated[Path, typer.Option(help="The adapter to export.")],
    out: Annotated[Path, typer.Option(help="Where it is written.")],
    to: Annotated[str, typer.Option(help="The format: peft.")] = "peft",
    json: Json = False,
) -> None:
    """An adapter in the form that `PeftModel.from_pretrained` loads, to the same answers."""
    if to != "peft":
        raise InputError(f"--to {to}: unknown format{did_you_mean(to, ['peft']) or '.'} Known: peft.")
    from normtune.export import export_peft, export_text

    found = export_peft(adapter, out)
    _emit(json, _plain(found), export_text(found))


@app.command("import-miss")
def import_miss(
    source: Annotated[Path, typer.Argument(help="MISS's .pth, or a directory of BLIP-VQA.")],
    out: Annotated[Path, typer.Argument(help="Where the model is written.")],
    vocab: Annotated[Path | None, typer.Option(help="The vocab.txt of bert-base-uncased.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize the position embeddings to it.")] = None,
    vision_heads: Annotated[int | None, typer.Option(help="Attention heads, where not width / 64.")] = None,
    text_heads: Annotated[int | None, typer.Option(help="Attention heads, where not width / 64.")] = None,
    divide_twice: Annotated[
        bool, typer.Option(help="Prepare images as MISS's released code does: /255 twice, not normalised.")
    ] = False,
    json: Json = False,
) -> None:
    """MISS's original checkpoint, or BLIP-VQA's, as a model that normtune and transformers load."""
    from normtune.models.miss.checkpoints import import_miss, import_text

    found = import_miss(
        source,
        out,
        vocab=vocab,
        image_size=image_size,
        vision_heads=vision_heads,
        text_heads=text_heads,
        divide_twice=divide_twice,
    )
    _emit(json, _plain(found), import_text(found))


@app.command("import-llava-med")
def import_llava_med(
    source: Annotated[str, typer.Argument(help="LLaVA-Med's original layout: a directory or hub name.")],
    out: Annotated[Path, typer.Argument(help="Where the model is written.")],
    vision: Annotated[
        str | None, typer.Option(help="Its CLIP, where SOURCE holds none: a directory or hub name.")
    ] = None,
    stock_tower: Annotated[
        bool, typer.Option("--stock-tower", help="Take --vision's weights even where SOURCE has its own.")
    ] = False,
    vision_heads: Annotated[
        int | None, typer.Option(help="Attention heads of SOURCE's own CLIP, where not width / 64.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The LLaMA that SOURCE is a delta of.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer in place of SOURCE's.")] = None,
    json: Json = False,
) -> None:
    """LLaVA-Med's original checkpoint as a model that normtune and transformers load.

    Run again after a kill, and it goes on.
    """
    from normtune.models.llava_med.importing import import_llava_med, import_text

    with bar("writing tensors", quiet=json) as tick:
        found = import_llava_med(
            source,
            out,
            vision=vision,
            stock_tower=stock_tower,
            vision_heads=vision_heads,
            base=base,
            tokenizer=tokenizer,
            tick=tick,
        )
    _emit(json, _plain(found), import_text(found))


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def bench(
    name: Annotated[str | None, typer.Argument(help="A benchmark; none lists them.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="Its own options: normtune bench NAME --help.")
    ] = None,
    json: Json = False,
) -> None:
    """The benchmarks of the source checkout: list them, or run one and print its table."""
    from normtune.bench import benchmarks, listing, recorded, run_benchmark

    given = [option for option in options or () if option != "--json"]
    if name is None:
        found = benchmarks()
        rows = [{"name": one.name, "summary": one.summary} for one in found.values()]
        _emit(json, {"benchmarks": rows}, listing(found))
    elif json or len(given) < len(options or ()):
        _emit(True, recorded(name, given), "")
    else:
        run_benchmark(name, given)


def _plain(found: Any) -> dict[str, Any]:
    """A result as JSON takes it: paths as text."""
    plain: dict[str, Any] = loads(dumps(asdict(found), default=str))
    return plain
