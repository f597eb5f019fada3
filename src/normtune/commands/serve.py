"""The command that serves."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normtune.commands.app import Device, Json, Model, Quantize, app, emit
from normtune.errors import InputError

if TYPE_CHECKING:
    from normtune.serving.engine.engine import Engine


@app.command()
def serve(
    model: Model,
    adapter: Annotated[
        list[str], typer.Option(metavar="NAME=DIR", help="An adapter to serve. Repeat for several.")
    ] = [],  # noqa: B006  # typer's way
    adapter_root: Annotated[
        Path | None, typer.Option(help="A folder of adapters: its own are served; clients may register more.")
    ] = None,
    reviews: Annotated[
        Path | None, typer.Option(help="A folder of `normtune review` pages, shown on the page.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="A file of API keys, KEY or NAME:KEY a line. Also taken: NORMTUNE_API_KEYS."),
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Let everybody in, on another address than loopback.")
    ] = False,
    allow_remote_images: Annotated[
        list[str], typer.Option(metavar="HOST", help="Fetch images of this host. Repeat for several.")
    ] = [],  # noqa: B006
    per_minute: Annotated[int, typer.Option(min=1, help="Requests that a key may send a minute.")] = 600,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 120.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = 32,
    max_wait: Annotated[float, typer.Option(min=0, help="Seconds that a request waits for company.")] = 0.01,
    queue_limit: Annotated[int, typer.Option(min=1, help="Requests that wait before others get 429.")] = 256,
    adapter_memory: Annotated[int | None, typer.Option(min=1, help="MiB for loaded adapters.")] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Serve LoRA of up to this rank too; 0: none.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Device = None,
    quantize: Quantize = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log faults alone, not each request.")] = False,
    json: Json = False,
) -> None:
    """Serve a base with its adapters: OpenAI's API and a web page. Research use, not for diagnosis."""
    try:
        from normtune.serving.http import server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("normtune"):
            raise
        raise InputError(
            "serving needs packages that are not installed: pip install normtune[serve]."
        ) from error
    from normtune.serving.http.limits import Limits, read_keys
    from normtune.serving.http.paths import adapters_below, named_adapters

    keys = read_keys(api_keys)
    if not keys and host not in server.LOOPBACK and not without_keys:
        raise InputError(
            f"--host {host} is open to others. Give --api-keys FILE, or --without-keys if all may use it."
        )
    if reviews is not None and not reviews.is_dir():
        raise InputError(f"--reviews {reviews} is no folder. Give one of pages that normtune review wrote.")
    named = named_adapters(adapter)
    below = adapters_below(adapter_root) if adapter_root else {}
    below = {name: folder for name, folder in below.items() if name not in named}
    base = Path(model).name or model
    if base in named:
        raise InputError(f"the adapter '{base}' is called as the base. Name it otherwise: NAME=DIR.")
    with server.listen(host, port) as listening:  # first: a port that is taken is told at once
        from normtune.data import tasks
        from normtune.data.tasks import MAX_ANSWER_TOKENS
        from normtune.models.loading import load
        from normtune.serving.engine.engine import Engine

        engine = Engine(
            load(model, dtype=dtype, device=device, quantize=quantize),
            max_batch=max_batch,
            max_wait=max_wait,
            queue_limit=queue_limit,
            adapter_memory=None if adapter_memory is None else adapter_memory << 20,
            lora_rank=lora_rank,
        )
        try:
            for name, folder in named.items():
                engine.register(name, folder)
            left_out = _register_below(engine, below, base)
            names = [one.name for one in engine.adapters()]
            at_once = queue_limit + max_batch
            limits = Limits(per_minute=per_minute, request_s=timeout, questions=at_once)
            longest = engine.family.max_answer_tokens  # a client that asks for more gets so many
            if longest is not None and longest < limits.new_tokens:
                limits = replace(limits, new_tokens=longest)
            settings = server.Settings(
                base=base,
                limits=limits,
                keys=keys,
                adapter_root=adapter_root,
                reviews=reviews,
                remote_hosts=frozenset(one.lower() for one in allow_remote_images),
                hosts=None if keys or without_keys else server.own_names(host),
                question_tokens=MAX_ANSWER_TOKENS,
                report_tokens=tasks.MAX_REPORT_TOKENS,
            )
            url = server.address(listening)
            told = {"url": url, "model": base, "adapters": names, "left_out": left_out, "keys": bool(keys)}
            text = f"{base} with {len(names)} adapters at {url} (research use, not for diagnosis)"
            text = "\n".join([*(f"left out: {reason}" for reason in left_out.values()), text])

            def ready() -> None:
                emit(json, told, text)
                sys.stdout.flush()  # who started it may wait for the address

            server.run(engine, settings, listening, ready=ready, quiet=quiet)
        finally:
            engine.close(drain=False)


def _register_below(engine: Engine, below: Mapping[str, Path], base: str) -> dict[str, str]:
    """Register the adapters of a folder, which may hold some that cannot be served: name -> why not."""
    from normtune.serving.http.paths import check_name

    left_out = {}
    for name, folder in below.items():
        try:
            check_name(name, f"the folder '{name}'")
            if name == base:
                raise InputError(f"adapter '{name}' is called as the base. Rename its folder.")
            engine.register(name, folder)
        except InputError as error:
            left_out[name] = str(error)
    return left_out
