"""A federation over NVFlare (https://nvflare.readthedocs.io): processes of several hospitals, over gRPC with TLS.

NVFlare does the network: certificates, roles, messages, processes of jobs. `FederationController` runs our rounds in
the server's job and `SiteExecutor` our training in that of a site. `run_deployed` submits jobs until all rounds are
done: a site that has died, or that was not there, takes part again from the next job on.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController
from nvflare.fuel.flare_api.flare_api import new_secure_session

from normtune.adapters.info import AdapterInfo, parse_info
from normtune.adapters.storage import INFO_FILE
from normtune.errors import InputError
from normtune.federated.config import FederateConfig, read_site
from normtune.federated.rounds import RECORD_FILE, Federation, federate
from normtune.federated.rules import SiteUpdate, Values
from normtune.federated.site import RoundTask, train_at_site, write_site_adapter
from normtune.runtime.files import read_json, write_json, write_text

FOLDER = "normtune"  # in the folder of the server or of a site: a folder for each federation
SITE_FILE = "site.yaml"  # in the `local` folder of a site: its data
ERROR_FILE = "error.txt"  # why a job has stopped, beside its record
TRAIN, FINISH = "train", "finish"
_FIGURES = [field.name for field in fields(SiteUpdate) if field.name != "values"]  # sent beside the values
_POLL_S = 2.0
_RESTART_S = 600.0  # how long the administrator waits for a server that is away
_ATTEMPTS = 10  # jobs in a row that may end because the server was away
_GATHER_S = 60.0  # how long a new job waits for sites that are not connected


class _SiteMissing(Exception):
    """A site has not answered: the job ends, so that the next one finds it if it is back."""


class FederationController(ModelController):
    """The server's part of a job: the rounds of `normtune.federated.rounds`."""

    def __init__(self, name: str, options: dict[str, Any], sites: list[str]) -> None:
        super().__init__(persistor_id="", ignore_result_error=True)
        self.federation, self.options, self.sites = name, options, sites
        self.missing: set[str] = set()

    def run(self) -> None:
        """Run the rounds that are left, and leave adapter and record in the job's folder."""
        workspace = self.fl_ctx.get_engine().get_workspace()
        out = Path(workspace.get_root_dir()) / FOLDER / self.federation
        (out / ERROR_FILE).unlink(missing_ok=True)
        try:
            config = FederateConfig.checked(**self.options, site=[], out=out)
            context = load_context("server_context.tenseal", config, Path(workspace.get_root_dir()), self.fl_ctx)
            federate(config, self.sites, self, context=context)
        except _SiteMissing:
            self.info(f"the job ends because {', '.join(sorted(self.missing))} did not answer")
        except InputError as error:
            write_text(out / ERROR_FILE, str(error))
        result = Path(workspace.get_run_dir(self.fl_ctx.get_job_id())) / FOLDER
        result.mkdir(exist_ok=True)
        for file in out.iterdir():
            if file.is_file() and file.name != "lock":
                shutil.copyfile(file, result / file.name)

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        """Send the values to all sites that are connected, and wait for their updates until the deadline."""
        if self.missing:
            raise _SiteMissing
        connected = {client.name for client in self.engine.get_clients()}
        meta = {"round": task.round, "name": self.federation, "options": json.dumps(self.options)}
        replies = self._ask(TRAIN, task.values, meta, sorted(connected & set(self.sites)), task.config.deadline)
        answers: dict[str, SiteUpdate | str] = {}
        for site in self.sites:
            if site not in connected:
                answers[site] = "not connected"
            elif site not in replies:
                answers[site] = f"dead or late: no answer within {task.config.deadline:g} s"
            elif error := replies[site].meta.get("error"):
                answers[site] = f"failed with {str(error)[:100]}; its own log has the reason"
            else:
                figures = {name: replies[site].meta.get(name) for name in _FIGURES}
                answers[site] = SiteUpdate(values=replies[site].params, **figures)
        self.missing = {site for site in self.sites if site not in replies}
        return answers

    def finish(self, info: AdapterInfo, values: Values) -> None:
        """Send the final adapter to all sites that are connected."""
        meta = {"name": self.federation, "options": json.dumps(self.options), "info": json.dumps(info.to_json())}
        targets = sorted({client.name for client in self.engine.get_clients()} & set(self.sites))
        replies = self._ask(FINISH, values, meta, targets, 300)
        if absent := [site for site in self.sites if site not in replies]:
            self.warning(f"the final adapter did not reach {', '.join(absent)}")

    def _ask(
        self, task: str, values: Values, meta: dict[str, Any], targets: Sequence[str], seconds: float
    ) -> dict[str, FLModel]:
        if not targets:
            return {}
        model = FLModel(params=dict(values), meta=meta)
        replies = self.send_model_and_wait(task, model, targets=list(targets), timeout=max(1, int(seconds)))
        return {reply.meta["client_name"]: reply for reply in replies}


