"""The quickstart: a training run from nothing, with a sample and a report.

Its stages are the corpus, a tokenizer, token files, training that is stopped and resumed, a sample
of generated text, and the report.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_completep.command_line import call_of
from megatron_completep.config import Config, load_config
from megatron_completep.config.json_text import read_json_object
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.document import show
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.files import write_whole
from megatron_completep.inference.generation import Sampling, generate_text, load_model
from megatron_completep.parallel.context import choose_device
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer
from megatron_completep.reports.run_report import (
    PARAMETERIZATION_HEADERS,
    multipliers_sentence,
    parameterization_rows,
    run_report,
)
from megatron_completep.run.precision import choose_precision
from megatron_completep.telemetry.metrics import read_metrics

HELD_OUT = 50  # every 50th document is for validation
PROMPT = "class "
SAMPLING = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=150)
Say = Callable[[str], None]
Show = Callable[[str, int, int], None]  # (activity, number done, number in all)


@dataclass
class Quickstart:
    """One quickstart: its run's configuration file with overrides, and the time of each stage.

    say: prints a line. show: shows the progress of an activity. seconds: by the stage's title.
    """

    config_file: str
    overrides: list[str]
    say: Say
    show: Show = lambda what, done, total: None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> float:
        """Run every stage that is not done yet.

        Returns by how many nats the validation loss is below that of a uniform guess. Raises
        ConfigError for a configuration that the quickstart cannot use, UserError where training
        fails.
        """
        # One process a GPU, and one where there is none.
        processes = torch.cuda.device_count() or 1
        unsplit = load_config(self.config_file, self.overrides)
        # The user's overrides come last, so that they replace the layout's.
        self.overrides = [*layout_overrides(unsplit, processes), *self.overrides]
        config = load_config(self.config_file, self.overrides)
        folder = self._data_folder(config)

        with self._stage("Gather the corpus: the source of Python's standard library"):
            corpus = gather_standard_library(folder, self.show)
            size = f"{corpus['documents']:,} files, {corpus['bytes'] / 1e6:.1f} MB"
            self.say(f"{size}; every {HELD_OUT}th is held out")
        with self._stage(f"Train a tokenizer of {config.model.vocab_size} pieces"):
            self._tokenizer(folder, config)
        with self._stage("Write token files"):
            reports = self._token_files(folder, config)

        # Training is stopped half-way so that the quickstart also shows how a run is resumed.
        middle = config.checkpoint.interval or config.training.train_steps // 2
        with self._stage(f"Train {shape_of_target(config)}"):
            self.say("\n".join(what_the_table_did(config)))
            self._train(processes, [f"training.stop_at_step={middle}"])
        with self._stage(f"Start again: go on from the checkpoint of step {middle}"):
            self._train(processes, [])

        with self._stage("Generate a sample"):
            sample = generate_sample(config)
            self.say(sample)
        return self._report(config, corpus, reports, sample)

    def _data_folder(self, config: Config) -> Path:
        """The tokenizer's folder, which is made. Raises ConfigError where the config names none."""
        data = config.data
        if data.tokenizer is None or data.tokenizer.model is None or data.validation is None:
            raise ConfigError(
                f"{self.config_file}: the quickstart needs data.tokenizer.model "
                "and data.validation: it makes both."
            )
        folder = Path(data.tokenizer.model).parent
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        """Announce a stage and record its time."""
        self.say(f"\n== {title}")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started
        self.say(f"   {self.seconds[title]:.1f} s")

    def _tokenizer(self, folder: Path, config: Config) -> None:
        """Train the tokenizer on the training split, unless it is there."""
        assert config.data.tokenizer is not None
        model = Path(str(config.data.tokenizer.model))
        if model.exists():
            self.say(f"{model} is there already")
            return
        corpus_file = str(folder / "train.jsonl")
        settings = TrainingSettings(inputs=(corpus_file,), vocab_size=config.model.vocab_size)
        report = train_tokenizer(settings, str(model), self.say)
        self.say(f"{report['held_out_bytes_a_token']:.2f} bytes a token")

    def _token_files(self, folder: Path, config: Config) -> dict[str, Any]:
        """Write the token files of both splits; returns the preprocessing reports by split."""
        assert config.data.tokenizer is not None
        choice = TokenizerChoice(**config.data.tokenizer.model_dump())
        reports = {}
        for split in ("train", "validation"):
            corpus_file = str(folder / f"{split}.jsonl")
            prefix = str(folder / split)
            settings = PreprocessSettings((corpus_file,), prefix, choice, append_eod=True)
            report = preprocess(settings, workers=torch.get_num_threads(), overwrite=True)
            output = report["outputs"][0]
            self.say(f"{split}: {output['documents']:,} documents, {output['tokens']:,} tokens")
            reports[split] = report
        return reports

    def _train(self, processes: int, overrides: list[str]) -> None:
        """One launch of torchrun, which prints straight to the terminal. UserError if it fails."""
        launcher = ["-m", "torch.distributed.run"]
        launcher += ["--standalone", "--nproc-per-node", str(processes)]
        program = ["-m", "megatron_completep.pretrain", self.config_file]
        arguments = [*launcher, *program, *self.overrides, *overrides]
        # Shown as the user would type it: torchrun in place of the interpreter and its module, and
        # without --standalone.
        self.say("torchrun " + " ".join(arguments[3:]))
        with subprocess.Popen([sys.executable, *arguments]) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                # The launch received the same signal, and saves a checkpoint before it ends.
                process.wait()
                raise
        if code:
            raise UserError(
                f"training ended with exit code {code}; what it said stands above. "
                "The same command goes on where it stopped."
            )

    def _report(
        self, config: Config, corpus: dict[str, Any], reports: dict[str, Any], sample: str
    ) -> float:
        """Write the run's report; returns nats below a uniform guess.

        reports: of preprocessing, by split.
        """
        folder = Path(config.training.output_dir)
        rows = read_metrics(folder / "metrics.jsonl")
        loss = _last_validation_loss(rows)
        vocab_size = config.model.vocab_size
        uniform = math.log(vocab_size)
        below = uniform - loss

        report = run_report(config, rows, title="Quickstart")
        section = report.section("The text")
        split_rows: list[list[Any]] = []
        for split, split_report in reports.items():
            output = split_report["outputs"][0]
            counts = [output["documents"], output["tokens"]]
            split_rows.append([split, *counts, split_report["bytes_a_token"]])
        headers = ["", "documents", "tokens", "bytes a token"]
        caption = f"Source files of Python {corpus['python']}'s standard library."
        section.table(headers, split_rows, caption)
        # Nats a token depend on the tokenizer; bits a byte compare models of any tokenizer.
        bits = loss / math.log(2) / reports["validation"]["bytes_a_token"]
        section.text(f"The validation loss of {loss:.4f} nats a token is {bits:.3f} bits a byte.")

        sampling = f"temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}"
        section = report.section("A sample", f"After the prompt {PROMPT!r}, {sampling}:")
        section.code(sample)
        time_rows = [[title, f"{seconds:.1f}"] for title, seconds in self.seconds.items()]
        report.section("Time").table(["stage", "seconds"], time_rows)
        report.write_markdown(folder / "report.md")
        report.write_html(folder / "report.html")

        distance = f"{below:.2f} nats below ln({vocab_size}) = {uniform:.3f}"
        self.say(f"\nvalidation loss {loss:.4f}: {distance}")
        self.say(
            f"{folder}/ holds report.html, report.md, loss.png, metrics.jsonl, "
            "tensorboard/ and checkpoints/"
        )
        self.say("\n".join(next_commands(config)))
        return below


