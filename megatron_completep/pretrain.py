"""Train one model from one YAML file.

Examples:

    python -m megatron_completep.pretrain configs/quickstart.yaml training.train_steps=200
    torchrun --nproc-per-node 8 -m megatron_completep.pretrain configs/completep_1b.yaml
"""

from __future__ import annotations

from megatron_completep.launch import Launch, begin_program, exit_when_launcher_dies

if __name__ == "__main__":
    begin_program()  # before the imports below, which take seconds

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from megatron_completep.checkpoint import Checkpointer, FailPoint, no_fail_point
from megatron_completep.command_line import Parser, file_to_read
from megatron_completep.completep import Table, table_of
from megatron_completep.config import Config, check_world, load_config
from megatron_completep.data.loader import Loader
from megatron_completep.errors import exit_on_user_error
from megatron_completep.guards import Guard, Watchdog
from megatron_completep.interop.architectures import export_warning
from megatron_completep.optim.check import check_parameters
from megatron_completep.parallel.context import ParallelContext, choose_device
from megatron_completep.parallel.rendezvous import rendezvous_store, say_nothing
from megatron_completep.run.assemble import Assembly, assemble
from megatron_completep.run.console import say_on_stderr, say_on_stdout
from megatron_completep.run.determinism import use_deterministic_algorithms
from megatron_completep.run.precision import use_threads
from megatron_completep.run.signals import StopSignals
from megatron_completep.run.state import ExitCode, RunState
from megatron_completep.telemetry.node import node_lines
from megatron_completep.telemetry.startup import StartupClock, StartupReport
from megatron_completep.training import build
from megatron_completep.training.loop import train


def pretrain(
    config: Config, fail_point: FailPoint = no_fail_point, clock: StartupClock | None = None
) -> ExitCode:
    """Train one model with signal handling and the hang watchdog active from the start.

    fail_point: a callback invoked at named points of a save; fault-injection tests pass one that
        raises or ends the process.
    clock: started at process start; default: now.

    Raises UserError for errors that the user can fix.
    """
    clock = clock or StartupClock()
    launch = Launch.from_environment()
    # For callers that do not come through __main__; a second watch of the same parent is harmless.
    exit_when_launcher_dies()

    # Check the configuration before joining the other ranks: they would wait in vain for a rank
    # that stops here.
    check_world(config, launch.world_size)
    table = table_of(config)
    warnings = check_parameters(config, table)
    warnings += export_warning(config.model, config.export.architecture)
    training = config.training
    choose_device(training.device, launch.local_rank)

    say = say_on_stdout if launch.rank == 0 else say_nothing
    folder = Path(training.output_dir)
    hang_minutes = config.guards.hang_timeout_minutes
    hang_seconds = 60 * hang_minutes if hang_minutes else None
    stop_signals = StopSignals(
        say,
        exit_after_minutes=training.exit_after_minutes,
        elapsed_seconds=clock.elapsed,
        by_torchrun=launch.by_torchrun,
    )
    with stop_signals as signals:
        store = rendezvous_store(launch, 60 * config.parallel.timeout_minutes, say)
        with Watchdog(launch, folder, hang_seconds, store, say_on_stderr) as watchdog:
            process = Process(launch, store, signals, watchdog, say, fail_point, clock)
            return train_one_model(config, process, table, warnings)


@dataclass(frozen=True)
class Process:
    """What belongs to this process rather than to the model that it trains."""

    launch: Launch
    store: Store | None  # None for a single process
    signals: StopSignals
    watchdog: Watchdog
    say: Callable[[str], None]  # prints a line on rank 0
    fail_point: FailPoint
    clock: StartupClock