class SiteExecutor(Executor):
    """A site's part of a job. It sends trained values and figures, and of an error only the type."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Train a round, or write the final adapter."""
        root = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_ROOT))
        model = FLModelUtils.from_shareable(shareable)
        folder = root / FOLDER / Path(str(model.meta["name"])).name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            config = FederateConfig.checked(**json.loads(model.meta["options"]), site=[], out=folder)
            context = load_context("client_context.tenseal", config, root, fl_ctx)
            if task_name == FINISH:
                reply = _write_final(model, folder, context)
            else:
                task = RoundTask(config, model.meta["round"], model.params)
                reply = _train(task, root / "local" / SITE_FILE, folder, context)
        except Exception as error:  # its message may hold text of the data, which stays in the log of the site
            self.log_exception(fl_ctx, f"{task_name} failed: {error}")
            reply = FLModel(params={}, meta={"error": type(error).__name__})
        return FLModelUtils.to_shareable(reply)


def _train(task: RoundTask, site: Path, folder: Path, context: Any) -> FLModel:
    if context is None:
        update = train_at_site(task, read_site(site), folder)
    else:
        from normtune.federated.secure import train_encrypted

        update = train_encrypted(task, read_site(site), folder, context)
    return FLModel(params=update.values, meta={name: getattr(update, name) for name in _FIGURES})


def _write_final(model: FLModel, folder: Path, context: Any) -> FLModel:
    info, values = parse_info(json.loads(model.meta["info"]), folder / INFO_FILE), model.params
    if context is not None:
        from normtune.federated.secure import decrypt

        local = (info.data or {}).get("local", [])
        values = decrypt(values, [name for name, tensor in info.tensors.items() if tensor.part not in local], context)
    write_site_adapter(folder, info, values)
    return FLModel(params={}, meta={})


def load_context(name: str, config: FederateConfig, root: Path, fl_ctx: FLContext) -> Any:
    """Read the keys of encryption from a kit, and check their signature; None without --secure.

    Raises:
        InputError: the kit has keys and the federation does not use them, or the other way round. So an
            administrator cannot switch off the encryption that a site expects.
    """
    if config.secure != (root / "startup" / name).is_file():
        kits = "were written without --secure" if config.secure else "encrypt updates; the federation needs --secure"
        raise InputError(f"the startup kits {kits}.")
    if not config.secure:
        return None
    from nvflare.app_opt.he.homomorphic_encrypt import load_tenseal_context_from_workspace

    return load_tenseal_context_from_workspace(name, fl_ctx)


