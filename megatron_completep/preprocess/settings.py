"""The settings of a preprocessing run."""

from dataclasses import dataclass, field, replace

import orjson
import xxhash

from megatron_completep.data.files import printable
from megatron_completep.preprocess.quality import Limits
from megatron_completep.preprocess.sources import LARGEST_DOCUMENT, Source

WORK_VERSION = 1  # of the work folder and of everything that decides the output's bytes


@dataclass(frozen=True)
class TokenizerChoice:
    """Family, model and what begins and ends a document, as `tokenizer.build_tokenizer` takes them.

    prepend_bos None: what the tokenizer itself does. eod_token None: the one that it names.
    """

    type: str
    model: str | None = None
    prepend_bos: bool | None = None
    eod_token: str | None = None


@dataclass(frozen=True)
class PreprocessSettings:
    """Everything that decides the bytes of the output, except the contents of the inputs.

    json_keys: one output a key, `{output_prefix}_{key}_document`. input_format: auto | jsonl | text
    (a file is a document) | lines (a line is a document) | parquet. unicode: refuse | repair.
    deduplicate: keep the first of documents with equal texts. largest_document: bytes of a line, or
    of a file or row that is one document; a larger one is bad.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerChoice
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    input_format: str = "auto"
    unicode: str = "refuse"
    limits: Limits = field(default_factory=Limits)
    deduplicate: bool = False
    largest_document: int = LARGEST_DOCUMENT

    def output_prefixes(self) -> list[str]:
        """PREFIX of each key's token files."""
        return [f"{self.output_prefix}_{key}_document" for key in self.json_keys]

    def fingerprint(
        self,
        sources: list[Source],
        tokenizer: dict[str, str | int | None],
        block_bytes: int,
        beginning: tuple[int, ...] = (),
    ) -> str:
        """Equal for two runs exactly when they cut the same inputs alike and give equal bytes.

        tokenizer: its identity. beginning: the ids that it puts in front of a document.
        """
        # A name that is not UTF-8 cannot be part of JSON.
        printable_sources = [replace(source, path=printable(source.path)) for source in sources]
        decisive: list[object] = [
            WORK_VERSION,
            block_bytes,
            tokenizer,
            self.json_keys,
            self.append_eod,
            self.unicode,
            self.limits,
            self.deduplicate,
            printable_sources,
        ]
        # Left out at its default, so that runs of before this setting are recognized.
        if self.largest_document != LARGEST_DOCUMENT:
            decisive.append(self.largest_document)
        if beginning:
            decisive.append({"beginning": beginning})
        encoded = orjson.dumps(decisive, option=orjson.OPT_SORT_KEYS)
        return xxhash.xxh3_64_hexdigest(encoded)