def train_one_model(
    config: Config, process: Process, table: Table, warnings: Sequence[str]
) -> ExitCode:
    """Read this function first: it calls into every package once, in the order of a run."""
    launch = process.launch
    watchdog = process.watchdog
    say = process.say
    clock = process.clock

    if config.training.deterministic:
        use_deterministic_algorithms()  # before anything touches a device
    watchdog.enter_phase("joining the process group")
    # Prefix of the files in which NCCL's watchdog dumps its latest collectives after a timeout.
    timeout_files = f"{config.training.output_dir}/nccl_timeout_rank_"
    device_name = config.training.device
    context = ParallelContext.create(config.parallel, device_name, timeout_files, process.store)

    # From here on, a user error on one rank is raised on all ranks.
    guard = Guard(config, context, launch, watchdog, say)
    guard.on_rank_0(lambda: build.prepare_output(config))
    for warning in warnings:
        say(f"warning: {warning}")
    for line in node_lines(guard.exchange, launch, context.device, config):
        say(line)
    threads = use_threads(config.training.cpu_threads, launch.local_world_size)
    clock.done("process_groups")

    watchdog.enter_phase("building the model")
    assembly = assemble(config, context, table)
    step = assembly.step
    precision = assembly.precision
    clock.done("model")

    watchdog.enter_phase("opening the data")
    loader = build.build_training_loader(config, context)
    validation = build.build_validation(config, context)
    guard.on_rank_0(lambda: build.keep_run_tokenizer(config, say))
    clock.done("data")

    # A slow disk is not a hang: allow 0.9 of checkpoint.timeout_minutes, the time for which one
    # rank waits for another during a load. The factor is below 1 so that the watchdog fires before
    # the timeout of torch.distributed: only the watchdog names the rank that hangs.
    load_seconds = 0.9 * 60 * config.checkpoint.timeout_minutes
    watchdog.enter_phase("loading the checkpoint", at_least_seconds=load_seconds)
    checkpointer = _make_checkpointer(config, context, assembly, table, loader, guard, process)
    state = checkpointer.load_latest() or RunState()
    guard.check_restart_progress(state.step)
    guard.on_rank_0(lambda: build.record_start(config, state))
    clock.done("checkpoint")

    watchdog.enter_phase("preparing the first step")
    rollbacks = guard.rollbacks(checkpointer)
    chunks = assembly.chunks
    say(build.describe_run(config, context, precision, threads, chunks, assembly.products))
    build.check_first_step(config, context, step, state, say)
    # A run that is already complete still enters the loop: it does zero steps and closes every
    # hook.
    complete_message = build.message_if_complete(config, state)
    if complete_message is not None:
        say(complete_message)
    # The order does not matter here: `train` sorts hooks by stage.
    hooks = [*guard.hooks(step, state, rollbacks), StartupReport(clock, say)]
    hooks += build.default_hooks(
        config, context, step, validation, checkpointer, state, precision, say
    )
    code = train(config, context, step, loader, state, hooks, process.signals, rollbacks)
    guard.close()
    context.close()
    return code


def _make_checkpointer(
    config: Config,
    context: ParallelContext,
    assembly: Assembly,
    table: Table,
    loader: Loader,
    guard: Guard,
    process: Process,
) -> Checkpointer:
    """The run's checkpointer: it saves and loads weights, optimizer state and data position."""
    fingerprints = {"data": loader.fingerprint()}
    return Checkpointer(
        config,
        context,
        assembly.optimizer,
        table,
        fingerprints,
        process.say,
        process.fail_point,
        data_order=loader.corpus,
        heartbeat=guard.heartbeat,
        products=assembly.products,
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    """Read the command line, train, and return the exit code of the process."""
    clock = StartupClock.from_process_start()
    parser = Parser(__doc__)
    parser.add_argument(
        "config", type=file_to_read, metavar="CONFIG", help="the YAML file of the run"
    )
    parser.add_overrides()
    arguments = parser.parse_args(argv)
    return pretrain(load_config(arguments.config, arguments.overrides), clock=clock)


if __name__ == "__main__":
    exit_on_user_error(main)