def write_job(folder: Path, config: FederateConfig, sites: Sequence[str]) -> None:
    """Write a job of NVFlare: no code, and no option of a site's data."""
    options = config.model_dump(mode="json", exclude={"site", "out", "kit"})
    controller = {"name": config.out.name, "options": options, "sites": list(sites)}
    path = f"{__name__}.{{}}".format
    workflows = [{"id": "rounds", "path": path("FederationController"), "args": controller}]
    executors = [{"tasks": ["*"], "executor": {"path": path("SiteExecutor"), "args": {}}}]
    job = {"name": config.out.name, "resource_spec": {}, "min_clients": config.needed(len(sites))}
    write_json(folder / "meta.json", job | {"deploy_map": {"app": ["@ALL"]}})
    write_json(folder / "app/config/config_fed_server.json", {"format_version": 2, "workflows": workflows})
    write_json(folder / "app/config/config_fed_client.json", {"format_version": 2, "executors": executors})


def run_deployed(config: FederateConfig, sites: Sequence[str], kit: Path, *, quiet: bool = False) -> Federation:
    """Submit jobs to the server until the federation has finished, and download the averaged adapter to `out`.

    The server may be killed and restarted in between: it continues after the last finished round.

    Args:
        kit: the startup kit of an administrator.

    Raises:
        InputError: the server cannot be reached, or a job ends without finishing a round.
    """
    finished, lost, started = 0, 0, time.monotonic()
    while True:
        with tempfile.TemporaryDirectory() as temporary:
            write_job(Path(temporary) / "job", config, sites)
            result = _run_job(Path(temporary) / "job", kit, Path(temporary), sites)
            record = read_json(result / RECORD_FILE) if result and (result / RECORD_FILE).is_file() else {"rounds": []}
            rounds = len(record["rounds"])
            if result and rounds >= config.rounds and record["finished"]:
                config.out.mkdir(parents=True, exist_ok=True)
                shutil.copytree(result, config.out, dirs_exist_ok=True)
                recipe, size, seconds = record["recipe"], record["bytes_a_round"], time.monotonic() - started
                return Federation.from_rounds(config, recipe, record["rounds"], size, 0, seconds)
            if result is not None and (result / ERROR_FILE).is_file():
                raise InputError((result / ERROR_FILE).read_text(encoding="utf-8"))
        lost = lost + 1 if result is None else 0
        if lost > _ATTEMPTS or (result is not None and rounds <= finished):
            raise InputError(f"a job ended after round {rounds} without another one. The server's log has the reason.")
        finished = max(finished, rounds)
        if not quiet:
            print(f"{finished} of {config.rounds} rounds are done; the next job starts", file=sys.stderr, flush=True)


def _run_job(job: Path, kit: Path, download: Path, sites: Sequence[str]) -> Path | None:
    """Submit a job and wait for its end; returns the folder of its result, None if the server was away."""
    session = _connect(kit)
    try:
        _wait_for_sites(session, sites)
        job_id = session.submit_job(str(job))
        while not str(session.get_job_meta(job_id).get("status")).startswith("FINISHED"):
            time.sleep(_POLL_S)
        result = Path(session.download_job_result(job_id, str(download / "result")))
        return next(iter(result.rglob(FOLDER)), result)
    except Exception as error:  # NVFlare raises several kinds when the server ends
        print(f"lost the server ({type(error).__name__}); waiting for it", file=sys.stderr, flush=True)
        return None
    finally:
        session.api.close()  # its threads would keep this process from ending; a logout would need the server


def _wait_for_sites(session: Any, sites: Sequence[str]) -> None:
    """Wait a while until all sites are connected: a job runs with those that are there at its start."""
    deadline = time.monotonic() + _GATHER_S
    while time.monotonic() < deadline:
        if {client.name for client in session.get_system_info().client_info} >= set(sites):
            return
        time.sleep(_POLL_S)


def _connect(kit: Path) -> Any:
    """A session of the administrator; waits while the server restarts."""
    deadline = time.monotonic() + _RESTART_S
    while True:
        try:
            return new_secure_session(kit.resolve().name, str(kit.resolve()), timeout=20)
        except Exception as error:
            if time.monotonic() > deadline:
                raise InputError(f"cannot reach the server with {kit}: {error}. Is it running?") from error
            time.sleep(_POLL_S)
