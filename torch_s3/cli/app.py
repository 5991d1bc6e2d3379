"""The commands: thin ones over the package's functions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from torch_s3 import Manifest, S3Error, __version__, inspect_checkpoint
from torch_s3.data.pack import pack as pack_objects

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Manifests, shards and checkpoints in S3. Credentials are found as by boto3 and the AWS CLI.",
)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

EndpointUrl = Annotated[str | None, typer.Option(help="Of a server other than AWS.")]
Profile = Annotated[str | None, typer.Option(help="Of the shared AWS configuration.")]
Region = Annotated[str | None, typer.Option(help="Where the bucket is.")]
Anon = Annotated[bool, typer.Option("--anon", help="What is read is public: use no credentials for it.")]
Suffixes = Annotated[list[str] | None, typer.Option("--suffix", help="Keep only keys that end so. May be repeated.")]


class Format(StrEnum):
    """What shards may be."""

    tar = "tar"
    tfrecord = "tfrecord"


class LabelSource(StrEnum):
    """What labels may be here."""

    auto = "auto"
    folder = "folder"
    none = "none"


class OnError(StrEnum):
    """What may become of samples that can't be read."""

    raise_ = "raise"
    skip = "skip"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version, and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="s3://bucket/prefix/ or file:///folder/; see --from-manifest.")],
    out: Annotated[str, typer.Argument(help="s3://bucket/prefix/ for the shards, with nothing else in it.")],
    *,
    format: Annotated[Format, typer.Option(help="tar has WebDataset's conventions.")] = Format.tar,
    shard_size: Annotated[str, typer.Option(help="Most bytes of a shard, such as 500MB or 256MiB.")] = "256MiB",
    labels: Annotated[LabelSource, typer.Option(help="auto: the manifest's, if any.")] = LabelSource.auto,
    suffixes: Suffixes = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Write samples in a random order.")] = False,
    seed: Annotated[int, typer.Option(help="Of that order.")] = 0,
    on_error: Annotated[OnError, typer.Option(help="skip: leave out samples that can't be read.")] = OnError.raise_,
    workers: Annotated[int, typer.Option(min=1, help="Shards written at once.")] = 4,
    ray: Annotated[bool, typer.Option("--ray", help="Write each shard in a Ray task instead.")] = False,
    from_manifest: Annotated[bool, typer.Option("--from-manifest", help="SOURCE is a manifest's file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no bar.")] = False,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    region: Region = None,
    anon: Anon = False,
) -> None:
    """Turn the objects under a prefix into shards, with indices and a manifest.

    The same command goes on where one before was stopped.
    """
    with _reported():
        options = _storage_options(endpoint_url, profile, region, anon)
        objects = Manifest.load(source, storage_options=_of_s3(source, options)) if from_manifest else source
        root = objects.root if isinstance(objects, Manifest) else objects
        packed = pack_objects(
            objects,
            out,
            format=format.value,
            shard_size=_bytes(shard_size),
            labels=None if labels is LabelSource.none else labels.value,
            suffixes=suffixes or None,
            shuffle=shuffle,
            seed=seed,
            on_error=on_error.value,
            workers=workers,
            ray=ray,
            progress=False if quiet else None,
            storage_options=_of_s3(root, options),
            out_storage_options=_of_s3(out, _storage_options(endpoint_url, profile, region)),
        )
        for each in packed.skipped:
            typer.echo(f"left out: {each.message}", err=True)
        resumed = f", {packed.resumed} of them there already" if packed.resumed else ""
        count = len(packed.shards)
        shards = "1 shard" if count == 1 else f"{count:,} shards"
        typer.echo(f"{packed.records:,} samples, {packed.bytes:,} bytes in {shards}{resumed}: {packed.uris}")


@app.command()
def manifest(
    source: Annotated[str, typer.Argument(help="s3://bucket/prefix/")],
    out: Annotated[str, typer.Argument(help="The file to write, in S3 or on disk.")],
    *,
    suffixes: Suffixes = None,
    pattern: Annotated[str | None, typer.Option(help="Keep only keys that match, such as '*/2024-*.jpg'.")] = None,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    region: Region = None,
    anon: Anon = False,
) -> None:
    """List a prefix once, and keep the listing as a file for the datasets."""
    with _reported():
        options = _storage_options(endpoint_url, profile, region, anon)
        found = Manifest.from_prefix(
            source, suffixes=suffixes or None, pattern=pattern, storage_options=_of_s3(source, options)
        )
        found.save(out, storage_options=_of_s3(out, _storage_options(endpoint_url, profile, region)))
        typer.echo(f"{len(found):,} objects, {int(found.sizes.sum()):,} bytes: {out}")


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A .pt or .safetensors file, or the index of several.")],
    *,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    region: Region = None,
    anon: Anon = False,
) -> None:
    """Show a checkpoint's tensors, without loading it."""
    with _reported():
        options = _storage_options(endpoint_url, profile, region, anon)
        found = inspect_checkpoint(checkpoint, storage_options=_of_s3(checkpoint, options))
        table = Table("tensor", "dtype", "shape", "bytes", box=None)
        for each in found.tensors:
            dtype = str(each.dtype).removeprefix("torch.")
            table.add_row(each.name, dtype, " x ".join(map(str, each.shape)), f"{each.bytes:,}")
        console = Console(soft_wrap=True, highlight=False, markup=False)
        console.print(table)
        console.print(f"{len(found.tensors):,} tensors, {found.bytes:,} bytes, format {found.format}: {found.uri}")
        for name in found.unsafe_globals:
            console.print(f"refused by weights_only: {name}")


@contextmanager
def _reported() -> Iterator[None]:
    """One line for what went wrong, and no traceback."""
    try:
        yield
    except (S3Error, ValueError, ImportError, OSError) as error:
        typer.echo(f"torch-s3: {' '.join(str(error).splitlines())}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("torch-s3: stopped; nothing is half-written", err=True)
        raise typer.Exit(130) from None


def _storage_options(
    endpoint_url: str | None, profile: str | None, region: str | None, anon: bool = False
) -> dict[str, Any]:
    given = {"endpoint_url": endpoint_url, "profile": profile, "region": region, "anon": anon or None}
    return {name: value for name, value in given.items() if value is not None}


def _of_s3(uri: str, options: dict[str, Any]) -> dict[str, Any] | None:
    return options if uri.startswith("s3") else None


def _bytes(text: str) -> int:
    """A number of bytes, as people write it.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no number of bytes: write 500MB or 256MiB")
    return int(float(match[1]) * _UNITS[match[2]])
