"""Train an older revision and the present tree on this machine,
and compare what both wrote to the last bit.

    python tests/compare_revisions.py main~3
    python tests/compare_revisions.py main~3 --cases golden exports

It asks the programs on the command line alone, so that both trees may look as different inside as
they like. What is compared: golden traces in float64, initial weights, five steps of six layouts
(losses, gradient norms, every tensor of the last checkpoint), exports of four architectures, and
the plan of every configuration in configs/. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
# What two equal runs do not share, and figures of the process that the mathematics does not decide.
NOT_COMPARED = ("tokens_per_second", "memory_bytes", "mfu", "slowest_rank", "slowest_rank_ratio")

BASE = {
    "model": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": 260,
        "vocab_multiple": 8,
        "seq_length": 32,
    },
    "completep": {"base_hidden_size": 16, "base_num_layers": 2},
    "optimizer": {"base_lr": 0.01, "warmup_steps": 2},
    "training": {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_steps": STEPS,
        "precision": "float32",
        "device": "cpu",
        "cpu_threads": 1,
    },
    "checkpoint": {"interval": None, "async_save": False},
    "logging": {"interval": 1, "tensorboard": False, "parameterization_interval": 2},
}
GPT2 = {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True}

# name: (processes, settings). Between them every kind of layer and every axis of the mesh.
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, object]]]] = {
    "one process": (1, {"model": {"qk_norm": True, "num_query_groups": 2}}),
    "tensor 2": (2, {"parallel": {"tensor_parallel_size": 2}, "model": {"bias": True}}),
    "tensor 2, sequence": (
        2,
        {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}, "model": GPT2},
    ),
    "pipeline 2, 1f1b, tied": (
        2,
        {
            "parallel": {"pipeline_parallel_size": 2},
            "model": {"tied_embeddings": True, "position": "alibi"},
        },
    ),
    "pipeline 2 x 2, zero bubble": (
        2,
        {
            "parallel": {
                "pipeline_parallel_size": 2,
                "virtual_pipeline_size": 2,
                "schedule": "zero_bubble",
            },
            "model": {**GPT2, "dropout": 0.1},
        },
    ),
    "data 2 x tensor 2, bf16": (
        4,
        {
            "parallel": {
                "tensor_parallel_size": 2,
                "gradient_dtype": "bf16",
                "bucket_megabytes": 0.02,
            },
            "training": {"precision": "bf16", "recompute": "selective", "z_loss": 1e-3},
        },
    ),
}
EXPORTS: dict[str, dict[str, object]] = {
    "granite": {"residual_multiplier": 0.5, "input_multiplier": 3.0},
    "llama": {"num_query_groups": 2},
    "qwen3": {"qk_norm": True},
    "gpt2": GPT2,
}


class Tree:
    """One revision of the project, on the disk, with a folder for what it writes."""

    def __init__(self, source: Path, scratch: Path):
        self.source = source
        self.scratch = scratch
        scratch.mkdir(parents=True)

    def run(self, *words: str, ranks: int = 1) -> str:
        """Run `python words` in this tree on that many ranks;
        returns what the first rank printed.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, "PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1"}
            if ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.source,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
        outputs = [process.communicate() for process in processes]
        for process, (output, errors) in zip(processes, outputs, strict=True):
            if process.returncode != 0:
                raise SystemExit(f"{self.source}: {' '.join(words)}\n{output}\n{errors}")
        return outputs[0][0]

    def train(self, name: str, corpus: Path, changes: Mapping[str, Mapping], ranks: int) -> Path:
        """Train the small model with these changes; returns the run's folder."""
        folder = self.scratch / name.replace(" ", "_").replace(",", "")
        values: dict[str, dict[str, object]] = {
            section: {**BASE.get(section, {}), **changes.get(section, {})}
            for section in {*BASE, *changes}
        }
        values["data"] = {
            "train": [{"prefix": str(corpus)}],
            "tokenizer": {"type": "bytes"},
        }
        values["training"]["output_dir"] = str(folder)
        configuration = self.scratch / f"{folder.name}.yaml"
        configuration.write_text(yaml.safe_dump(values))
        self.run("-m", "megatron_completep.pretrain", str(configuration), ranks=ranks)
        return folder


def tensors_of(run: Path) -> dict[str, str]:
    """Name and coordinates of every stored tensor of the newest checkpoint -> hash of its bits."""
    newest = max((run / "checkpoints").glob("step_*"))
    hashes = {}
    for file in sorted(newest.glob("*.safetensors")):
        for name, array in load_file(file).items():
            hashes[f"{file.name} {name}"] = hash_of(array.tobytes())
    return hashes


def rows_of(run: Path) -> dict[str, str]:
    """What the run recorded of every step, without times."""
    rows = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if name not in NOT_COMPARED and "seconds" not in name:
                rows[f"{name} after {len(rows)} values"] = repr(value)
    return rows


