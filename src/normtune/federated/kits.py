"""Startup kits for the server, the sites and an administrator, by NVFlare's provisioning.

A kit is a folder with certificates and scripts that its owner starts. `prepare_kits` also lets the kits run our two
classes, and keeps the logs of a site at the site, which NVFlare would stream to the server.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from normtune.errors import InputError
from normtune.runtime.files import check_new_directory, read_json, write_json, write_text

ADMIN = "admin@normtune.org"
_PROJECT = "federation"
_CLASSES = [f"normtune.federated.flare.{name}" for name in ("FederationController", "SiteExecutor")]
_SITE_TEMPLATE = """\
# The data of this site. The server never receives this file. Its options are those of a dataset in
# `normtune train --help`, and: part, model, device.
data: csv
root: /path/to/rows.csv
"""


def prepare_kits(out: Path, sites: Sequence[str], server: str, port: int, *, secure: bool = False) -> dict[str, str]:
    """Write the startup kits of a federation.

    Args:
        out: folder to write; it must be new or empty. It holds the private key that signs certificates: keep it.
        sites: names of the sites.
        server: host name of the server, as the sites reach it.
        port: of the server, for sites and administrator.
        secure: add the keys with which sites encrypt their updates; the server's kit gets no secret key.

    Returns:
        Owner of a kit -> its folder.

    Raises:
        InputError: `out` is in use, a name is not valid, or NVFlare is not installed.
    """
    check_new_directory(out)
    owners = [("server", server), *(("client", site) for site in sites), ("admin", ADMIN)]
    extra: dict[str, dict[str, Any]] = {
        "server": {"fed_learn_port": port},
        "client": {},
        "admin": {"role": "project_admin"},
    }
    builders = "nvflare.lighter.impl."
    project = {
        "api_version": 3,
        "name": _PROJECT,
        "participants": [{"name": name, "type": kind, "org": "normtune", **extra[kind]} for kind, name in owners],
        "builders": [
            {"path": f"{builders}workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
            {"path": f"{builders}static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "grpc"}},
            *([{"path": f"{builders}he.HEBuilder", "args": {}}] if secure else []),
            {"path": f"{builders}cert.CertBuilder"},
            {"path": f"{builders}signature.SignatureBuilder"},
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "project.yml", yaml.safe_dump(project, sort_keys=False))
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", "."]
    ended = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    folder = out / _PROJECT / "prod_00"
    if ended.returncode or not folder.is_dir():
        reason = (ended.stderr or ended.stdout).strip().splitlines()[-1:] or ["no message"]
        raise InputError(
            f"NVFlare wrote no startup kits: {reason[0]}. Install it with: pip install normtune[federate]."
        )
    kits = {name: folder / name for _, name in owners}
    for kind, name in owners[:-1]:
        _allow_normtune(kits[name] / "local", is_site=kind == "client")
    for site in sites:
        write_text(kits[site] / "local" / "site.yaml", _SITE_TEMPLATE)
    return {name: str(kit) for name, kit in kits.items()}


def _allow_normtune(local: Path, *, is_site: bool) -> None:
    """Write `resources.json`: our classes are allowed, and a site streams no logs."""
    resources = read_json(local / "resources.json.default")
    resources["class_allow_list"] += _CLASSES
    if is_site:
        resources["allow_log_streaming"] = False
        resources["components"] = [part for part in resources["components"] if "log_streamer" not in part["id"]]
    write_json(local / "resources.json", resources)
