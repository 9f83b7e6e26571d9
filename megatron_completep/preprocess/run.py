"""One preprocessing run, from inputs to token files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_completep.data.files import printable, read_json
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import DataError
from megatron_completep.preprocess.encode import Record
from megatron_completep.preprocess.engines import choose_engine
from megatron_completep.preprocess.merge import merge
from megatron_completep.preprocess.progress import Display
from megatron_completep.preprocess.report import LengthStatistics, write_report
from megatron_completep.preprocess.settings import PreprocessSettings
from megatron_completep.preprocess.sources import Source, Unit, find_sources, make_units
from megatron_completep.preprocess.work import WorkFolder

_MOST_BLOCKS = 20_000
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 22, 1 << 24  # bytes of text


def preprocess(
    settings: PreprocessSettings,
    *,
    workers: int = 1,
    engine: str = "local",
    shard: tuple[int, int] | None = None,
    max_bad_documents: int = 0,
    overwrite: bool = False,
    log_interval: int = 1000,
    block_bytes: int | None = None,
) -> dict[str, Any]:
    """Tokenize the inputs into `{output_prefix}_{key}_document.{bin,idx,json}`; returns the report, which is also written to
    `{output_prefix}_report.json` with a picture beside it.

    Finished blocks survive any interruption in `{output_prefix}.preprocess`; the same call goes on from there. The bytes of the result
    depend on `settings` and the inputs alone, not on workers, engine, shard, or interruptions.

    shard: (i, n) does only every n-th unit of work, from i, and merges nothing; a call without it does what is missing and merges.
    max_bad_documents: stop when more are unreadable. overwrite: replace another run's output. block_bytes: text handed out at a time.
    Raises DataError; never leaves a partial output that could be taken for a whole one.
    """
    sources = find_sources(settings.inputs, settings.input_format)
    tokenizer = _checked_tokenizer(settings, sources)
    total = sum(source.size for source in sources)
    block_bytes = block_bytes or min(max(total // _MOST_BLOCKS, _SMALLEST_BLOCK), _LARGEST_BLOCK)
    fingerprint = settings.fingerprint(sources, tokenizer.identity(), block_bytes)
    finished = _finished_report(settings, fingerprint, overwrite)
    if finished is not None:
        return {**finished, "status": "already complete"}
    _refuse_to_replace(settings, overwrite)
    units = make_units(sources, block_bytes)
    work = WorkFolder(settings, fingerprint, exclusive=shard is None)
    try:
        with Display(total, log_interval) as display:
            mine = units if shard is None else units[shard[0] :: shard[1]]
            _encode(work, mine, block_bytes, engine, workers, max_bad_documents, display)
            if shard is not None:
                return {
                    "status": f"shard {shard[0]}/{shard[1]} complete",
                    "fingerprint": fingerprint,
                }
            return _finish(work, tokenizer, units, fingerprint, display)
    finally:
        work.close()


def _checked_tokenizer(settings: PreprocessSettings, sources: list[Source]) -> Tokenizer:
    tokenizer = build_tokenizer(settings.tokenizer)
    if settings.append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"{settings.tokenizer.model}: the tokenizer has no end-of-document token, so --append-eod cannot be done."
        )
    if len(set(settings.json_keys)) != len(settings.json_keys) or not settings.json_keys:
        raise DataError(f"--json-keys {' '.join(settings.json_keys)}: give each key once.")
    plain = [printable(source.path) for source in sources if source.format in ("text", "lines")]
    if plain and len(settings.json_keys) > 1:
        raise DataError(
            f"{plain[0]}: plain text has no keys, but --json-keys names {' '.join(settings.json_keys)}. Process it on its own."
        )
    return tokenizer


def _finished_report(
    settings: PreprocessSettings, fingerprint: str, overwrite: bool
) -> dict[str, Any] | None:
    """The report of an earlier run that did exactly this, when all its files are there and open."""
    path = Path(f"{settings.output_prefix}_report.json")
    wanted = [
        path,
        *(
            Path(prefix + suffix)
            for prefix in settings.output_prefixes()
            for suffix in (".bin", ".idx", ".json")
        ),
    ]
    if not all(name.exists() for name in wanted):
        return None
    report = _load(path)
    if report.get("fingerprint") != fingerprint:
        return None
    try:
        for prefix in settings.output_prefixes():
            IndexedDataset(prefix)
    except DataError as error:
        if overwrite:
            return None
        raise DataError(
            f"{error}\nThis command has written it before; give --overwrite to write it again."
        ) from None
    return report


def _load(path: Path) -> dict[str, Any]:
    try:
        report = read_json(path)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _refuse_to_replace(settings: PreprocessSettings, overwrite: bool) -> None:
    if overwrite or Path(settings.output_prefix + ".preprocess").exists():
        return  # an unfinished run was allowed to begin; its plan is compared next
    existing = [prefix for prefix in settings.output_prefixes() if Path(prefix + ".idx").exists()]
    if existing:
        raise DataError(
            f"{existing[0]}.idx: exists, made from other inputs, tokenizer or settings. "
            "Choose another --output-prefix, or give --overwrite."
        )


def _encode(
    work: WorkFolder,
    units: list[Unit],
    block_bytes: int,
    engine: str,
    workers: int,
    max_bad_documents: int,
    display: Display,
) -> None:
    """Do every block of the units that has no result yet."""
    run = choose_engine(engine, workers)
    bad = _count_bad(work, max_bad_documents)
    display.resumed(sum(record["disk_bytes"] for record in work.records.values()))
    if work.records:
        display.say(f"going on: {len(work.records)} blocks are finished")
    if work.damaged:
        display.say(
            f"{len(work.damaged)} records of finished work are not what was written; that work is done again: {work.damaged[0]}"
        )
    for record in run(
        work.settings, work.shard, workers, work.unfinished_blocks(units, block_bytes)
    ):
        work.add(record)
        display.add(record)
        bad += record["bad_count"]
        if bad > max_bad_documents:
            _count_bad(work, max_bad_documents)


def _count_bad(work: WorkFolder, limit: int) -> int:
    bad = sum(record["bad_count"] for record in work.records.values())
    if bad > limit:
        raise DataError(
            f"{bad} documents are bad, --max-bad-documents is {limit}:\n"
            + "\n".join(_bad_examples(work.ordered()))
            + "\nCorrect them, or raise --max-bad-documents to leave them out (finished work is kept). "
            "--unicode repair mends invalid UTF-8."
        )
    return bad


def _bad_examples(records: Iterator[Record], number: int = 10) -> list[str]:
    examples: list[str] = []
    for record in records:
        examples += record["bad"]
        if len(examples) >= number:
            break
    return examples[:number]


def _finish(
    work: WorkFolder, tokenizer: Tokenizer, units: list[Unit], fingerprint: str, display: Display
) -> dict[str, Any]:
    """Merge, report, and remove the work folder."""
    records = list(work.ordered())
    sources = [source for unit in units for source in unit.sources]
    for line in _changes(sources):
        display.say(line)
    if empty := _without_documents(units, records):
        display.say(
            f"{len(empty)} input files hold no document: {', '.join(empty[:10])}{' ...' if len(empty) > 10 else ''}"
        )
    if not any(record["documents"] for record in records):
        work.delete()  # else a corrected command would be refused as another run
        raise DataError(
            f"no document is left of {len(sources)} input files (empty files, or all documents dropped or bad). Nothing was written."
        )
    display.stage("merge", sum(record["tokens"] for record in records))
    sidecars, statistics, duplicates = merge(work, tokenizer, display.step)
    report = _report(work, sidecars, statistics, sources, empty) | {
        "duplicates": duplicates,
        "fingerprint": fingerprint,
    }
    write_report(
        f"{work.settings.output_prefix}_report", report, statistics, work.settings.json_keys
    )
    work.delete()
    return {**report, "status": "complete"}


def _changes(sources: list[Source]) -> list[str]:
    """Sentences about inputs that were written to meanwhile. Raises DataError for one that became shorter: documents are missing."""
    lines = []
    for source in sources:
        try:
            status = os.stat(source.path)
        except OSError:
            continue  # removed after it was read; before that it would have been a bad document
        if status.st_size < source.size:
            raise DataError(
                f"{printable(source.path)}: has {status.st_size} bytes, at the start of this run it had {source.size}. Documents may be "
                f"missing, so nothing was written. Restore the file, delete the work folder and run again."
            )
        if (status.st_size, status.st_mtime_ns) != (source.size, source.modified_ns):
            lines.append(
                f"warning: {printable(source.path)} changed while it was read; the output holds a mixture of the two states."
            )
    return lines


def _without_documents(units: list[Unit], records: list[Record]) -> list[str]:
    """Input files that gave nothing, not even a bad document. A file that is one document counts when it has no byte."""
    number_in = dict.fromkeys((unit.index for unit in units), 0)
    for record in records:
        left_out = record["bad_count"] + record["dropped_characters"] + record["dropped_tokens"]
        number_in[record["unit"]] += record["documents"] + left_out
    return [
        printable(source.path)
        for unit in units
        for source in unit.sources
        if not source.size or (source.format != "text" and number_in[unit.index] == 0)
    ]


def _report(
    work: WorkFolder,
    sidecars: list[dict[str, Any]],
    statistics: LengthStatistics,
    sources: list[Source],
    empty: list[str],
) -> dict[str, Any]:
    records = list(work.records.values())
    text_bytes = statistics.text_bytes.total
    outputs = [
        {
            "key": key,
            "prefix": printable(prefix),
            "documents": sidecar["documents"],
            "tokens": sidecar["tokens"],
            "bytes": sidecar["bin"]["bytes"],
            "tokens_a_document": histogram.summary(),
        }
        for key, prefix, sidecar, histogram in zip(
            work.settings.json_keys,
            work.settings.output_prefixes(),
            sidecars,
            statistics.tokens,
            strict=True,
        )
    ]
    return {
        "inputs": {
            "files": len(sources),
            "bytes_on_disk": sum(source.size for source in sources),
            "empty_files": empty[:100],
        },
        "documents": statistics.documents,
        "dropped": {
            "characters": sum(record["dropped_characters"] for record in records),
            "tokens": sum(record["dropped_tokens"] for record in records),
        },
        "bad_documents": sum(record["bad_count"] for record in records),
        "bad_examples": _bad_examples(work.ordered(), 100),
        "text_bytes_a_document": statistics.text_bytes.summary(),
        "bytes_a_token": text_bytes / max(sum(sidecar["tokens"] for sidecar in sidecars), 1),
        "tokenizer": sidecars[0]["tokenizer"],
        "outputs": outputs,
    }