def hash_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def golden(tree: Tree, corpus: Path) -> dict[str, str]:
    """Losses of the golden traces in float64."""
    results = {}
    for trace in sorted((ROOT / "tests/golden").glob("*.json")):
        printed = tree.run("tools/replay_trace.py", str(trace.with_suffix("")), "--json")
        values = json.loads(printed)
        assert values["pass"], trace
        results |= {f"{trace.stem} {name}": repr(value) for name, value in values.items()}
    return results


def initial(tree: Tree, corpus: Path) -> dict[str, str]:
    """Weights before the first update: a run whose only step is passed over."""
    results = {}
    for name, model in (("rmsnorm", {"qk_norm": True}), ("layernorm", GPT2)):
        changes = {
            "model": model,
            "training": {**BASE["training"], "skip_steps": [{"first": 1, "last": 5}]},
        }
        run = tree.train(f"initial {name}", corpus, changes, 1)
        results |= {f"{name} {tensor}": value for tensor, value in tensors_of(run).items()}
    return results


def layouts(tree: Tree, corpus: Path) -> dict[str, str]:
    """Five steps of six layouts: rows and tensors."""
    results = {}
    for name, (ranks, changes) in LAYOUTS.items():
        run = tree.train(name, corpus, changes, ranks)
        values = {**rows_of(run), **tensors_of(run)}
        results |= {f"{name}: {key}": value for key, value in values.items()}
    return results


def exports(tree: Tree, corpus: Path) -> dict[str, str]:
    """Every file of the export of each architecture."""
    results = {}
    for architecture, model in EXPORTS.items():
        run = tree.train(f"export {architecture}", corpus, {"model": model}, 1)
        folder = tree.scratch / f"exported_{architecture}"
        tree.run("tools/export_hf.py", str(run), str(folder), "--architecture", architecture)
        for file in sorted(folder.iterdir()):
            data = file.read_bytes().replace(str(tree.scratch).encode(), b"")
            results[f"{architecture} {file.name}"] = hash_of(data)
    return results


def plans(tree: Tree, corpus: Path) -> dict[str, str]:
    """What every configuration means for every parameter."""
    results = {}
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        # As many ranks as make one data rank: every configuration fits them.
        parallel = yaml.safe_load(file.read_text()).get("parallel", {})
        ranks = parallel.get("tensor_parallel_size", 1) * parallel.get("pipeline_parallel_size", 1)
        printed = tree.run("tools/show_plan.py", str(file), "--world-size", str(ranks), "--json")
        plan = json.loads(printed)
        for parameter in plan["parameters"]:
            results[f"{file.name} {parameter['name']}"] = repr(parameter)
        results[f"{file.name} multipliers"] = repr(plan["multipliers"])
        results[f"{file.name} scaling"] = repr(plan["scaling"])
    return results


CASES: dict[str, Callable[[Tree, Path], dict[str, str]]] = {
    "golden": golden,
    "initial": initial,
    "layouts": layouts,
    "exports": exports,
    "plans": plans,
}


def write_corpus(tree: Tree, folder: Path) -> Path:
    """Token files of this program's own documents, made by the older tree."""
    text = folder / "documents.jsonl"
    lines = [
        json.dumps({"text": page.read_text()[:4000]}) for page in sorted(ROOT.glob("docs/*.md"))
    ]
    text.write_text("\n".join(lines))
    tree.run(
        "tools/preprocess_data.py",
        *("--input", str(text), "--output-prefix", str(folder / "corpus")),
        *("--tokenizer-type", "bytes", "--workers", "1"),
    )
    return folder / "corpus_text_document"


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """A line for each value that is not equal in both."""
    lines = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            lines.append(f"  {name}: {old.get(name, 'missing')} -> {new.get(name, 'missing')}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="the older revision, as git names it")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all"
    )
    arguments = parser.parse_args(argv)
    differing = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder / "source")]
        subprocess.run([*checkout, arguments.revision], check=True, capture_output=True)
        try:
            old = Tree(folder / "source", folder / "old")
            new = Tree(ROOT, folder / "new")
            corpus = write_corpus(old, folder)
            for case in arguments.cases:
                before, after = CASES[case](old, corpus), CASES[case](new, corpus)
                lines = differences(before, after)
                differing += len(lines)
                print(f"{case}: {len(before)} values, {len(lines)} differ", flush=True)
                print("\n".join(lines[:20]), end="\n" if lines else "", flush=True)
        finally:
            remove = [
                "git",
                "-C",
                str(ROOT),
                "worktree",
                "remove",
                "--force",
                str(folder / "source"),
            ]
            subprocess.run(remove, check=False, capture_output=True)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
