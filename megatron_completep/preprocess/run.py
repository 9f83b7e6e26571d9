"""One preprocessing run, from inputs to token files."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_completep.data.files import printable, read_json
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import DataError
from megatron_completep.preprocess.engines import choose_engine
from megatron_completep.preprocess.journal import Record
from megatron_completep.preprocess.merge import merge
from megatron_completep.preprocess.progress import Display
from megatron_completep.preprocess.report import LengthStatistics, write_report
from megatron_completep.preprocess.settings import PreprocessSettings
from megatron_completep.preprocess.sources import Source, Unit, find_sources, make_units
from megatron_completep.preprocess.work import WorkFolder, recorded_fingerprint

_MOST_BLOCKS = 20_000
_SMALLEST_BLOCK = 1 << 22  # bytes of text
_LARGEST_BLOCK = 1 << 24
_LISTED_FILES = 10  # in one message
_REPORTED_EXAMPLES = 100  # of bad documents and of empty files, in the report


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
    """Tokenize the inputs into `{output_prefix}_{key}_document.{bin,idx,json}`; returns the report.

    The report is also written to `{output_prefix}_report.json`, with a picture beside it.

    Finished blocks survive any interruption in `{output_prefix}.preprocess`; the same call goes on
    from there. The bytes of the result depend on `settings` and the inputs alone, not on workers,
    engine, shard, or interruptions.

    shard: (i, n) does only every n-th unit of work, from i, and merges nothing; a call without it
    does what is missing and merges. max_bad_documents: stop when more are unreadable. overwrite:
    replace another run's output. block_bytes: text handed out at a time. Raises DataError; never
    leaves a partial output that could be taken for a whole one.
    """
    # All mistakes in the inputs are found before any work is begun.
    sources = find_sources(settings.inputs, settings.input_format)
    tokenizer = _checked_tokenizer(settings, sources)
    total_bytes = sum(source.size for source in sources)
    # A block costs a journal line and a hand-over, so a large corpus has larger ones.
    if not block_bytes:
        block_bytes = min(max(total_bytes // _MOST_BLOCKS, _SMALLEST_BLOCK), _LARGEST_BLOCK)
    identity = tokenizer.identity()
    fingerprint = settings.fingerprint(sources, identity, block_bytes, tokenizer.beginning)
    # Work that was begun before beginnings were known is finished as it was begun.
    former = settings.fingerprint(sources, identity, block_bytes)
    goes_on_without = former != fingerprint and _was_begun_without(settings, former)
    if goes_on_without:
        choice = replace(settings.tokenizer, prepend_bos=False)
        settings = replace(settings, tokenizer=choice)
        tokenizer = build_tokenizer(choice)
        fingerprint = former

    finished_report = _finished_report(settings, fingerprint, overwrite)
    if finished_report is not None:
        return {**finished_report, "status": "already complete"}
    _refuse_to_replace(settings, overwrite)
    units = make_units(sources, block_bytes)
    work = WorkFolder(settings, fingerprint, exclusive=shard is None)
    try:
        with Display(total_bytes, log_interval) as display:
            if goes_on_without:
                display.say(
                    "the unfinished work was begun without a beginning-of-text token, and is "
                    f"finished so; delete {printable(work.path)} to begin anew"
                )
            own_units = units if shard is None else units[shard[0] :: shard[1]]
            _encode(work, own_units, block_bytes, engine, workers, max_bad_documents, display)
            # Other processes may still be at work on the other units.
            if shard is not None:
                return {
                    "status": f"shard {shard[0]}/{shard[1]} complete",
                    "fingerprint": fingerprint,
                }
            return _finish(work, tokenizer, units, fingerprint, display)
    finally:
        work.close()


def _was_begun_without(settings: PreprocessSettings, former: str) -> bool:
    """Whether the work folder holds this run's work, begun without a beginning of documents.

    Never where the user asks for a beginning. former: the fingerprint of such a run.
    """
    if settings.tokenizer.prepend_bos is not None:
        return False
    return recorded_fingerprint(settings) == former


def _checked_tokenizer(settings: PreprocessSettings, sources: list[Source]) -> Tokenizer:
    """The tokenizer. Raises DataError where it, the keys and the inputs do not fit together."""
    tokenizer = build_tokenizer(settings.tokenizer)
    if settings.append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"{settings.tokenizer.model}: the tokenizer has no end-of-document token, so "
            "--append-eod cannot be done. Name one with --eod-token."
        )
    if settings.tokenizer.eod_token is not None and not settings.append_eod:
        raise DataError(
            f"--eod-token {settings.tokenizer.eod_token} names the token that --append-eod writes. "
            "Give both, or neither."
        )
    keys = settings.json_keys
    if len(set(keys)) != len(keys) or not keys:
        raise DataError(f"--json-keys {' '.join(keys)}: give each key once.")
    plain_sources = [source for source in sources if source.format in ("text", "lines")]
    if plain_sources and len(keys) > 1:
        raise DataError(
            f"{printable(plain_sources[0].path)}: plain text has no keys, but --json-keys names "
            f"{' '.join(keys)}. Process it on its own."
        )
    return tokenizer


def _finished_report(
    settings: PreprocessSettings, fingerprint: str, overwrite: bool
) -> dict[str, Any] | None:
    """The report of an earlier run that did exactly this, when all its files are there and open."""
    report_path = Path(f"{settings.output_prefix}_report.json")
    if not report_path.exists():
        return None
    for prefix in settings.output_prefixes():
        if not all(Path(prefix + suffix).exists() for suffix in (".bin", ".idx", ".json")):
            return None
    report = _load(report_path)
    if report.get("fingerprint") != fingerprint:
        return None
    # A disk may have lost what was written.
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
    """The JSON object of a file; empty where the file holds something else."""
    try:
        report = read_json(path)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _refuse_to_replace(settings: PreprocessSettings, overwrite: bool) -> None:
    """Raises DataError where another run's output would be replaced unasked."""
    # An unfinished run was allowed to begin; its plan is compared next.
    if overwrite or Path(settings.output_prefix + ".preprocess").exists():
        return
    for prefix in settings.output_prefixes():
        if Path(prefix + ".idx").exists():
            raise DataError(
                f"{prefix}.idx: exists, made from other inputs, tokenizer or settings. "
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
    encode_blocks = choose_engine(engine, workers)
    bad = _count_bad(work, max_bad_documents)
    display.resumed(sum(record["disk_bytes"] for record in work.records.values()))
    if work.records:
        display.say(f"going on: {len(work.records)} blocks are finished")
    if work.damaged:
        display.say(
            f"{len(work.damaged)} records of finished work are not what was written; that work is "
            f"done again: {work.damaged[0]}"
        )
    blocks = work.unfinished_blocks(units, block_bytes)
    for record in encode_blocks(work.settings, work.shard, workers, blocks):
        work.add(record)
        display.add(record)
        bad += record["bad_count"]
        # The full count is taken, and the error raised, only where there are too many.
        if bad > max_bad_documents:
            _count_bad(work, max_bad_documents)


def _count_bad(work: WorkFolder, limit: int) -> int:
    """Bad documents of the blocks so far. Raises DataError with examples above the limit."""
    bad: int = sum(record["bad_count"] for record in work.records.values())
    if bad > limit:
        examples = "\n".join(_bad_examples(work.ordered()))
        raise DataError(
            f"{bad} documents are bad, --max-bad-documents is {limit}:\n{examples}\n"
            "Correct them, or raise --max-bad-documents to leave them out (finished work is kept). "
            "--unicode repair mends invalid UTF-8."
        )
    return bad


def _bad_examples(records: Iterator[Record], number: int = 10) -> list[str]:
    """Descriptions of the first bad documents."""
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
    sources: list[Source] = []
    for unit in units:
        sources += unit.sources
    for line in _changes(sources):
        display.say(line)
    empty_files = _without_documents(units, records)
    if empty_files:
        listed = ", ".join(empty_files[:_LISTED_FILES])
        more = " ..." if len(empty_files) > _LISTED_FILES else ""
        display.say(f"{len(empty_files)} input files hold no document: {listed}{more}")
    if not any(record["documents"] for record in records):
        work.delete()  # else a corrected command would be refused as another run
        raise DataError(
            f"no document is left of {len(sources)} input files (empty files, or all documents "
            "dropped or bad). Nothing was written."
        )

    display.stage("merge", sum(record["tokens"] for record in records))
    sidecars, statistics, duplicates = merge(work, tokenizer, display.step)
    report = _report(work, sidecars, statistics, sources, empty_files)
    report["duplicates"] = duplicates
    report["fingerprint"] = fingerprint
    path = f"{work.settings.output_prefix}_report"
    # The report is written last: with it the run counts as finished.
    write_report(path, report, statistics, work.settings.json_keys)
    work.delete()
    return {**report, "status": "complete"}


def _changes(sources: list[Source]) -> list[str]:
    """Sentences about inputs that were written to during the run.

    Raises DataError for one that became shorter, since documents are missing.
    """
    lines = []
    for source in sources:
        try:
            status = os.stat(source.path)
        except OSError:
            # Removed after it was read; before that it would have been a bad document.
            continue
        if status.st_size < source.size:
            raise DataError(
                f"{printable(source.path)}: has {status.st_size} bytes, at the start of this run "
                f"it had {source.size}. Documents may be missing, so nothing was written. Restore "
                "the file, delete the work folder and run again."
            )
        if (status.st_size, status.st_mtime_ns) != (source.size, source.modified_ns):
            lines.append(
                f"warning: {printable(source.path)} changed while it was read; the output holds a "
                "mixture of the two states."
            )
    return lines


def _without_documents(units: list[Unit], records: list[Record]) -> list[str]:
    """Input files that gave nothing, not even a bad document.

    A file that is one document counts when it has no byte.
    """
    documents_of_unit = {unit.index: 0 for unit in units}
    for record in records:
        dropped = record["dropped_characters"] + record["dropped_tokens"]
        documents = record["documents"] + record["bad_count"] + dropped
        documents_of_unit[record["unit"]] += documents

    empty_files = []
    for unit in units:
        for source in unit.sources:
            # Several files of one document each may share a unit.
            without_document = source.format != "text" and documents_of_unit[unit.index] == 0
            if not source.size or without_document:
                empty_files.append(printable(source.path))
    return empty_files


def _report(
    work: WorkFolder,
    sidecars: list[dict[str, Any]],
    statistics: LengthStatistics,
    sources: list[Source],
    empty_files: list[str],
) -> dict[str, Any]:
    """The report, without what only `_finish` knows."""
    records = list(work.records.values())
    disk_bytes = sum(source.size for source in sources)
    tokens = sum(sidecar["tokens"] for sidecar in sidecars)
    inputs = {
        "files": len(sources),
        "bytes_on_disk": disk_bytes,
        "empty_files": empty_files[:_REPORTED_EXAMPLES],
    }
    dropped_characters = sum(record["dropped_characters"] for record in records)
    dropped_tokens = sum(record["dropped_tokens"] for record in records)
    return {
        "inputs": inputs,
        "documents": statistics.documents,
        "dropped": {"characters": dropped_characters, "tokens": dropped_tokens},
        "bad_documents": sum(record["bad_count"] for record in records),
        "bad_examples": _bad_examples(work.ordered(), _REPORTED_EXAMPLES),
        "text_bytes_a_document": statistics.text_bytes.summary(),
        # Without a token the ratio stays finite.
        "bytes_a_token": statistics.text_bytes.total / max(tokens, 1),
        "tokenizer": sidecars[0]["tokenizer"],
        "outputs": _outputs(work.settings, sidecars, statistics),
    }


def _outputs(
    settings: PreprocessSettings, sidecars: list[dict[str, Any]], statistics: LengthStatistics
) -> list[dict[str, Any]]:
    """The report's entries of the token files, one a key."""
    outputs = []
    for number, (key, prefix) in enumerate(
        zip(settings.json_keys, settings.output_prefixes(), strict=True)
    ):
        sidecar = sidecars[number]
        output = {
            "key": key,
            "prefix": printable(prefix),
            "documents": sidecar["documents"],
            "tokens": sidecar["tokens"],
            "bytes": sidecar["bin"]["bytes"],
            "tokens_a_document": statistics.tokens[number].summary(),
        }
        outputs.append(output)
    return outputs
