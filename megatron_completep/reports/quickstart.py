"""The main job from nothing: corpus -> tokenizer -> token files -> training, stopped and resumed -> a sample and a report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_completep.config import Config, load_config
from megatron_completep.config.json_text import read_json_object
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.files import write_whole
from megatron_completep.inference.generation import Sampling, generate_text, load_model
from megatron_completep.parallel.context import choose_device
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer
from megatron_completep.reports.run_report import run_report
from megatron_completep.run.precision import choose_precision
from megatron_completep.telemetry.metrics import read_metrics

HELD_OUT = 50  # every 50th document is for validation
PROMPT = "class "
SAMPLING = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=150)
Say = Callable[[str], None]
Show = Callable[[str, int, int], None]  # what, how far, of how much


@dataclass
class Quickstart:
    """One quickstart: the configuration of its run, the words that override it, and what has been done so far."""

    config_file: str
    overrides: list[str]
    say: Say
    show: Show = lambda what, done, total: None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> float:
        """Do everything that is not done yet; returns how many nats the validation loss lies below a uniform guess."""
        processes = torch.cuda.device_count() or 1
        self.overrides = [
            *layout_overrides(load_config(self.config_file, self.overrides), processes),
            *self.overrides,
        ]
        config = load_config(self.config_file, self.overrides)
        if (
            config.data.tokenizer is None
            or config.data.tokenizer.model is None
            or config.data.validation is None
        ):
            raise ConfigError(
                f"{self.config_file}: the quickstart needs data.tokenizer.model and data.validation: it makes both."
            )
        folder = Path(config.data.tokenizer.model).parent
        folder.mkdir(parents=True, exist_ok=True)
        with self._stage("Gather the corpus: the source of Python's standard library"):
            corpus = gather_standard_library(folder, self.show)
            self.say(
                f"{corpus['documents']:,} files, {corpus['bytes'] / 1e6:.1f} MB; every {HELD_OUT}th is held out"
            )
        with self._stage(f"Train a tokenizer of {config.model.vocab_size} pieces"):
            self._tokenizer(folder, config)
        with self._stage("Write token files"):
            data = self._token_files(folder, config)
        middle = config.checkpoint.interval or config.training.train_steps // 2
        with self._stage(
            f"Train {config.model.num_layers} layers with the hyperparameters of the {config.completep.base_num_layers}-layer proxy"
        ):
            self._train(processes, [f"training.stop_at_step={middle}"])
        with self._stage(f"Start again: go on from the checkpoint of step {middle}"):
            self._train(processes, [])
        with self._stage("Generate a sample"):
            sample = generate_sample(config)
            self.say(sample)
        return self._report(config, corpus, data, sample)

    @contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        self.say(f"\n== {title}")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started
        self.say(f"   {self.seconds[title]:.1f} s")

    def _tokenizer(self, folder: Path, config: Config) -> None:
        assert config.data.tokenizer is not None
        model = Path(str(config.data.tokenizer.model))
        if model.exists():
            self.say(f"{model} is there already")
            return
        settings = TrainingSettings(
            inputs=(str(folder / "train.jsonl"),), vocab_size=config.model.vocab_size
        )
        report = train_tokenizer(settings, str(model), self.say)
        self.say(f"{report['held_out_bytes_a_token']:.2f} bytes a token")

    def _token_files(self, folder: Path, config: Config) -> dict[str, Any]:
        """Reports of both splits."""
        assert config.data.tokenizer is not None
        choice = TokenizerChoice(config.data.tokenizer.type, config.data.tokenizer.model)
        reports = {}
        for split in ("train", "validation"):
            settings = PreprocessSettings(
                (str(folder / f"{split}.jsonl"),), str(folder / split), choice, append_eod=True
            )
            reports[split] = preprocess(settings, workers=torch.get_num_threads(), overwrite=True)
            output = reports[split]["outputs"][0]
            self.say(f"{split}: {output['documents']:,} documents, {output['tokens']:,} tokens")
        return reports

    def _train(self, processes: int, overrides: list[str]) -> None:
        """One launch of torchrun; its lines go straight to the terminal."""
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        command += [
            "-m",
            "megatron_completep.pretrain",
            self.config_file,
            *self.overrides,
            *overrides,
        ]
        self.say("torchrun " + " ".join(command[4:]))
        with subprocess.Popen(command) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.wait()  # it heard the same signal, and saves
                raise
        if code:
            raise UserError(
                f"training ended with exit code {code}; what it said stands above. The same command goes on where it stopped."
            )

    def _report(
        self, config: Config, corpus: dict[str, Any], data: dict[str, Any], sample: str
    ) -> float:
        folder = Path(config.training.output_dir)
        rows = read_metrics(folder / "metrics.jsonl")
        loss = next(
            row["validation_loss"]
            for row in reversed(rows)
            if row.get("validation_loss") is not None
        )
        below = math.log(config.model.vocab_size) - loss
        report = run_report(config, rows, title="Quickstart")
        section = report.section("The text")
        section.table(
            ["", "documents", "tokens", "bytes a token"],
            [
                [split, d["outputs"][0]["documents"], d["outputs"][0]["tokens"], d["bytes_a_token"]]
                for split, d in data.items()
            ],
            f"Source files of Python {corpus['python']}'s standard library.",
        )
        bits = loss / math.log(2) / data["validation"]["bytes_a_token"]
        section.text(f"The validation loss of {loss:.4f} nats a token is {bits:.3f} bits a byte.")
        report.section(
            "A sample",
            f"After the prompt {PROMPT!r}, temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}:",
        ).code(sample)
        report.section("Time").table(
            ["stage", "seconds"],
            [[title, f"{seconds:.1f}"] for title, seconds in self.seconds.items()],
        )
        report.write_markdown(folder / "report.md")
        report.write_html(folder / "report.html")
        self.say(
            f"\nvalidation loss {loss:.4f}: {below:.2f} nats below ln({config.model.vocab_size}) = {math.log(config.model.vocab_size):.3f}"
        )
        self.say(
            f"{folder}/ holds report.html, report.md, loss.png, metrics.jsonl, tensorboard/ and checkpoints/"
        )
        return below


def layout_overrides(config: Config, processes: int) -> list[str]:
    """Micro-batches small enough that every process has some of the global batch."""
    share = config.training.global_batch_size // processes
    if share == 0 or config.training.global_batch_size % processes:
        raise ConfigError(
            f"training.global_batch_size = {config.training.global_batch_size} cannot be shared by {processes} GPUs. "
            "Show fewer of them (CUDA_VISIBLE_DEVICES), or set training.global_batch_size to a multiple."
        )
    return [f"training.micro_batch_size={math.gcd(share, config.training.micro_batch_size)}"]


def gather_standard_library(folder: Path, show: Show) -> dict[str, Any]:
    """Write the standard library's source as train.jsonl and validation.jsonl, split by document; returns what was found.

    Files that are there already for this Python are kept. A new corpus takes the old tokenizer away.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    record = folder / "corpus.json"
    identity = {"python": sys.version.split()[0], "library": str(library)}
    known = read_json_object(record) if record.exists() else {}
    if {name: known.get(name) for name in identity} == identity:
        return known
    paths = sorted(
        path
        for path in library.rglob("*.py")
        if "site-packages" not in path.parts and "dist-packages" not in path.parts
    )
    if not paths:
        raise DataError(
            f"{library} holds no source files, so there is no corpus. Use a Python with its standard library as .py files."
        )
    lines: dict[str, list[bytes]] = {"train": [], "validation": []}
    size = left_out = 0
    for number, path in enumerate(paths):
        show("reading", number + 1, len(paths))
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            left_out += 1
            continue
        size += len(text.encode())
        split = "validation" if number % HELD_OUT == 0 else "train"
        lines[split].append(
            json.dumps({"text": text, "path": str(path.relative_to(library))}).encode() + b"\n"
        )
    for split, documents in lines.items():
        write_whole(folder / f"{split}.jsonl", b"".join(documents))
    for stale in folder.glob("tokenizer.model*"):
        stale.unlink()
    found = {**identity, "documents": len(paths) - left_out, "bytes": size, "left_out": left_out}
    write_whole(record, json.dumps(found).encode())
    return found


def generate_sample(config: Config) -> str:
    """The prompt and what the newest checkpoint makes of it."""
    assert config.data.tokenizer is not None
    device = choose_device(config.training.device, 0)
    _, model = load_model(
        config.training.output_dir, device, choose_precision(config.training.precision, device)
    )
    generator = torch.Generator(device).manual_seed(config.training.seed)
    return PROMPT + "".join(
        generate_text(model, build_tokenizer(config.data.tokenizer), PROMPT, SAMPLING, generator)
    )
