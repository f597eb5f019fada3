"""The command that starts the HTTP server."""

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
        list[str], typer.Option(metavar="NAME=DIR", help="Adapter to serve, by this name; repeatable.")
    ] = [],  # noqa: B006  # typer copies the list
    adapter_root: Annotated[
        Path | None, typer.Option(help="Serve all adapters in this folder; clients may register others.")
    ] = None,
    reviews: Annotated[
        Path | None, typer.Option(help="Folder of pages of normtune review, linked on the web page.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="File with a KEY or NAME:KEY per line; NORMTUNE_API_KEYS adds more keys.")
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Accept requests without keys on any --host.")
    ] = False,
    allow_remote_images: Annotated[
        list[str], typer.Option(metavar="HOST", help="Allow image URLs of this host; repeatable.")
    ] = [],  # noqa: B006
    per_minute: Annotated[int, typer.Option(min=1, help="Maximum requests per minute and key.")] = 600,
    timeout: Annotated[float, typer.Option(min=1, help="Maximum time until an answer, in seconds.")] = 120.0,
    abstain_below: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse answers with a confidence below this.")
    ] = 0.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum requests per batch.")] = 32,
    max_wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a batch to fill.")] = 0.01,
    queue_limit: Annotated[int, typer.Option(min=1, help="Maximum queue length; then status 429.")] = 256,
    adapter_memory: Annotated[int | None, typer.Option(min=1, help="MiB for adapters; default: 256.")] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Maximum LoRA rank; 0: norm adapters only.")] = 0,
    dtype: Annotated[str, typer.Option(help="Dtype of the base: float32, bfloat16 or auto (by the device).")] = "auto",
    device: Device = None,
    quantize: Quantize = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of an image, for the base and all adapters.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log errors only, not every request.")] = False,
    json: Json = False,
) -> None:
    """Serve a model and its adapters over HTTP.

    The server has an OpenAI-compatible API and a web page.

    Research use, not for diagnosis.
    """
    try:
        from normtune.serving.http import server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("normtune"):
            raise
        raise InputError(
            "normtune serve needs packages that are not installed: pip install normtune[serve]."
        ) from error
    from normtune.serving.http.limits import Limits, read_keys
    from normtune.serving.http.paths import find_adapters, parse_adapter_options

    keys = read_keys(api_keys)
    if not keys and host not in server.LOOPBACK and not without_keys:
        raise InputError(f"--host {host} can be reached from other machines. Give --api-keys FILE, or --without-keys.")
    if reviews is not None and not reviews.is_dir():
        raise InputError(f"--reviews {reviews} is not a folder. Give a folder of pages that normtune review wrote.")
    named_adapters = parse_adapter_options(adapter)
    root_adapters = find_adapters(adapter_root) if adapter_root else {}
    root_adapters = {name: folder for name, folder in root_adapters.items() if name not in named_adapters}
    base = Path(model).name or model
    if base in named_adapters:
        raise InputError(f"adapter '{base}' has the name of the base. Give another name: NAME=DIR.")
    with server.listen(host, port) as listening:  # before the slow load, so that a port in use is an error at once
        from normtune.models.loading import load
        from normtune.serving.engine.engine import Engine

        family = load(model, dtype=dtype, device=device, quantize=quantize)
        family.use_max_pixels(max_pixels)
        engine = Engine(
            family,
            max_batch=max_batch,
            max_wait=max_wait,
            queue_limit=queue_limit,
            adapter_memory=None if adapter_memory is None else adapter_memory << 20,
            lora_rank=lora_rank,
        )
        try:
            for name, folder in named_adapters.items():
                engine.register(name, folder)
            skipped = _register_adapters(engine, adapter_root, root_adapters, base) if adapter_root else {}
            names = [served.name for served in engine.adapters()]
            in_progress = queue_limit + max_batch
            limits = Limits(per_minute=per_minute, request_s=timeout, questions=in_progress)
            max_tokens = engine.family.max_answer_tokens  # a request for more tokens gets this many
            if max_tokens is not None and max_tokens < limits.new_tokens:
                limits = replace(limits, new_tokens=max_tokens)
            settings = server.Settings(
                base=base,
                limits=limits,
                keys=keys,
                adapter_root=adapter_root,
                reviews=reviews,
                remote_hosts=frozenset(name.lower() for name in allow_remote_images),
                hosts=None if keys or without_keys else server.allowed_hosts(host),
                abstain_below=abstain_below,
            )
            url = server.server_url(listening)
            info = {"url": url, "model": base, "adapters": names, "left_out": skipped, "keys": bool(keys)}
            text = f"{base} with {len(names)} adapters at {url} (research use, not for diagnosis)"
            text = "\n".join([*(f"skipped: {reason}" for reason in skipped.values()), text])

            def ready() -> None:
                emit(json, info, text)
                sys.stdout.flush()  # a program that started the server may wait for the URL

            server.run(engine, settings, listening, ready=ready, quiet=quiet)
        finally:
            engine.close(drain=False)


def _register_adapters(engine: Engine, root: Path, adapters: Mapping[str, Path], base: str) -> dict[str, str]:
    """Register the adapters of the root that can be served, and return the reason for each one that was skipped."""
    from normtune.serving.http.paths import check_adapter_name, is_inside

    skipped = {}
    for name, folder in adapters.items():
        try:
            check_adapter_name(name, f"the folder '{name}'")
            if name == base:
                raise InputError(f"adapter '{name}' has the name of the base. Rename its folder.")
            if not is_inside(folder, root):
                raise InputError(f"adapter '{name}' is a link out of --adapter-root. Serve it with --adapter NAME=DIR.")
            engine.register(name, folder)
        except InputError as error:
            skipped[name] = str(error)
    return skipped
