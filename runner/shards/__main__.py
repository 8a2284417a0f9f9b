"""``python -m runner.shards PATTERN... --out shards.json``: count the records of shards and find their blocks.

An interrupted scan goes on where it stopped: the same command scans only shards that are new or have changed.
"""

import argparse
import json
import shlex
import sys
import time

from tqdm import tqdm

from runner.errors import DataError, Interrupted, RunnerError
from runner.shards.formats import DTYPES, KINDS
from runner.shards.scan import Scan
from runner.shards.shard_manifest import Manifest, load
from runner.shards.shard_manifest import save as save_manifest
from runner.storage import files

_SAVE_SECONDS = 2.0
_SAVE_SHARE = 20  # writing a large manifest may take at most 1/20 of the time


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status, as listed in ``runner.errors``."""
    parsed = _parser().parse_args(arguments)
    try:
        _scan(parsed)
    except RunnerError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runner.shards",
        description="Scan shards once and write a manifest of them, which data sets read instead of scanning again.",
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="a file, a folder or a glob; any fsspec path")
    parser.add_argument("--out", required=True, help="the manifest to write, for example shards.json; any fsspec path")
    parser.add_argument("--format", choices=KINDS, help="of the shards (default: by their suffixes)")
    parser.add_argument("--dtype", choices=DTYPES, help="of tokens in files without a header (default: uint16)")
    parser.add_argument("--jobs", type=int, default=4, help="shards to scan at the same time (default: 4)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def _scan(parsed: argparse.Namespace) -> None:
    scan = Scan(parsed.patterns, kind=parsed.format, dtype=parsed.dtype, exclude=files.resolve(parsed.out))
    kept = scan.keep(_earlier(parsed.out)) if files.exists(parsed.out) else 0
    missing = scan.missing
    save = _PartialManifest(scan, parsed)
    try:
        with tqdm(
            total=scan.missing_bytes, unit="B", unit_scale=True, desc="scan", dynamic_ncols=True, disable=None
        ) as bar:
            scan.run(jobs=max(1, parsed.jobs), progress=bar.update, save=save.if_due)
    except KeyboardInterrupt:
        save.now()
        raise Interrupted(
            f"stopped: kept {kept}, scanned {missing - scan.missing}, missing {scan.missing}; run it again"
        ) from None
    except RunnerError:
        save.now()
        raise
    complete = scan.manifest
    save_manifest(parsed.out, complete)
    _print_summary(complete, kept, missing, parsed)


def _earlier(out: str) -> Manifest:
    try:
        return load(out, partial=True)
    except DataError as error:
        raise DataError(f"{error}\n--out {out} is in the way: remove it, or give another name") from error


class _PartialManifest:
    """Writes the results so far, less often if writing takes long."""

    def __init__(self, scan: Scan, parsed: argparse.Namespace) -> None:
        self._scan = scan
        self._out = parsed.out
        self._command = _command(parsed)
        self._due = time.monotonic() + _SAVE_SECONDS

    def if_due(self) -> None:
        if time.monotonic() >= self._due:
            self.now()

    def now(self) -> None:
        began = time.monotonic()
        save_manifest(self._out, self._scan.partial, command=self._command)
        ended = time.monotonic()
        self._due = ended + max(_SAVE_SECONDS, _SAVE_SHARE * (ended - began))


def _command(parsed: argparse.Namespace) -> str:
    words = [*parsed.patterns, "--out", parsed.out]
    words += ["--format", parsed.format] if parsed.format else []
    words += ["--dtype", parsed.dtype] if parsed.dtype else []
    return f"python -m runner.shards {shlex.join(words)}"


def _print_summary(complete: Manifest, kept: int, scanned: int, parsed: argparse.Namespace) -> None:
    summary = {
        "shards": len(complete.shards),
        "records": int(complete.firsts[-1]),
        "bytes": sum(shard.size for shard in complete.shards),
        "kept": kept,
        "scanned": scanned,
    }
    if parsed.json:
        print(json.dumps(summary))
        return
    print(
        f"{parsed.out}: {summary['records']} records in {summary['shards']} shards of {complete.kind}, "
        f"{summary['bytes']} bytes; kept {kept}, scanned {scanned}"
    )


if __name__ == "__main__":
    sys.exit(main())