def shape_of_target(config: Config) -> str:
    """The model and its proxy, in words."""
    model = config.model
    completep = config.completep
    base_layers = completep.base_num_layers or model.num_layers
    base_width = completep.base_hidden_size or model.hidden_size
    return (
        f"{model.num_layers} layers of width {model.hidden_size} with what was tuned at "
        f"{base_layers} layers of width {base_width}"
    )


def what_the_table_did(config: Config) -> list[str]:
    """Lines of a table: the proxy's values, and what each role of the model trains with."""
    lines = [multipliers_sentence(config)]
    rows = [PARAMETERIZATION_HEADERS, *parameterization_rows(config)]
    cells = [[show(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(padded).rstrip())
    return lines


def next_commands(config: Config) -> list[str]:
    """What to do after the quickstart, as commands that run as they stand."""
    folder = config.training.output_dir
    generate = [*call_of("generate"), folder, "--prompt", "import ", "--max-new-tokens", "100"]
    tokenizer = config.data.tokenizer
    assert tokenizer is not None and tokenizer.model is not None
    preprocess_words = [
        *call_of("preprocess_data"),
        *("--input", "YOUR_TEXT", "--output-prefix", "data/own", "--append-eod"),
        *("--tokenizer-type", tokenizer.type, "--tokenizer-model", tokenizer.model),
    ]
    return [
        "next, more of what it writes:",
        f"  {shlex.join(generate)}",
        "and a folder of your own text, which README.md goes on with:",
        f"  {shlex.join(preprocess_words)}",
    ]


def _last_validation_loss(rows: Sequence[dict[str, Any]]) -> float:
    losses: list[float | None] = [row.get("validation_loss") for row in rows]
    return next(loss for loss in reversed(losses) if loss is not None)


def layout_overrides(config: Config, processes: int) -> list[str]:
    """Micro-batches small enough that every process has a share of the global batch.

    Raises ConfigError where the global batch cannot be shared equally.
    """
    training = config.training
    share = training.global_batch_size // processes
    if share == 0 or training.global_batch_size % processes:
        raise ConfigError(
            f"training.global_batch_size = {training.global_batch_size} "
            f"cannot be shared by {processes} GPUs. "
            "Show fewer of them (CUDA_VISIBLE_DEVICES), "
            "or set training.global_batch_size to a multiple."
        )
    return [f"training.micro_batch_size={math.gcd(share, training.micro_batch_size)}"]


def gather_standard_library(folder: Path, show: Show) -> dict[str, Any]:
    """Write the standard library's source as train.jsonl and validation.jsonl, split by document.

    Returns the Python version, the library's path, and the numbers of documents, bytes and files
    that are not UTF-8. Files that are there already for this Python are kept. A new corpus removes
    the old tokenizer. Raises DataError where the library has no source files.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    record_path = folder / "corpus.json"
    identity = {"python": sys.version.split()[0], "library": str(library)}
    record = read_json_object(record_path) if record_path.exists() else {}
    if {name: record.get(name) for name in identity} == identity:
        return record

    lines: dict[str, list[bytes]] = {"train": [], "validation": []}
    size = 0
    left_out = 0
    paths = _source_files(library)
    for number, path in enumerate(paths):
        show("reading", number + 1, len(paths))
        try:
            source = path.read_bytes().decode()
        except UnicodeDecodeError:
            # A few of the library's tests hold other encodings on purpose.
            left_out += 1
            continue
        size += len(source.encode())
        document = {"text": source, "path": str(path.relative_to(library))}
        split = "validation" if number % HELD_OUT == 0 else "train"
        lines[split].append(json.dumps(document).encode() + b"\n")
    for split, documents in lines.items():
        write_whole(folder / f"{split}.jsonl", b"".join(documents))

    # A tokenizer of another corpus would be kept by the next stage, for it is there already.
    for stale in folder.glob("tokenizer.model*"):
        stale.unlink()
    # The record is written last: without it an interrupted corpus is gathered again.
    counts = {"documents": len(paths) - left_out, "bytes": size, "left_out": left_out}
    record = {**identity, **counts}
    write_whole(record_path, json.dumps(record).encode())
    return record


def _source_files(library: Path) -> list[Path]:
    """The library's own .py files, sorted. Raises DataError where there are none."""
    paths = []
    for path in library.rglob("*.py"):
        if "site-packages" not in path.parts and "dist-packages" not in path.parts:
            paths.append(path)
    if not paths:
        raise DataError(
            f"{library} holds no source files, so there is no corpus. "
            "Use a Python with its standard library as .py files."
        )
    return sorted(paths)


def generate_sample(config: Config) -> str:
    """The prompt, continued by the model of the newest checkpoint."""
    assert config.data.tokenizer is not None
    device = choose_device(config.training.device, 0)
    precision = choose_precision(config.training.precision, device)
    _, model = load_model(config.training.output_dir, device, precision)
    tokenizer = build_tokenizer(config.data.tokenizer)
    generator = torch.Generator(device).manual_seed(config.training.seed)
    return PROMPT + "".join(generate_text(model, tokenizer, PROMPT, SAMPLING, generator))
