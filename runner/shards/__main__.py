"""``python -m runner.shards PATTERN... --out shards.json``: count the records of shards and find their blocks.

An interrupted scan continues where it stopped: the same command scans only shards that are new or have changed.
"""

import argparse
import json
import shlex
import sys
import time

from tqdm import tqdm

from runner.errors import DataError, Interrupted, RunnerError
from runner.shards import scan as manifests
from runner.shards.formats import DTYPES, KINDS
from runner.shards.scan import Scan
from runner.storage import files

_SAVE_SECONDS = 2.0
_SAVE_SHARE = 20  # writing a large manifest may take at most 1/20 of the time


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status, as listed in ``runner.errors``."""
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
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _scan(parser.parse_args(arguments), command=f"python -m runner.shards {shlex.join(arguments)}")
    except RunnerError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


def _scan(parsed: argparse.Namespace, *, command: str) -> None:
    """Write the manifest. Until it is complete, it names the ``command`` that completes it."""
    scan = Scan(parsed.patterns, kind=parsed.format, dtype=parsed.dtype, exclude=files.resolve(parsed.out))
    kept = 0
    if files.exists(parsed.out):
        try:
            kept = scan.keep(manifests.load(parsed.out, partial=True))
        except DataError as error:
            raise DataError(f"{error}\n--out {parsed.out} is in the way: remove it, or give another name") from error
    due = time.monotonic() + _SAVE_SECONDS

    def save(*, now: bool = False) -> None:
        """Write the results so far, less often if writing takes long."""
        nonlocal due
        if now or time.monotonic() >= due:
            began = time.monotonic()
            manifests.save(parsed.out, scan.partial, command=command)
            ended = time.monotonic()
            due = ended + max(_SAVE_SECONDS, _SAVE_SHARE * (ended - began))

    missing = len(scan.missing)
    try:
        with tqdm(
            total=sum(scan.missing.values()), unit="B", unit_scale=True, desc="scan", dynamic_ncols=True, disable=None
        ) as bar:
            complete = scan.run(jobs=parsed.jobs, progress=bar.update, save=save)
    except RunnerError:
        save(now=True)
        raise
    except KeyboardInterrupt:
        save(now=True)
        counts = f"kept {kept}, scanned {missing - len(scan.missing)}, missing {len(scan.missing)}"
        raise Interrupted(f"stopped: {counts}; run it again") from None
    manifests.save(parsed.out, complete)
    shards, records = complete.shards, int(complete.firsts[-1])
    size = sum(shard.size for shard in shards)
    summary = {"shards": len(shards), "records": records, "bytes": size, "kept": kept, "scanned": missing}
    counts = f"{records} records in {len(shards)} shards of {scan.kind}, {size} bytes"
    print(json.dumps(summary) if parsed.json else f"{parsed.out}: {counts}; kept {kept}, scanned {missing}")


if __name__ == "__main__":
    sys.exit(main())
